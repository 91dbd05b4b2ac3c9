"""A PNG plot of what training changed: sparsity, size and rank of the change over the blocks, and its spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plots import BLUE, GREY, ORANGE, as_given


@as_given()
def plot_change(change: dict[str, Any], path: Path) -> None:
    """Draw an analysis.

    Args:
        change: the JSON object of `onelayer analyze --json`.
        path: the image, of a format by its suffix that matplotlib knows.

    Raises:
        ValueError: another suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 7.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(change["summary"], fontsize=9, wrap=True)
    (shares, sizes), (ranks, spectrum) = figure.subplots(2, 2)
    by_block = len(change["layers"]) > 2
    groups = change["layers" if by_block else "kinds"]
    ticks = [str(group["layer"]) if by_block else group["name"].rpartition("*.")[2] for group in groups]
    where, step = range(len(groups)), max(1, len(groups) // 12)
    for axes in (shares, sizes, ranks):
        turned = {} if by_block else {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(list(where)[::step], ticks[::step], fontsize=7, **turned)
        axes.set(xlabel="block" if by_block else "", xlim=(-0.6, len(groups) - 0.4))
    for tolerance, colour in (("0", BLUE), ("1e-05", ORANGE), ("0.0001", GREY)):
        label = "exactly" if tolerance == "0" else f"within {float(tolerance):.0e}"
        shares.plot(where, [group["unchanged"][tolerance] for group in groups], "o-", color=colour, label=label)
    official = [group["unchanged_official"]["1e-05"] for group in groups]
    shares.plot(where, official, "x", color="#444444", label="within 1e-05, in bfloat16")
    shares.set(title="share of entries unchanged", ylim=(-0.03, 1.03))
    sizes.bar(where, [group["norm"] for group in groups], color=BLUE)
    sizes.set(title="norm of the change")
    for name, colour in (("rank_share", BLUE), ("effective_rank_share", ORANGE)):
        known = [(i, group[name]) for i, group in enumerate(groups) if group[name] is not None]
        if known:
            label = name.removesuffix("_share").replace("_", " ")
            ranks.plot(*zip(*known, strict=True), "o-", color=colour, label=label)
    ranks.set(title="rank over the largest possible, mean of the matrices", ylim=(-0.03, 1.03))
    for tensor in _largest(change["tensors"]):
        values = tensor["singular_values"]
        spectrum.plot(range(1, len(values) + 1), [v / values[0] for v in values], "o-", label=tensor["name"])
    spectrum.set(title="largest singular values of the largest changes", xlabel="number", ylim=(0, 1.05))
    for axes in (shares, ranks, spectrum):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    for axes in (shares, sizes, ranks, spectrum):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _largest(tensors: Sequence[dict[str, Any]], count: int = 5) -> list[dict[str, Any]]:
    """The matrices with the largest changes."""
    measured = [tensor for tensor in tensors if tensor.get("singular_values")]
    return sorted(measured, key=lambda tensor: -tensor["norm"])[:count]
