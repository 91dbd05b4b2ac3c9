"""Layer contribution, with its standard error: arithmetic in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from peft_onelayer.statistics import Z_95, why_no_share


class LayerContribution(NamedTuple):
    """C of one block.

    Attributes:
        value: C; None where it is undefined.
        standard_error: of C; None where C is undefined or there are fewer than two problems.
        reason: why C is undefined; None where it is defined.
    """

    value: float | None
    standard_error: float | None
    reason: str | None = None


def layer_contribution(layer: ArrayLike, base: ArrayLike, full: ArrayLike) -> LayerContribution:
    """Return C = (S_layer - S_base) / (S_full - S_base) of arXiv 2607.01232 and its standard error.

    S is the mean over problems and, where there are several, over training seeds. C is undefined, never divided
    through, unless the 95 % interval of S_full - S_base lies above 0: where full equals base within noise there is no
    gain to take a share of, and where full ended below it, the block that lost most would have the highest C.

    The standard error is that of the linearized ratio. With D = S_full - S_base, a_p and b_p the gains of layer and
    full on problem p (means over seeds), and r_p = (a_p - C b_p) / D,

        se^2 = var(r_p) / P + (V(layer) + C^2 V(full)) / D^2

    for P problems: problems are paired, seeds are independent. V is the variance of a mean over K seeds that comes from
    the seeds themselves, the problems held fixed (two-way analysis of variance with one score per cell):
    V = max(0, MS_seeds - MS_residual) / (P K), and 0 for one seed, whose spread cannot be known. The linearization is
    good where D is many standard errors; near the limit of being defined it is too small.

    Args:
        layer: scores of the model of which this layer was trained: one per problem (P,), or per training seed and
            problem (K, P); a single number is a mean whose noise is not known.
        base: scores of the untrained model on the same problems in the same order, (P,) or a number.
        full: scores after training every parameter, as `layer`, not necessarily from as many seeds.

    Raises:
        ValueError: numbers of problems that differ, no scores, or scores that are not finite.

    >>> round(layer_contribution(51.8, base=44.1, full=50.8).value, 2)  # Qwen3-1.7B-Base, block 10: 7.7 / 6.7
    1.15
    >>> c = layer_contribution([1, 0, 1, 1], base=[0, 0, 1, 0], full=[1, 1, 1, 1])  # gains .5 and .75
    >>> round(c.value, 3), round(c.standard_error, 3)
    (0.667, 0.314)
    >>> layer_contribution([1, 1, 0, 1], base=[1, 0, 0, 1], full=[0, 1, 0, 1]).reason
    'full equals base within noise: the difference is +0.0000, its standard error 0.4082'
    """
    layer, base, full = _scores("layer", layer), _scores("base", base), _scores("full", full)
    if not layer.shape[1] == base.shape[1] == full.shape[1]:
        raise ValueError(
            "layer contribution needs the same problems for layer, base and full; got "
            f"{layer.shape[1]}, {base.shape[1]} and {full.shape[1]} scores"
        )
    difference, error = gain(full, base)
    if reason := why_no_share(difference, error):
        return LayerContribution(None, None, reason)
    a, b = layer.mean(0) - base.mean(0), full.mean(0) - base.mean(0)  # (P,)
    c = float(a.mean() / difference)
    if error is None:
        return LayerContribution(c, None)
    variance = _mean_variance(a - c * b) + _seed_variance(layer) + c**2 * _seed_variance(full)
    return LayerContribution(c, math.sqrt(variance) / difference)


def gain(after: ArrayLike, before: ArrayLike) -> tuple[float, float | None]:
    """Return the difference of two mean scores and its standard error, problems paired and seeds independent.

    Args:
        after: (P,) or (K, P), as in `layer_contribution`.
        before: likewise.

    Returns:
        mean(after) - mean(before), and the error; None with fewer than two problems.

    >>> gain([[1.0, 0.5], [1.0, 0.5]], [0.5, 0.5])
    (0.25, 0.25)
    """
    after, before = _scores("after", after), _scores("before", before)
    if after.shape[1] != before.shape[1]:
        raise ValueError(f"a gain needs the same problems, got {after.shape[1]} and {before.shape[1]} scores")
    differences = after.mean(0) - before.mean(0)
    if differences.size < 2:
        return float(differences.mean()), None
    variance = _mean_variance(differences) + _seed_variance(after) + _seed_variance(before)
    return float(differences.mean()), math.sqrt(variance)


def not_told_apart(order: Sequence[int], scores: Mapping[int, ArrayLike]) -> list[int]:
    """The blocks whose paired difference from the best has 0 in its 95 % interval, the best included.

    Two seeds hardly know their own spread: a block whose two happen to agree would seem free of noise, and one whose
    two happen to differ could not be told from anything. So the seeds' variance is pooled over all blocks that were
    measured with several seeds, each weighted by its seeds less one: of a mean over K seeds it is
    max(0, mean of (MS_seeds - MS_residual) / P) / K, with the mean squares of `layer_contribution`.

    Args:
        order: the blocks, best first.
        scores: of each block, as `layer` of `layer_contribution`.

    Returns:
        Blocks in the given order.

    >>> of_two_seeds = {3: [[0.9, 0.9], [0.9, 0.9]], 5: [[0.85, 0.85], [0.85, 0.85]], 0: [[0.5, 0.5], [0.7, 0.7]]}
    >>> not_told_apart([3, 5, 0], of_two_seeds)
    [3, 5]
    """
    found = {k: _scores(f"block {k}", scores[k]) for k in order}
    spread = _pooled_spread(found.values())

    def behind(k: int) -> bool:
        differences = found[order[0]].mean(0) - found[k].mean(0)
        variance = spread / len(found[order[0]]) + spread / len(found[k])
        variance += _mean_variance(differences) if differences.size > 1 else 0.0
        return float(differences.mean()) > Z_95 * math.sqrt(variance)

    return [k for k in order if k == order[0] or not behind(k)]


def _scores(name: str, values: ArrayLike) -> np.ndarray:
    """(K, P) float64."""
    scores = np.atleast_2d(np.asarray(values, dtype=float))
    if scores.ndim != 2 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(
            f"{name} must hold finite scores, one per problem or one per seed and problem; got shape {np.shape(values)}"
        )
    return scores


def _mean_variance(values: np.ndarray) -> float:
    """Variance of the mean of a sample."""
    return float(values.var(ddof=1) / values.size)


def _seed_variance(scores: np.ndarray) -> float:
    """V of `layer_contribution` for scores (K, P)."""
    return _pooled_spread([scores]) / len(scores)


def _pooled_spread(blocks: Iterable[np.ndarray]) -> float:
    """Variance of one run's mean that comes from its seed, of the (K, P) scores of several blocks; 0 without seeds."""
    several = [scores for scores in blocks if min(scores.shape) > 1]
    freedom = sum(len(scores) - 1 for scores in several)
    return max(0.0, sum((len(scores) - 1) * _spread(scores) for scores in several) / freedom) if several else 0.0


def _spread(scores: np.ndarray) -> float:
    """(MS_seeds - MS_residual) / P for scores (K, P), below 0 by chance."""
    seeds, problems = scores.shape
    of_seed, of_problem = scores.mean(1, keepdims=True), scores.mean(0, keepdims=True)
    residual = scores - of_seed - of_problem + scores.mean()
    between = problems * float(of_seed.var(ddof=1))
    within = float((residual**2).sum()) / ((seeds - 1) * (problems - 1))
    return (between - within) / problems
