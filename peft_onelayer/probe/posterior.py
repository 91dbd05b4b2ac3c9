"""What measured gains, neighbours and the depth prior say together about every block: a Gaussian process over depth.

    value(k) = level + slope * prior(k) + smooth(k) + own(k)
    gain(k, round) = updates(round) * value(k) + offset(round) + noise(k, round)

`smooth` has a squared-exponential kernel, so that neighbours share strength; `own` is independent from block to block,
so that an isolated peak (a damaged block) is not smoothed away. Gains need not grow in proportion to the updates, for
which `offset`, common to a round, makes room. `noise` has the covariance that was measured: blocks scored on common
random numbers share much of it. The unit of all but the level is what the gains vary by beyond their noise (a method
of moments: with a dozen gains a likelihood says little about more than that).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LENGTH = 1 / 8  # of the depth: a correlation length of 1.5 of 12 blocks
SMOOTH, OWN = 0.8, 0.6  # standard deviations in units
SLOPE = 0.3, 0.3  # of the prior, which is scaled to standard deviation 1: mean and standard deviation in units
FLOOR = 1.0  # least unit, in standard errors
OFFSET = 0.5  # standard deviation of a round's offset, in its greatest gain
DRAWS = 4000


@dataclass(frozen=True)
class Posterior:
    """Joint belief about the values of all blocks.

    Attributes:
        mean: (L,) float64.
        covariance: (L, L) float64, without the noise of measuring.
    """

    mean: np.ndarray
    covariance: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """(L,) standard deviations."""
        return np.sqrt(np.diag(self.covariance))

    def draws(self, seed: int = 0) -> np.ndarray:
        """(DRAWS, L) samples of all gains together."""
        root = np.linalg.cholesky(self.covariance + 1e-12 * np.eye(len(self.mean)))
        return self.mean + np.random.default_rng(seed).standard_normal((DRAWS, len(self.mean))) @ root.T


@dataclass(frozen=True)
class Measured:
    """The gains of a round.

    Attributes:
        layers: (N,) the blocks.
        updates: that each has had.
        gains: (N,) float64.
        covariance: (N, N) float64, of their noise.
    """

    layers: list[int]
    updates: int
    gains: np.ndarray
    covariance: np.ndarray


def fit(prior: Sequence[float], rounds: Sequence[Measured]) -> Posterior:
    """The posterior of the gain per update of every block, measured or not.

    Args:
        prior: one per block, higher is better, in any unit; all equal for none.
        rounds: of which one has at least two blocks.

    >>> gains = Measured([0, 2, 4], 1, np.array([0.1, 0.3, 0.1]), 1e-4 * np.eye(3))
    >>> [round(float(x), 2) for x in fit([0.0] * 5, [gains]).mean]
    [0.1, 0.19, 0.3, 0.19, 0.1]
    """
    depth = len(prior)
    shape = np.asarray(prior, dtype=float)
    shape = (shape - shape.mean()) / (shape.std() or 1.0)
    unit = max(_unit(measured) for measured in rounds if len(measured.layers) > 1)
    y = np.concatenate([measured.gains for measured in rounds])
    rates = np.concatenate([measured.gains / measured.updates for measured in rounds])
    seen = np.zeros((len(y), depth))
    noise = np.zeros((len(y), len(y)))
    start = 0
    for measured in rounds:
        n = len(measured.layers)
        seen[np.arange(start, start + n), measured.layers] = measured.updates
        offset = OFFSET * np.abs(measured.gains).max()
        noise[start : start + n, start : start + n] = measured.covariance + offset**2
        start += n
    k = np.arange(depth, dtype=float)
    near = np.exp(-((k[:, None] - k) ** 2) / (2 * max(1.0, LENGTH * depth) ** 2))
    level = (10 * max(np.abs(rates).max(), unit)) ** 2  # wide: nothing is known of it
    kernel = level + unit**2 * (SMOOTH**2 * near + OWN**2 * np.eye(depth) + SLOPE[1] ** 2 * np.outer(shape, shape))
    expected = SLOPE[0] * unit * shape
    weights = np.linalg.solve(seen @ kernel @ seen.T + noise, seen @ kernel).T  # (L, N)
    return Posterior(expected + weights @ (y - seen @ expected), kernel - weights @ seen @ kernel)


def _unit(measured: Measured) -> float:
    """Standard deviation of the gains per update of a round beyond their noise, and at least a share of the noise."""
    n = len(measured.layers)
    within = np.eye(n) - 1 / n  # the round's mean says nothing of differences between blocks
    noise = float(np.trace(within @ measured.covariance)) / (n - 1)
    return float(np.sqrt(max(measured.gains.var(ddof=1) - noise, FLOOR**2 * noise))) / measured.updates
