"""From the gains of a race's candidates to its ranking: their noise, who is likely the best, ties, and the pick."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist, fmean

import numpy as np

from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.statistics import Z_95, gain_of_rounds

from .posterior import Measured, Posterior
from .settings import RaceSettings
from .updates import Candidate


def measured_rounds(candidates: Mapping[int, Candidate], settings: RaceSettings, reward_range: float) -> list[Measured]:
    """Each round's gains, with the covariance that their prompts show, for common prompts and random numbers.

    The unit is `reward_range`, the highest reward less the lowest, which is above 0.

    All pairs get one correlation: of each pair its prompts say little, and with fewer prompts than blocks the posterior
    would take some combination of gains for certain. A round with a single candidate is left out: there is nothing to
    compare with.
    """
    rounds = []
    for number in range(len(settings.round_shares)):
        layers = [k for k, c in sorted(candidates.items()) if number in c.gains]
        if len(layers) > 1:
            prompts = min(len(candidates[k].gains[number]) for k in layers)
            values = np.array([candidates[k].gains[number][:prompts] for k in layers]) / reward_range  # (N, prompts)
            # One completion, by the whole range, is the least noise: a few prompts may show none at all.
            covariance = np.cov(values) / prompts + np.eye(len(layers)) * (prompts * settings.samples) ** -2.0
            error = np.sqrt(np.diag(covariance))
            scale = np.outer(error, error)
            pairs = ~np.eye(len(layers), dtype=bool)
            covariance = np.where(pairs, max(0.0, (covariance / scale)[pairs].mean()) * scale, covariance)
            rounds.append(Measured(layers, settings.updates * (number + 1), values.mean(axis=1), covariance))
    return rounds


def likely_best(posterior: Posterior, layers: Sequence[int], n: int) -> list[int]:
    """The `n` of the layers that are the best of them most often in draws from the posterior, ascending."""
    chosen = list(layers)
    wins = np.bincount(posterior.draws()[:, chosen].argmax(axis=1), minlength=len(chosen))
    order = sorted(range(len(chosen)), key=lambda i: (-wins[i], -posterior.mean[chosen[i]]))
    return sorted(chosen[i] for i in order[:n])


def make_ranking(
    candidates: Mapping[int, Candidate],
    posterior: Posterior,
    layers: Sequence[int],
    settings: RaceSettings,
    reward_range: float,
    *,
    model: str,
    revision: str | None,
    method: str,
    learning_rate: float | None,
    cost: dict[str, float],
    task: str,
    seed: int,
) -> LayerRanking:
    """The ranking of `layers`, of which the candidates are those that ran.

    Args:
        posterior: in units of `reward_range`, as of `measured_rounds`; the ranking is in rewards.
        learning_rate: that the user gave the run, which no block's exceeds; None where the race decides.
    """
    most = math.inf if learning_rate is None else learning_rate
    num_layers = len(posterior.mean)
    draws = posterior.draws()
    # How well blocks can be told apart, without what all share: the offset of a round, the base's luck.
    error = (draws - draws[:, layers].mean(axis=1, keepdims=True)).std(axis=0)
    order = sorted(layers, key=lambda k: -posterior.mean[k])
    # A block that did not run can be the best by its neighbours, but the pick is one that showed it.
    best = max(candidates, key=lambda k: posterior.mean[k])
    spread = (draws[:, [best]] - draws).std(axis=0)  # the paired 95 % interval of the difference from the best holds 0
    tied = [k for k in order if k == best or posterior.mean[best] - posterior.mean[k] <= Z_95 * spread[k]]
    top = float(draws[:, layers].max(axis=1).mean())

    rounds = measured_rounds(candidates, settings, reward_range)
    updates = rounds[-1].updates
    of_block = {
        k: [
            [m.updates, reward_range * float(m.gains[i]), reward_range * math.sqrt(m.covariance[i, i])]
            for m in rounds
            for i in _position(m, k)
        ]
        for k in sorted(candidates)
    }
    # Whether it beats the base is asked of its own gains, since the posterior leaves the rounds' offsets open, and at
    # a level for the best of so many.
    z = NormalDist().inv_cdf(1 - 0.025 / len(candidates))
    gain, own_error = gain_of_rounds(of_block[best])

    def each(values: Mapping[int, float] | Sequence[float] | np.ndarray, among: Iterable[int]) -> list[float | None]:
        found = {k: float(values[k]) for k in among}
        return [found.get(k) for k in range(num_layers)]

    rates = {k: min(c.learning_rate, most) for k, c in candidates.items()}
    ranking = LayerRanking(
        model=model,
        revision=revision,
        num_layers=num_layers,
        method=method,
        scores=each(reward_range * updates * posterior.mean, layers),
        errors=each(reward_range * updates * error, layers),
        order=order,
        tied=tied,
        pick=best if gain > z * own_error else None,
        learning_rate=rates[best] if learning_rate is None else learning_rate,
        cost=cost,
        task=task,
        seed=seed,
        learning_rates=each(rates, rates),
        expected=round(min(1.0, max(0.0, posterior.mean[best] / top)), 3) if top > 0 else None,
        rounds={str(k): values for k, values in of_block.items()},
        first_step_kl={str(k): [c.kl, c.kl_noise] for k, c in sorted(candidates.items()) if c.kl is not None},
    )
    if ranking.pick is not None:
        return ranking
    return replace(ranking, rate_together=min(most, rate_together(candidates, ranking.choice)))


def rate_together(candidates: Mapping[int, Candidate], layers: Sequence[int]) -> float:
    """The learning rate of all these blocks together, as `find_learning_rate` would have it.

    A block that did not run is taken for the mean of those that did.
    """
    among = [c for k, c in candidates.items() if k in layers] or list(candidates.values())
    return 1 / math.sqrt(len(layers)) / fmean(1 / c.learning_rate for c in among)


def _position(measured: Measured, layer: int) -> list[int]:
    """Where the block stands in a round: one index, or none."""
    return [i for i, k in enumerate(measured.layers) if k == layer]
