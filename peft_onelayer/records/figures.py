"""A score with its standard error, before and after, and what the completions behind it look like."""

from __future__ import annotations

import math
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
    """

    n: int
    samples: int
    base: Figures
    adapter: Figures | None = None
    difference: Figures | None = None
