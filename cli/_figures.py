"""How commands print a score and what the completions behind it look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ._output import print_line, print_table

if TYPE_CHECKING:
    from peft_onelayer.records.figures import CompletionStatistics, Figures, Measured


def score(figures: Figures | None, sign: str = "") -> str:
    """A mean and its standard error."""
    if figures is None:
        return ""
    error = "?" if figures.standard_error is None else f"{figures.standard_error:.4f}"
    return f"{figures.mean:{sign}.4f} ± {error}"


def print_completions(described: Mapping[str, CompletionStatistics | None]) -> None:
    """A table of the completions behind each score, by its name."""
    rows = []
    for name, seen in described.items():
        if seen is not None:
            found = "-" if seen.no_answer is None else f"{seen.no_answer:.1%}"
            rows.append([name, f"{seen.mean_length:.1f}", f"{seen.cut:.1%}", found])
    if rows:
        print_table("completions", ["", "tokens", "cut at the limit", "no answer"], rows)


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
        }
    )
    print_line("Mean reward ± its standard error over the n problems, paired by problem.")
