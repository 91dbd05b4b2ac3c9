"""How far layer profiles agree on which blocks are worth training, with and without what depth alone explains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_onelayer.hub.profiles import load_profile
from peft_onelayer.probe.prior import depth_prior
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.statistics import Z_95, rank_correlation

ROUNDING = 1e-9  # of the largest value: residuals below it are what rounding leaves of 0


@dataclass(frozen=True)
class ProfileAgreement:
    """How far two profiles agree.

    Attributes:
        a: the first profile.
        b: the second.
        blocks: number of blocks that both measured.
        spearman: rank correlation of the two; None where it is undefined.
        interval: of it, at 95 %; None with fewer than four blocks, and where the correlation is 1 or -1.
        spearman_without_depth: the same of what is left of each once its least-squares fit of the depth prior and a
            constant is subtracted.
        interval_without_depth: of it.
        depth_a: rank correlation of the first profile with the depth prior.
        depth_b: the same of the second.
    """

    a: str
    b: str
    blocks: int
    spearman: float | None
    interval: list[float] | None
    spearman_without_depth: float | None
    interval_without_depth: list[float] | None
    depth_a: float | None
    depth_b: float | None


@dataclass(frozen=True)
class ProfileComparison:
    """Every pair of the profiles; `to_json` is what `onelayer compare --json` prints.

    Attributes:
        profiles: as they were given.
        pairs: one for each two of them, in order.
    """

    profiles: list[str]
    pairs: list[ProfileAgreement]

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {"format": "onelayer-comparison-1", "kind": "profiles", **asdict(self)}


def compare_profiles(profiles: Sequence[str | Path | LayerRanking]) -> ProfileComparison:
    """Measure how far layer profiles agree: Spearman's rank correlation, raw and with the depth trend removed.

    The interval is that of the correlation's Fisher transform with the variance (1 + r^2 / 2) / (n - 3) (Bonett and
    Wright, Psychometrika 2000), and n - 4 where the depth trend is removed. It takes the blocks for a sample of
    independent ones, which neighbours are not: it is too narrow.

    Args:
        profiles: two or more: what `load_profile` takes, or profiles that are loaded already.

    Returns:
        One `ProfileAgreement` for each two profiles, over the blocks that both measured.

    Raises:
        ValueError: fewer than two, no such profile, or models of different depth.
    """
    if len(profiles) < 2:
        raise ValueError(f"a comparison needs two profiles or more, and {len(profiles)} was given.")
    names = [profile.model if isinstance(profile, LayerRanking) else str(profile) for profile in profiles]
    loaded = [profile if isinstance(profile, LayerRanking) else load_profile(str(profile)) for profile in profiles]
    for name, profile in zip(names, loaded, strict=True):
        if profile.num_layers != loaded[0].num_layers:
            raise ValueError(
                f"{names[0]} is of a model of {loaded[0].num_layers} blocks and {name} of one of "
                f"{profile.num_layers}: profiles are compared block by block."
            )
    pairs = [
        _agreement(names[i], names[j], loaded[i].worth, loaded[j].worth)
        for i, j in itertools.combinations(range(len(names)), 2)
    ]
    return ProfileComparison(names, pairs)


def spearman_interval(correlation: float | None, n: int, removed: int = 0) -> list[float] | None:
    """The 95 % interval of a rank correlation of `n` pairs, `removed` trends subtracted before; see `compare_profiles`.

    >>> [round(end, 2) for end in spearman_interval(0.5, 28)]
    [0.13, 0.75]
    """
    freedom = n - 3 - removed
    if correlation is None or freedom < 1 or abs(correlation) >= 1:
        return None
    centre = math.atanh(correlation)
    half = Z_95 * math.sqrt((1 + correlation**2 / 2) / freedom)
    return [math.tanh(centre - half), math.tanh(centre + half)]


def _agreement(a: str, b: str, worth_a: Sequence[float | None], worth_b: Sequence[float | None]) -> ProfileAgreement:
    both = [k for k, (x, y) in enumerate(zip(worth_a, worth_b, strict=True)) if x is not None and y is not None]
    bump = depth_prior(len(worth_a))
    depth = np.array([bump[k] for k in both])
    values = [np.array([worth[k] for k in both], dtype=float) for worth in (worth_a, worth_b)]
    raw = rank_correlation(*(list(v) for v in values))
    rest = rank_correlation(*(_without_trend(v, depth) for v in values))
    depth_a, depth_b = (rank_correlation(list(v), list(depth)) for v in values)
    return ProfileAgreement(
        a=a,
        b=b,
        blocks=len(both),
        spearman=raw,
        interval=spearman_interval(raw, len(both)),
        spearman_without_depth=rest,
        interval_without_depth=spearman_interval(rest, len(both), removed=1),
        depth_a=depth_a,
        depth_b=depth_b,
    )


def _without_trend(values: np.ndarray, depth: np.ndarray) -> list[float]:
    """What the least-squares fit of a constant and `depth` leaves of `values`, (n,) both."""
    if not values.size:
        return []
    design = np.stack([np.ones_like(depth), depth], axis=1)
    rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    rest[np.abs(rest) <= ROUNDING * np.abs(values).max()] = 0.0
    return rest.tolist()
