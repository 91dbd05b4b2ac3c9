"""PNG plots: the reward of a run, a ranking of layers, a sweep's profile. matplotlib is imported when one is drawn."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import Any

from peft_onelayer.records.files import whole_file
from peft_onelayer.records.ranking import LayerRanking

INTERVALS = "bars: 95 % intervals"
OF_RACE = "± from the mean"  # a race's errors are of the difference from the mean of all blocks
BLUE, ORANGE, GREY = "#3465a4", "#d9730d", "#9aa0a6"


@contextmanager
def as_given() -> Iterator[None]:
    """Within it texts are drawn as they are: matplotlib reads a formula between two `$`, which a name may hold. A
    character that its font lacks is a box, without a warning for each."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _within(title: str) -> str:
    """A title in lines that a plot has room for."""
    return textwrap.fill(" ".join(title.split()), 60, max_lines=3, placeholder=" ...")


def new_figure(width: float = 7.0, height: float = 3.6):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no window system, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    return figure, axes


@as_given()
def plot_rewards(
    rewards: Sequence[float], path: Path, title: str, window: int = 10, steps: Sequence[int] | None = None
) -> None:
    """Draw the mean reward of every step, or of `steps`, and its running mean over the last `window` of them."""
    figure, axes = new_figure()
    running = [sum(rewards[max(0, i - window) : i]) / min(i, window) for i in range(1, len(rewards) + 1)]
    each, steps = "each log with one" if steps else "each step", steps or range(1, len(rewards) + 1)
    axes.plot(steps, rewards, color=BLUE, alpha=0.35, linewidth=1, label=each)
    axes.plot(steps, running, color=BLUE, linewidth=2, label=f"mean of the last {window}")
    axes.set(title=_within(title), xlabel="step", ylabel="mean reward")
    if min(rewards) >= 0 and max(rewards) <= 1:
        axes.set_ylim(0, 1)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


@as_given()
def plot_ranking(ranking: LayerRanking, path: Path, title: str) -> None:
    """Draw the ranked layers' scores, with 95 % intervals where there are errors; the pick and its ties in colour."""
    figure, axes = new_figure()
    layers = sorted(ranking.order)
    scale = 100 if ranking.measured else 1
    scores = [scale * (ranking.scores[layer] or 0.0) for layer in layers]
    errors = [196 * (ranking.errors[layer] or 0.0) for layer in layers]
    colours = [ORANGE if layer == ranking.pick else BLUE if layer in ranking.tied else GREY for layer in layers]
    axes.bar(layers, scores, yerr=errors, color=colours, error_kw={"ecolor": "#444444", "capsize": 2, "linewidth": 1})
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.set_xticks(layers)
    axes.set(title=_within(title), xlabel="block", ylabel="accuracy gained (points)" if ranking.measured else "score")
    if any(errors):
        label = f"{INTERVALS} of the difference from the mean" if ranking.rounds else INTERVALS
        axes.errorbar([], [], yerr=[], color="none", ecolor="#444444", capsize=2, label=label)
    for colour, label in ((ORANGE, "pick"), (BLUE, "tied with the best (95 %)"), (GREY, "behind the best")):
        if colour in colours:
            axes.bar([layers[0]], [0], color=colour, label=label)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    _save(figure, path)


def shown(ranking: LayerRanking) -> tuple[str, Sequence[float | None], Sequence[float | None]]:
    """What ranks the blocks: what it is, its values (`LayerRanking.worth`) and their standard errors."""
    sweep = ranking.sweep
    if sweep and not sweep.undefined:
        nothing: list[float | None] = [None] * ranking.num_layers
        return "layer contribution C of each block", sweep.contribution, sweep.contribution_errors or nothing
    of_race = f", {OF_RACE}" if ranking.rounds else ""
    what = f"what each block {'gains' if sweep or ranking.measured else 'scores'}{of_race}"
    return what, ranking.scores, ranking.errors


@as_given()
def plot_profile(profile: LayerRanking, path: Path, title: str) -> None:
    """Draw each layer's contribution with 95 % intervals against full (1) and base (0); gains where C is undefined."""
    figure, axes = new_figure()
    sweep = profile.sweep
    assert sweep is not None
    what, values, errors = shown(profile)
    axes.errorbar(
        range(len(values)),
        [nan if value is None else value for value in values],  # a line joins no blocks across one not measured
        yerr=[1.96 * (error or 0.0) for error in errors],
        color=BLUE,
        marker="o",
        markersize=4,
        linewidth=1,
        ecolor="#444444",
        capsize=2,
        label=f"one block trained; {INTERVALS}" if any(errors) else "one block trained",
    )
    axes.axhline(0, color=GREY, linewidth=1, label="base")
    full = sweep.full_gain[0] if sweep.undefined and sweep.full_gain else 1.0
    axes.axhline(full, color=ORANGE, linewidth=1, label="every parameter trained")
    axes.set(title=_within(title), xlabel="block", ylabel=what)
    axes.set_xticks([k for k, value in enumerate(values) if value is not None])
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write a PNG in one piece: what a full disk cuts short is no plot."""
    with whole_file(path) as partial:
        figure.savefig(partial, format="png")
