"""What several parts share of statistics: points of distributions, the rank correlation of two profiles, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959964  # two-sided 95 % point of the normal distribution


def student_point(z: float, freedom: int) -> float:
    """The point of Student's t distribution beyond which as much lies as beyond `z` of the normal distribution: how
    many standard errors a mean has to be, where the error is estimated from few values.

    Args:
        z: above 0.
        freedom: degrees of freedom, from 1: the number of values minus 1.

    >>> round(student_point(Z_95, 7), 3), round(student_point(Z_95, 10_000), 3)
    (2.365, 1.96)
    """
    inside, odd = math.erf(z / math.sqrt(2)), freedom % 2

    def share(angle: float) -> float:
        """Of the distribution, within +- tan(angle) * sqrt(freedom), by Abramowitz and Stegun 26.7.3 and 26.7.4."""
        cosine, total = math.cos(angle), 0.0
        term = cosine if odd else 1.0
        for k in range(1 + odd, freedom, 2):
            total += term
            term *= cosine**2 * k / (k + 1)
        total *= math.sin(angle)
        return (angle + total) * 2 / math.pi if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < inside else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def rank_correlation(a: Sequence[float | None], b: Sequence[float | None]) -> float | None:
    """Return Spearman's rank correlation: Pearson's correlation of the ranks, ties sharing the mean of their ranks.

    Positions at which either is None (a layer not measured, a contribution undefined) are left out before ranking.

    Returns:
        A number from -1 to 1; None where it is undefined: fewer than two positions left, or one side all tied.

    Raises:
        ValueError: of different lengths, or NaN or infinite.

    >>> rank_correlation([1.0, 2.0, 3.0, None], [10.0, 30.0, 20.0, 0.0])
    0.5
    >>> rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    True
    """
    if len(a) != len(b):
        raise ValueError(f"a rank correlation needs two sequences of one length, got {len(a)} and {len(b)}")
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not all(math.isfinite(x) and math.isfinite(y) for x, y in pairs):
        raise ValueError("a rank correlation needs finite numbers (or None where there is none), got NaN or infinity")
    if len(pairs) < 2:
        return None
    # Twice the ranks around their mean are whole numbers, so that everything but the last division is exact.
    x, y = (_ranks(values) for values in zip(*pairs, strict=True))
    spread = float(x @ x) * float(y @ y)
    return float(x @ y) / math.sqrt(spread) if spread else None


def why_no_share(gain: float, error: float | None) -> str | None:
    """Return why there is no share of a gain of all parameters to take; None where it is above 0 beyond noise.

    Args:
        gain: S_full - S_base.
        error: its standard error; None where it is not known.

    >>> why_no_share(-0.167, 0.02)
    'all parameters ended below the base (-0.1670 ± 0.0200), so there is no gain to take a share of'
    >>> why_no_share(0.167, 0.02) is None
    True
    """
    noise = Z_95 * (error or 0.0)
    if gain > noise:
        return None
    if gain < -noise:
        within = "" if error is None else f" ± {error:.4f}"
        return f"all parameters ended below the base ({gain:+.4f}{within}), so there is no gain to take a share of"
    known = "" if error is None else f", its standard error {error:.4f}"
    return f"full equals base within noise: the difference is {gain:+.4f}{known}"


def gain_of_rounds(rounds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The gain after the last round's updates, from all rounds, and its standard error: a gain that grows with the
    updates, fitted by least squares with the inverse variances as weights.

    Where there is no gain it errs as rarely as the plain sum of the rounds; where there is one it sees more, since a
    round with few prompts counts for little.

    Args:
        rounds: of each [updates so far, gain, its standard error above 0].

    >>> gain, error = gain_of_rounds([[4, 0.1, 0.1], [8, 0.2, 0.1]])
    >>> round(gain, 12), round(error, 3)
    (0.2, 0.089)
    """
    updates, gains, errors = (np.array(values, dtype=float) for values in zip(*rounds, strict=True))
    share = updates / updates[-1]
    information = float((share**2 / errors**2).sum())
    return float((share * gains / errors**2).sum()) / information, information**-0.5


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Twice the ranks, minus their mean: how many are smaller minus how many are larger."""
    v = np.asarray(values, dtype=float)
    return np.sign(v[:, None] - v[None, :]).sum(1)
