"""The layer profile: what a sweep found, as one value, as layer_profile.json and as a table.

It is a ranking with the layer contributions beside it. It does not know how runs are made; it gets their rows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from peft_onelayer.records.ranking import LayerRanking

from .metric import Z_95, gain, layer_contribution
from .run_layer import Row

FORMAT = "onelayer-sweep-1"


@dataclass(frozen=True, kw_only=True)
class SweepProfile(LayerRanking):
    """Layer contributions of a model, measured. One entry per layer, None where not measured, unless it says else.

    Attributes (beside those of `LayerRanking`, whose `scores` are the gains S_k - S_base and `errors` theirs):
        contribution: C of each layer, by `layer_contribution`.
        contribution_errors: standard errors of C.
        undefined: why no C is defined; None where it is.
        means: S_k, the mean score over problems and seeds.
        base: S_base.
        full: S_full.
        base_error: standard error of S_base over problems.
        full_gain: S_full - S_base and its standard error.
        full_learning_rate: of the full-parameter runs; `learning_rate` is that of the best layer, and of every layer
            where `learning_rates` is None.
        learning_rate_search: scores by learning rate, of "layer" and of "full", with the settings of the search; None
            where the rates were given.
        algorithm: name of the algorithm.
        settings: fields of its TRL configuration that were set, without the learning rate.
        steps: optimizer steps of a run.
        seeds: of training.
        problems: number evaluated on, `samples` completions each, of `split`.
        stopped: by layer, the steps at which early stopping ended its runs; such a run has no score.
        greedy: {"base", "full", "means"}: the same by greedy decoding; None where it was not asked for.
    """

    KIND: ClassVar[str] = "a layer profile of a sweep"

    contribution: list[float | None]
    contribution_errors: list[float | None]
    undefined: str | None
    means: list[float | None]
    base: float
    full: float
    base_error: float | None
    full_gain: list[float | None]
    full_learning_rate: float
    learning_rate_search: dict[str, Any] | None
    algorithm: str
    settings: dict[str, Any]
    steps: int
    seeds: list[int]
    problems: int
    samples: int
    split: str
    stopped: dict[str, list[int]]
    greedy: dict[str, Any] | None
    format: str = FORMAT

    def to_csv(self) -> str:
        """One line for the base, for full, and for each layer that was to be measured."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(
            ["layer", "score", "gain", "gain_error", "contribution", "contribution_error", "learning_rate", "stopped"]
        )
        table.writerow(["base", self.base, "", "", "", "", "", ""])
        table.writerow(["full", self.full, *self.full_gain, "", "", self.full_learning_rate, ""])
        for k in range(self.num_layers):
            stopped = self.stopped.get(str(k), [])
            if self.means[k] is not None or stopped:
                row = [k, self.means[k], self.scores[k], self.errors[k]]
                row += [self.contribution[k], self.contribution_errors[k]]
                rate = self.learning_rates[k] if self.learning_rates else self.learning_rate
                table.writerow([*row, rate, " ".join(map(str, stopped))])
        return text.getvalue()


def make_profile(
    *,
    model: str,
    revision: str | None,
    num_layers: int,
    task: str,
    seeds: Sequence[int],
    steps: int,
    base: Row,
    full: Sequence[Row],
    layers: Mapping[int, Sequence[Row]],
    searched: Sequence[Row] = (),
    learning_rate_search: dict[str, Any] | None = None,
) -> SweepProfile:
    """Compute the profile from the rows of a sweep.

    The cost counts every row, those of a search included. Tokens of a run that was stopped early are not known; they
    are taken as its steps times the finished runs' mean per step. The share is of one run of one block.

    Args:
        full: the rows of the full-parameter runs, one per seed.
        layers: the rows of each block, one per seed; a stopped one has "stopped": its steps, and no scores.
        searched: rows of the search for learning rates.

    Raises:
        ValueError: rows that were not measured on the same problems.
    """
    every = [base, *full, *(row for rows in layers.values() for row in rows)]
    if len({row["problems_digest"] for row in every if "stopped" not in row}) > 1:
        raise ValueError("the rows of a sweep must be measured on the same problems; these are not")
    finished = {k: [row for row in rows if "stopped" not in row] for k, rows in layers.items()}
    scores = {k: [row["scores"] for row in rows] for k, rows in finished.items() if rows}
    full_scores = [row["scores"] for row in full]
    gains = {k: gain(values, base["scores"]) for k, values in scores.items()}
    contributions = {k: layer_contribution(v, base["scores"], full_scores) for k, v in scores.items()}
    order = sorted(gains, key=lambda k: -gains[k][0])
    tied = [k for k in order if k == order[0] or _tied(scores[order[0]], scores[k])]
    pick = order[0] if order and gains[order[0]][0] > Z_95 * (gains[order[0]][1] or 0.0) else None
    spec = next(row for rows in layers.values() for row in rows)["spec"]
    settings = {name: value for name, value in spec["settings"].items() if name != "learning_rate"}
    rates = {k: rows[0]["spec"]["settings"].get("learning_rate") for k, rows in layers.items()}

    def each(values: Mapping[int, Any]) -> list[Any]:
        return [values.get(k) for k in range(num_layers)]

    return SweepProfile(
        model=model,
        revision=revision,
        num_layers=num_layers,
        method="sweep",
        scores=each({k: value for k, (value, _) in gains.items()}),
        errors=each({k: error for k, (_, error) in gains.items()}),
        order=order,
        tied=tied,
        pick=pick,
        learning_rate=rates[order[0]] if order else None,
        learning_rates=each(rates) if len(set(rates.values())) > 1 else None,
        cost=_cost([*every, *searched], [row for rows in finished.values() for row in rows]),
        task=task,
        seed=seeds[0],
        contribution=each({k: c.value for k, c in contributions.items()}),
        contribution_errors=each({k: c.standard_error for k, c in contributions.items()}),
        undefined=next((c.reason for c in contributions.values()), None),
        means=each({k: float(np.mean(v)) for k, v in scores.items()}),
        base=base["mean"],
        full=float(np.mean(full_scores)),
        base_error=base["standard_error"],
        full_gain=list(gain(full_scores, base["scores"])),
        full_learning_rate=full[0]["spec"]["settings"].get("learning_rate"),
        learning_rate_search=learning_rate_search,
        algorithm=spec["algorithm"],
        settings=settings,
        steps=steps,
        seeds=list(seeds),
        problems=len(base["scores"]),
        samples=spec["samples"],
        split=spec["split"],
        stopped={
            str(k): [row["stopped"] for row in rows if "stopped" in row]
            for k, rows in layers.items()
            if any("stopped" in row for row in rows)
        },
        greedy=_greedy(base, full, finished, each),
    )


def _tied(best: list[list[float]], other: list[list[float]]) -> bool:
    """Whether the 95 % interval of the paired difference holds 0; `other` is no better in the mean."""
    difference, error = gain(best, other)
    return difference <= Z_95 * (error or 0.0)


def _cost(rows: Sequence[Row], of_blocks: Sequence[Row]) -> dict[str, float]:
    names = ("tokens_generated", "tokens_trained")
    steps = sum(row["steps"] for row in of_blocks)
    per_step = {name: sum(row[name] for row in of_blocks) / steps if steps else 0.0 for name in names}
    cost: dict[str, float] = dict.fromkeys(names, 0)
    for row in rows:
        for name in names:
            cost[name] += round(row["stopped"] * per_step[name]) if "stopped" in row else row[name]
        cost["tokens_generated"] += row.get("tokens_evaluated", 0)
    one_run = sum(per_step.values()) * (steps / len(of_blocks) if of_blocks else 0)
    cost["seconds"] = round(sum(row["seconds"] for row in rows), 1)
    cost["share"] = round((cost["tokens_generated"] + cost["tokens_trained"]) / one_run, 3) if one_run else 0.0
    return cost


def _greedy(base: Row, full: Sequence[Row], layers: Mapping[int, Sequence[Row]], each: Any) -> dict[str, Any] | None:
    if base["greedy_scores"] is None:
        return None

    def mean(rows: Sequence[Row]) -> float:
        return float(np.mean([row["greedy_scores"] for row in rows]))

    means = {k: mean(rows) for k, rows in layers.items() if rows}
    return {"base": mean([base]), "full": mean(full), "means": each(means)}
