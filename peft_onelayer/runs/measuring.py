"""From evaluations of a base and of what training made of it to the figures of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peft_onelayer.records.figures import Figures, Measured
from peft_onelayer.rollouts.evaluation import Evaluation, paired_difference

Timed = tuple[Evaluation, float]  # with the seconds that it took


def measured(before: Timed, after: Timed | None, watched: Sequence[bool] = ()) -> Measured:
    """The figures of one decoding mode, the difference paired by problem.

    Args:
        watched: of each problem, whether it chose the state that was measured; empty for none.
    """
    base, trained = before[0], after[0] if after else None
    found = Measured(
        base.n,
        base.samples,
        _figures(*before),
        _figures(*after) if after else None,
        _gain(base, trained) if trained else None,
    )
    if not any(watched):
        return found
    others = [i for i, seen in enumerate(watched) if not seen]
    unwatched = _gain(_part(base, others), _part(trained, others) if trained else None) if others else None
    return replace(found, watched=sum(watched), unwatched=unwatched)


def _gain(base: Evaluation, trained: Evaluation | None) -> Figures:
    """The difference; without a trained model the score."""
    return Figures.of(*(paired_difference(trained, base) if trained else (base.mean, base.standard_error)))


def _part(evaluation: Evaluation, which: Sequence[int]) -> Evaluation:
    """The scores of some of the problems."""
    problems, scores = evaluation.problems, evaluation.scores
    return Evaluation(tuple(problems[i] for i in which), tuple(scores[i] for i in which), evaluation.samples)


def _figures(evaluation: Evaluation, seconds: float) -> Figures:
    return Figures.of(
        evaluation.mean,
        evaluation.standard_error,
        tokens_generated=evaluation.tokens_generated,
        seconds=seconds,
        over_limit=evaluation.over_limit,
        completions=evaluation.completions,
    )
