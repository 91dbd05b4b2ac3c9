"""From evaluations of a base and of what training made of it to the figures of a record."""

from __future__ import annotations

from peft_onelayer.records.figures import Figures, Measured
from peft_onelayer.rollouts.evaluation import Evaluation, paired_difference

Timed = tuple[Evaluation, float]  # with the seconds that it took


def measured(before: Timed, after: Timed | None) -> Measured:
    """The figures of one decoding mode, the difference paired by problem."""
    base = before[0]
    if after is None:
        return Measured(base.n, base.samples, _figures(*before))
    difference = Figures.of(*paired_difference(after[0], base))
    return Measured(base.n, base.samples, _figures(*before), _figures(*after), difference)


def _figures(evaluation: Evaluation, seconds: float) -> Figures:
    return Figures.of(
        evaluation.mean,
        evaluation.standard_error,
        tokens_generated=evaluation.tokens_generated,
        seconds=seconds,
        over_limit=evaluation.over_limit,
        completions=evaluation.completions,
    )
