"""Drawings for a page: matplotlib's SVG in the page's own colours, light and dark, with a text for each mark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import nan
from typing import Any

from .plots import BLUE, GREY, INTERVALS, ORANGE, as_given

INK, GRID = "#010203", "#020304"  # stand for the page's colours, as do those of the plots
COLOURS = {INK: "ink", GRID: "grid", BLUE: "blue", ORANGE: "orange", GREY: "grey"}
WIDTH = 4.8  # inches: on a telephone its texts can be read without scrolling
COLUMNS = 12  # of a heat map that are named, at most
MARKED = 80  # points of a curve that have a text of their own, at most
NAME = 40  # characters of a name that there is room for
STYLES = ("-", "--", ":", "-.")  # of lines in one colour
_numbers = itertools.count(1)

Tips = dict[str, str]  # what a mark says, by its id


def _svg(draw: Callable[[Any], Tips], width: float, height: float, label: str) -> str:
    """The SVG of what `draw` puts into a figure of so many inches; it gives the texts of its marks.

    Args:
        label: says what the drawing shows to who does not see it.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "onelayer", "font.family": "sans-serif", "font.size": 9}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with as_given(), matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        tips = draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", drawn, count=1)
    drawn = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", drawn, count=1)
    prefix = f"d{next(_numbers)}-"
    drawn = re.sub(r'\bid="', f'id="{prefix}', drawn)
    drawn = re.sub(r'(url\(#|href="#)', rf"\1{prefix}", drawn)
    for colour, name in COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    for mark, said in tips.items():
        opening = f'<g id="{prefix}{mark}">'
        drawn = drawn.replace(opening, f'{opening[:-1]} class="tip" tabindex="0" data-tip="{escape(said)}">', 1)
    return drawn.replace("<svg ", f'<svg role="group" aria-label="{escape(label)}" ', 1)


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)


def _short(name: str) -> str:
    """A name in one line, of a long one its end."""
    line = " ".join(name.split())
    return line if len(line) <= NAME else f"…{line[1 - NAME :]}"


def bars(panels: Mapping[str, tuple[Sequence[float | None], Sequence[float | None], Sequence[int]]]) -> str:
    """One row of bars for each panel, a bar for each block.

    Args:
        panels: by title, the values, their standard errors (drawn as 95 % intervals), and the blocks in colour.
    """

    def draw(figure: Any) -> Tips:
        tips = {}
        rows = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        for number, (axes, (title, (values, errors, chosen))) in enumerate(zip(rows, panels.items(), strict=True)):
            _plain(axes, f"{title} ({INTERVALS})" if any(errors) else title)
            for block, value in enumerate(values):
                if value is None:
                    continue
                error = errors[block]
                colour = ORANGE if block in chosen else BLUE
                (bar,) = axes.bar([block], [value], color=colour)
                if error:
                    axes.errorbar([block], [value], yerr=[1.96 * error], color=INK, capsize=2, linewidth=1)
                mark = f"bar-{number}-{block}"
                bar.set_gid(mark)
                tips[mark] = f"block {block}: {value:.4g}" + (f" ± {error:.2g}" if error else "")
            axes.axhline(0, color=INK, linewidth=0.8)
        rows[-1].set_xlabel("block")
        rows[-1].xaxis.get_major_locator().set_params(integer=True)
        return tips

    return _svg(draw, WIDTH, 0.6 + 1.7 * len(panels), "bars over the blocks: " + ", ".join(panels))


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x: str = "step") -> str:
    """One row for each panel, by title the lines by name, each a list of points. Several lines are named below the
    panels, and are the same in each."""
    named = next((list(lines) for lines in panels.values() if len(lines) > 1), [])

    def draw(figure: Any) -> Tips:
        tips = {}
        drawn = {}
        rows = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        for number, (axes, (title, lines)) in enumerate(zip(rows, panels.items(), strict=True)):
            _plain(axes, title)
            for line, (colour, (name, points)) in enumerate(zip(itertools.cycle((BLUE, ORANGE, GREY)), lines.items())):
                style = STYLES[line // 3 % len(STYLES)]
                (drawn[name],) = axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.5)
                for i, (at, value) in enumerate(points[:: -(-len(points) // MARKED)]):
                    (point,) = axes.plot([at], [value], "o", color=colour, markersize=3)
                    mark = f"point-{number}-{line}-{i}"
                    point.set_gid(mark)
                    tips[mark] = f"{name}, {x} {at:g}: {value:.4g}"
        rows[-1].set_xlabel(x)
        rows[-1].xaxis.get_major_locator().set_params(integer=True)
        if named:
            keys = {"handles": [drawn[name] for name in named], "labels": ["name"] * len(named)}
            legend = figure.legend(**keys, frameon=False, fontsize=8, loc="outside lower left")
            for text, name in zip(legend.get_texts(), named, strict=True):
                text.set_text(_short(name))  # of a label that begins with "_" it would leave the line out
        return tips

    return _svg(draw, WIDTH, 0.6 + 1.6 * len(panels) + 0.2 * len(named), "curves over the steps: " + ", ".join(panels))


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float],
    what: str,
    largest: float | None = None,
) -> str:
    """Cells whose strength is a share; `what` names it. The strongest is `largest`, or the largest there is."""
    top = largest or max(values.values(), default=0.0) or 1.0

    def draw(figure: Any) -> Tips:
        from matplotlib.patches import Rectangle

        tips = {}
        axes = figure.subplots()
        _plain(axes, "")
        title = what if largest else f"{what} (full colour: {top:.2%})"  # the darkest on white, the brightest on black
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
        axes.grid(False)
        for (row, column), value in values.items():
            at = columns.index(column), rows.index(row)
            cell = Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, facecolor=BLUE, edgecolor=GRID, linewidth=0.5)
            cell.set_alpha(None if value != value else max(0.04, min(value / top, 1.0)))
            mark = f"cell-{at[0]}-{at[1]}"
            cell.set_gid(mark)
            axes.add_patch(cell)
            tips[mark] = f"block {column}, {row}: {value:.2%}"
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="block")
        every = -(-len(columns) // COLUMNS)
        axes.set_xticks(range(0, len(columns), every), columns[::every])
        axes.set_yticks(range(len(rows)), [_short(row) for row in rows])
        return tips

    return _svg(draw, WIDTH, 1.0 + 0.25 * len(rows), what)


def terminal_bars(values: Sequence[float | None], errors: Sequence[float | None], width: int = 40) -> list[str]:
    """A line for each block that has a value, for a terminal.

    >>> terminal_bars([0.5, None, -0.25], [0.1, None, None], width=4)
    ['  0  ████  +0.5 ± 0.1', '  2  ▒▒  -0.25']
    """
    largest = max((abs(value) for value in values if value is not None), default=nan) or 1.0
    lines = []
    for block, value in enumerate(values):
        if value is not None:
            bar = ("█" if value >= 0 else "▒") * round(width * abs(value) / largest)
            error = errors[block]
            lines.append(f"{block:>3}  {bar}  {value:+.3g}" + (f" ± {error:.2g}" if error else ""))
    return lines
