"""How commands print a score and what the completions behind it look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ._output import print_table

if TYPE_CHECKING:
    from peft_onelayer.records.figures import Figures


def score(figures: Figures | None, sign: str = "") -> str:
    """A mean and its standard error."""
    if figures is None:
        return ""
    error = "?" if figures.standard_error is None else f"{figures.standard_error:.4f}"
    return f"{figures.mean:{sign}.4f} ± {error}"


def print_completions(described: Mapping[str, Figures | None]) -> None:
    """A table of the completions behind each score, by its name."""
    rows = []
    for name, figures in described.items():
        if figures is not None and (seen := figures.completions) is not None:
            found = "-" if seen.no_answer is None else f"{seen.no_answer:.1%}"
            rows.append([name, f"{seen.mean_length:.1f}", f"{seen.cut:.1%}", found])
    if rows:
        print_table("completions", ["", "tokens", "cut at the limit", "no answer"], rows)
