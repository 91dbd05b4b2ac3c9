"""How commands print a score, what the completions behind it look like, and a finished run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peft_onelayer.records.text import name_blocks

from ._output import print_line, print_table

if TYPE_CHECKING:
    from peft_onelayer.records.figures import CompletionStatistics, Figures, Measured
    from peft_onelayer.records.run import RunRecord


def score(figures: Figures | None, sign: str = "") -> str:
    """A mean and its standard error."""
    from peft_onelayer.records.figures import with_error

    return "" if figures is None else with_error(figures, sign)


def print_completions(described: Mapping[str, CompletionStatistics | None], where: str = "") -> None:
    """A table of the completions behind each score, by its name."""
    rows = []
    for name, seen in described.items():
        if seen is not None:
            found = "-" if seen.no_answer is None else f"{seen.no_answer:.1%}"
            rows.append([name, f"{seen.mean_length:.1f}", f"{seen.cut:.1%}", found])
    if rows:
        print_table(f"completions{where}", ["", "tokens", "cut at the limit", "no answer"], rows)


def print_held_out(results: Mapping[str, Measured]) -> None:
    """What base and trained model scored on held-out problems of each task."""
    if not results:
        return
    rows = [[task, str(m.n), score(m.base), score(m.adapter), score(m.difference, "+")] for task, m in results.items()]
    print_table("held-out problems", ["", "n", "base", "trained", "difference"], rows)
    print_completions(
        {
            f"{task}, {name}": figures.completions
            for task, m in results.items()
            for name, figures in (("base", m.base), ("trained", m.adapter))
            if figures is not None
        },
        " of held-out problems",
    )
    print_line("Mean reward ± its standard error over the n problems, paired by problem.")


def print_run(run: RunRecord, out: Path) -> None:
    """What a training run did, and what it was worth."""
    settings, results = run.settings, run.results
    assert results is not None
    blocks = "all blocks" if run.layers is None else name_blocks(run.layers)
    print_table(
        f"{settings.algorithm} on {settings.source.name}",
        ["", ""],
        [
            ["trained", f"{blocks} of {settings.model.num_layers}"],
            ["steps", str(results.steps)],
            _first_and_last("reward", results.rewards) if results.rewards else _first_and_last("loss", results.losses),
            *(
                [f"tokens {what}", f"{count:,}"]
                for what, count in (("generated", results.tokens_generated), ("trained on", results.tokens_trained))
                if count  # 0 where they were not counted
            ),
            ["time", f"{results.seconds:.0f} s"],
        ],
    )
    if results.completions:
        print_completions({"all": results.completions}, " in training")
    held_out = {settings.source.name: results.held_out} if results.held_out else {}
    print_held_out(held_out | (results.also or {}))
    if results.kept_step is not None:
        print_line(f"Kept: the state after step {results.kept_step}, which scored best on held-out problems.")
    if results.verdict:
        print_line(f"Verdict: {results.verdict}.")
    if results.stopped:
        print_line(f"The run {results.stopped}.")
    print_line(f"Written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))


def _first_and_last(name: str, values: list[float]) -> list[str]:
    """What the first and the last tenth of the run had on average."""
    tenth = max(1, len(values) // 10)
    first, last = statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])
    return [f"mean {name} in training", f"{first:.3g} -> {last:.3g} (first and last {tenth} of {len(values)} logs)"]
