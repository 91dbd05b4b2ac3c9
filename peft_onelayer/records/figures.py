"""A score with its standard error, before and after, and what the completions behind it look like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompletionStatistics:
    """Of the completions behind a score.

    Attributes:
        completions: their number.
        mean_length: tokens that the model generated, on average.
        cut: share that did not end by itself and was cut at the token limit.
        no_answer: share in which the task found no answer; None for a task that does not say what an answer is.
    """

    completions: int
    mean_length: float
    cut: float
    no_answer: float | None = None


@dataclass(frozen=True)
class Figures:
    """A mean over problems.

    Attributes:
        mean: reward.
        standard_error: of the mean over problems; None for a single problem.
        tokens_generated: of all completions; None of a difference.
        seconds: that the measurement took; None of a difference.
        over_limit: completions that the reward stopped scoring at its limit and that count 0; None of a difference.
        completions: what the completions behind the mean look like; None of a difference.
    """

    mean: float
    standard_error: float | None
    tokens_generated: int | None = None
    seconds: float | None = None
    over_limit: int | None = None
    completions: CompletionStatistics | None = None

    @classmethod
    def of(cls, mean: float, error: float, **more: Any) -> Figures:
        """With the error of a single problem, NaN, as None: JSON has no NaN."""
        return cls(mean, None if math.isnan(error) else error, **more)


@dataclass(frozen=True)
class Measured:
    """One decoding mode.

    Attributes:
        n: number of problems.
        samples: completions of each.
        base: of the base.
        adapter: of the base with the adapter; None without one.
        difference: adapter minus base, paired by problem.
        watched: problems among them by which a run chose the step whose state was measured; None where none are.
        unwatched: without these problems, the difference, or the score where no adapter was measured; None where none
            are watched, or all.
    """

    n: int
    samples: int
    base: Figures
    adapter: Figures | None = None
    difference: Figures | None = None
    watched: int | None = None
    unwatched: Figures | None = None


def about_watched(results: Mapping[str, Measured]) -> str | None:
    """One sentence where a run chose its state by some of the problems, so that their scores are on the high side.

    Args:
        results: of one task, by what they are called.
    """
    first = next(iter(results.values()))
    if not first.watched:
        return None
    what = "score" if first.difference is None else "difference"
    sign = "" if first.difference is None else "+"
    rest = ", ".join(
        f"{with_error(measured.unwatched, sign)} ({name})" for name, measured in results.items() if measured.unwatched
    )
    without = f"; on the other {first.n - first.watched} the {what} is {rest}" if rest else ""
    return (
        f"{first.watched} of the {first.n} problems chose the step whose state was kept, so that their scores are on "
        f"the high side{without}."
    )


def with_error(figures: Figures, sign: str = "") -> str:
    """A mean and its standard error, "0.5000 ± 0.0200"; `sign` "+" gives a sign to means above 0, too."""
    error = figures.standard_error
    return f"{figures.mean:{sign}.4f} ± {'?' if error is None else f'{error:.4f}'}"
