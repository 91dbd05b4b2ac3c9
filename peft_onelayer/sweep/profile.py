"""From the rows of a sweep to its layer profile: contributions with standard errors, ties, and what it cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from peft_onelayer.records.ranking import LayerRanking, Sweep
from peft_onelayer.statistics import Z_95

from .metric import gain, layer_contribution, not_told_apart
from .plan import Plan
from .regimes import added_runs, make_regimes
from .run_layer import Row
from .settings import SweepSettings


def make_profile(settings: SweepSettings, plan: Plan, rows: Mapping[str, Row]) -> LayerRanking:
    """Compute the profile from the rows of a sweep.

    The cost counts every row, those that chose a learning rate included. Tokens of a run that was stopped early are not
    known; they are taken as its steps times the finished runs' mean per step. The share is of one run of one block.

    Args:
        plan: the runs, at the learning rates that were found; where regimes are asked for, the rows are of
            `added_runs` too.
        rows: by the digests of their specifications; that of a run which was stopped early has "stopped", its steps,
            and no scores.

    Raises:
        ValueError: rows that were not measured on the same problems.
    """
    base = rows[plan.base.digest()]
    full = [rows[spec.digest()] for spec in plan.full]
    layers = {k: [rows[spec.digest()] for spec in specs] for k, specs in plan.blocks.items()}
    of_rates = [rows[spec.digest()] for spec in plan.of_rates]
    every = [base, *full, *(row for rows in layers.values() for row in rows)]
    added = [rows[spec.digest()] for spec in added_runs(plan, settings)] if settings.regimes else []
    if len({row["problems_digest"] for row in every if "stopped" not in row}) > 1:
        raise ValueError("the rows of a sweep must be measured on the same problems; these are not")
    finished = {k: [row for row in rows if "stopped" not in row] for k, rows in layers.items()}
    scores = {k: [row["scores"] for row in rows] for k, rows in finished.items() if rows}
    full_scores = [row["scores"] for row in full]
    gains = {k: gain(values, base["scores"]) for k, values in scores.items()}
    contributions = {k: layer_contribution(v, base["scores"], full_scores) for k, v in scores.items()}
    order = sorted(gains, key=lambda k: -gains[k][0])
    pick = order[0] if order and gains[order[0]][0] > Z_95 * (gains[order[0]][1] or 0.0) else None
    rates = {k: specs[0].settings["learning_rate"] for k, specs in plan.blocks.items()}

    def each(values: Mapping[int, Any]) -> list[Any]:
        return [values.get(k) for k in range(plan.num_layers)]

    sweep = Sweep(
        contribution=each({k: c.value for k, c in contributions.items()}),
        base=base["mean"],
        full=float(np.mean(full_scores)),
        contribution_errors=each({k: c.standard_error for k, c in contributions.items()}),
        undefined=_unmoved(
            base, [row for row in every if "stopped" not in row], rates.values(), "layer" in plan.finding
        )
        or next((c.reason for c in contributions.values()), None),
        means=each({k: float(np.mean(v)) for k, v in scores.items()}),
        base_error=base["standard_error"],
        full_gain=list(gain(full_scores, base["scores"])),
        full_learning_rate=plan.full[0].settings["learning_rate"],
        learning_rate_search=_search(plan, of_rates) if plan.search else None,
        learning_rates_found=_found(plan, rows),
        algorithm=settings.algorithm,
        settings={name: value for name, value in plan.full[0].settings.items() if name != "learning_rate"},
        steps=settings.steps,
        seeds=list(settings.seeds),
        problems=len(base["scores"]),
        samples=settings.samples,
        split=plan.base.split,
        stopped={
            str(k): [row["stopped"] for row in rows if "stopped" in row]
            for k, rows in layers.items()
            if any("stopped" in row for row in rows)
        },
        greedy=_greedy(base, full, finished, each),
        regimes=make_regimes(plan, settings, rows) if settings.regimes else None,
    )
    return LayerRanking(
        model=settings.model,
        revision=plan.base.revision,
        num_layers=plan.num_layers,
        method="sweep",
        scores=each({k: value for k, (value, _) in gains.items()}),
        errors=each({k: error for k, (_, error) in gains.items()}),
        order=order,
        tied=not_told_apart(order, scores),
        pick=pick,
        learning_rate=rates[order[0]] if order else None,
        learning_rates=each(rates) if len(set(rates.values())) > 1 else None,
        cost=_cost(
            [*every, *of_rates, *(row for row in added if row not in every)],
            [row for rows in finished.values() for row in rows],
        ),
        task=plan.base.task,
        seed=settings.seeds[0],
        sweep=sweep,
    )


def _unmoved(base: Row, rows: Sequence[Row], rates: Collection[float], found: bool) -> str | None:
    """Why every run scored what the base did, problem by problem; None where one did not.

    Args:
        rates: of the blocks' runs.
        found: whether nobody gave them.
    """
    if any(row["scores"] != base["scores"] for row in rows):
        return None
    if len(set(base["scores"])) == 1:
        return f"every run and the base scored {base['scores'][0]:g} on every problem: the reward tells nothing apart"
    low, high = min(rates), max(rates)
    rate = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    mended = "raise --steps" if found else "leave --learning-rate out to have one found, or raise --steps"
    return (
        f"every run scored exactly what the base did on every problem: the learning rate ({rate}) is too low, or the "
        f"steps are too few; {mended}"
    )


def _found(plan: Plan, rows: Mapping[str, Row]) -> dict[str, Any] | None:
    """How the learning rates were found that were not given."""
    found = {name: rows[spec.digest()]["found"] for name, spec in plan.finding.items()}
    block = {"block": plan.finding["layer"].layer} if "layer" in found else {}
    return {**block, **found} if found else None


def _search(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """The scores of the search for learning rates, and its settings."""
    assert plan.search is not None
    means, n = [row["mean"] for row in rows], len(plan.search.rates)
    return {
        "rates": list(plan.search.rates),
        "layer": means[:n],
        "full": means[n:],
        "block": plan.search.block,
        "split": plan.search.layer[0].split,
    }


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
