"""The profile of a model as an SVG: C of each block with its interval, and what was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 340, 56, 16, 34, 64
BLUE, ORANGE, GREY, INK = "#3465a4", "#d9730d", "#9aa0a6", "#222222"
Point = tuple[float, float, float]  # a value and both ends of its interval


def profile_svg(
    points: Mapping[int, Point], depth: int, title: str, what: str, lines: Mapping[str, float], noise: str
) -> str:
    """Draw the blocks that were measured; those that were not stand there as grey bands.

    Args:
        points: by block.
        depth: blocks of the model.
        what: the axis of the values.
        lines: heights of horizontal lines, by what they mean.
        noise: that the intervals are of.
    """
    ends = [end for point in points.values() for end in point] + list(lines.values())
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low or 1.0)
    low, high = low - margin, high + margin
    step = (WIDTH - LEFT - RIGHT) / depth

    def x(block: float) -> float:
        return LEFT + step * (block + 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    def text(at: float, height: float, said: str, anchor: str = "middle", colour: str = INK, size: int = 11) -> str:
        return (
            f'<text x="{at:.1f}" y="{height:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">'
            f"{escape(said)}</text>"
        )

    def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0) -> str:
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"/>'

    floor = HEIGHT - BOTTOM
    drawn = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', text(WIDTH / 2, 20, title, size=13)]
    for k in range(depth):
        if k not in points:
            band = f'x="{x(k) - step / 2:.1f}" y="{TOP}" width="{step:.1f}" height="{floor - TOP}"'
            drawn.append(f'<rect {band} fill="#e4e4e4"><title>block {k}: not measured</title></rect>')
    drawn += [line(LEFT, TOP, LEFT, floor, INK), line(LEFT, floor, WIDTH - RIGHT, floor, INK)]
    for value in _ticks(low, high):
        drawn += [line(LEFT - 4, y(value), LEFT, y(value), INK), text(LEFT - 7, y(value) + 4, f"{value:g}", "end")]
    for name, value in lines.items():
        colour = GREY if value == 0 else ORANGE
        drawn += [line(LEFT, y(value), WIDTH - RIGHT, y(value), colour)]
        drawn += [text(WIDTH - RIGHT - 2, y(value) - 4, name, "end", colour)]
    for k, (value, bottom, top) in sorted(points.items()):
        drawn.append(line(x(k), y(bottom), x(k), y(top), INK))
        drawn += [line(x(k) - 3, y(end), x(k) + 3, y(end), INK) for end in (bottom, top)]
        tip = f"<title>block {k}: {value:.3f} [{bottom:.3f}, {top:.3f}]</title>"
        drawn.append(f'<circle cx="{x(k):.1f}" cy="{y(value):.1f}" r="3.5" fill="{BLUE}">{tip}</circle>')
    drawn += [text(x(k), floor + 15, str(k), size=10) for k in range(depth)]
    drawn.append(text(LEFT + (WIDTH - LEFT - RIGHT) / 2, floor + 32, "block"))
    note = f"bars: 95 % intervals ({noise})"
    if len(points) < depth:
        note += f"; grey: not measured, {depth - len(points)} of {depth} blocks"
    drawn.append(text(LEFT, floor + 52, note, "start"))
    middle = (TOP + floor) / 2
    label = text(14, middle, what)
    drawn.append(label.replace("<text ", f'<text transform="rotate(-90 14 {middle:.1f})" ', 1))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, *drawn, "</svg>"]) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between both ends, at most nine."""
    step = next(s * 10.0**e for e in range(-4, 6) for s in (1, 2, 5) if (high - low) / (s * 10.0**e) <= 8)
    first = int(low // step) + 1
    return [round(step * n, 6) for n in range(first, int(high // step) + 1)]
