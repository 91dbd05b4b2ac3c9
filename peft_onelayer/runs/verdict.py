"""What a run came to, in a sentence, from what was measured on held-out problems; and whether a reward has fallen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from peft_onelayer.records.figures import Figures
from peft_onelayer.rollouts.evaluation import Evaluation
from peft_onelayer.statistics import Z_95, student_point

WINDOW = 10  # rewards at the start and at the end of a training curve that are compared
FALLEN = 0.5  # of the reward at the start
ERRORS = 3.0  # standard errors that a fall has to be; of few problems more, by Student's t distribution
FEWEST = 8  # problems of a claim: fewer hardly know their own spread, and may have none
SAME = 0.9  # share of completions that are the base's word for word: the policy did not move
EQUAL = 0.8  # share of prompts whose completions all get one reward: they teach nothing


def verdict(difference: Figures, n: int, *, same: float, prompts: int | None = None, equal: float | None = None) -> str:
    """What a difference between trained model and base on `n` held-out problems means: a gain or a loss where it is
    beyond 95 % of Student's t distribution, of `FEWEST` problems and more.

    Args:
        difference: trained minus base, paired by problem.
        same: share of the trained model's completions that equal the base's.
        prompts: of an optimizer step; None where the algorithm samples none.
        equal: share of the training prompts whose completions all got the same reward; None where not known.
    """
    points, error = difference.mean, difference.standard_error
    noise = f" ± {error:.4f}" if error is not None else ""
    measured = f"{points:+.4f}{noise} on {n} held-out problems"
    if error is None or n < FEWEST:
        return (
            f"nothing can be said: {measured}, and fewer than {FEWEST} tell nothing; raise --eval-problems, where the "
            "test split has more"
        )
    beyond = student_point(Z_95, n - 1) * error
    if points > beyond:
        return f"gained: {measured}"
    if points < -beyond:
        return (
            f"got worse: {measured}; take a smaller --learning-rate or more --prompts a step, and keep the best state "
            "with --eval-every"
        )
    return f"nothing changed beyond noise: {measured}; the likely reason: {_reason(beyond, same, prompts, equal)}"


def _reason(beyond: float, same: float, prompts: int | None, equal: float | None) -> str:
    if same >= SAME:
        return (
            f"the rate: {same:.0%} of the completions are the base's word for word, so the policy hardly moved; "
            "raise --learning-rate or --steps"
        )
    if equal is not None and equal >= EQUAL:
        return (
            f"the reward: for {equal:.0%} of the prompts all completions got the same reward, which teaches nothing; "
            "take a task that is neither too easy nor too hard, or raise --completions"
        )
    if prompts is not None and prompts < 4:
        return f"the batch: {prompts} prompts a step are mostly noise; raise --prompts"
    seen = f", and a gain below {beyond:.3f} cannot be seen on so few problems" if beyond else ""
    return (
        "too few steps, the rate or the block, which nothing here tells apart: completions changed, but are no better"
        f"{seen}; raise --steps or --learning-rate, train another --layer, or raise --eval-problems"
    )


def same_completions(a: Evaluation, b: Evaluation) -> float:
    """The share of the completions of the same problems and samples that two models wrote alike."""
    pairs = [(x, y) for i, j in zip(a.rollouts, b.rollouts, strict=True) for x, y in zip(i, j, strict=True)]
    return statistics.fmean(x.ids == y.ids for x, y in pairs)


def fallen(rewards: Mapping[int, float]) -> str | None:
    """Why a run that logged these mean rewards, by step, is lost; None while it is not.

    It is when the mean of the last `WINDOW` lies below `FALLEN` of the first ones', by more than `ERRORS` standard
    errors of their difference. Rewards that are not above 0 at the start, and the first two windows, tell nothing.

    >>> fallen(dict(enumerate([0.5] * 10 + [0.01] * 9, start=1))) is None
    True
    >>> fallen(dict(enumerate([0.5, 0.52] * 5 + [0.01, 0.02] * 5, start=1)))
    'the mean reward fell from 0.51 (first 10 steps) to 0.015 (last 10)'
    >>> fallen({4 * k + 1: reward for k, reward in enumerate([0.5, 0.52] * 5 + [0.01, 0.02] * 5)})
    'the mean reward fell from 0.51 (first 10 rewards, to step 37) to 0.015 (last 10, to step 77)'
    """
    if len(rewards) < 2 * WINDOW:
        return None
    steps, values = list(rewards), list(rewards.values())
    first, last = values[:WINDOW], values[-WINDOW:]
    start, end = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / WINDOW)
    if start > 0 and end < FALLEN * start and start - end > ERRORS * error:
        if _every_step(steps):
            return f"the mean reward fell from {start:.3g} (first {WINDOW} steps) to {end:.3g} (last {WINDOW})"
        return (
            f"the mean reward fell from {start:.3g} (first {WINDOW} rewards, to step {steps[WINDOW - 1]}) to {end:.3g} "
            f"(last {WINDOW}, to step {steps[-1]})"
        )
    return None


def _every_step(steps: list[int]) -> bool:
    """Whether each step has logged a reward: not where several train on one generation, or with `logging_steps`."""
    return steps == list(range(1, len(steps) + 1))


def below_start(rewards: Mapping[int, float], base: Evaluation) -> str | None:
    """Why a run is lost that fell in its first steps, so that `fallen` has no height to compare with; None where it is
    not: as `fallen`, against the base's score on held-out problems.

    These are others than the run's prompts and may be easier, so the last rewards must also lie below `FALLEN` of the
    first one, which is of completions of what the run starts from.
    """
    if len(rewards) < WINDOW or base.n < FEWEST:
        return None
    steps, values = list(rewards), list(rewards.values())
    first, last = values[0], values[-WINDOW:]
    end = statistics.fmean(last)
    error = math.hypot(base.standard_error, math.sqrt(statistics.variance(last) / WINDOW))
    beyond = student_point(ERRORS, base.n - 1) * error
    if base.mean > 0 and end < FALLEN * min(base.mean, first) and base.mean - end > beyond:
        where = "steps", "first step"
        if not _every_step(steps):
            where = f"rewards, to step {steps[-1]}", f"step {steps[0]}"
        return (
            f"the mean reward fell to {end:.3g} (last {WINDOW} {where[0]}) from {first:.3g} ({where[1]}); the base's "
            f"score on {base.n} held-out problems is {base.mean:.3g}"
        )
    return None


def far_below(difference: Figures, base: Evaluation, after: Evaluation) -> str | None:
    """Why a model that scores so on held-out problems is lost; None where it is not. As `fallen`, against the base."""
    error = difference.standard_error
    if error is None or base.n < FEWEST:
        return None
    if (
        base.mean > 0
        and after.mean < FALLEN * base.mean
        and -difference.mean > student_point(ERRORS, base.n - 1) * error
    ):
        return f"the score on {base.n} held-out problems fell from {base.mean:.3g} (the base's) to {after.mean:.3g}"
    return None
