"""Layer contribution under three regimes of learning rates, since a ratio of two gains depends on both rates.

In "equal rates" blocks and all parameters train at one rate. In "the full run's tuned" only all parameters have the
rate that a search chose for them. In "both tuned" the blocks have theirs too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peft_onelayer.statistics import Z_95

from .metric import gain, layer_contribution
from .plan import Plan, with_learning_rate
from .run_layer import Row, RunSpec
from .settings import SweepSettings

EQUAL, FULL_TUNED, BOTH_TUNED = "equal rates", "the full run's tuned", "both tuned"
PAPER = "arXiv 2607.01232"
SCRIPTS_RATIO = (
    0.2  # rate of all parameters over that of a block, in five of the six scripts that are known (1e-6 / 5e-6)
)


def at_one_rate(plan: Plan, settings: SweepSettings) -> Plan:
    """The plan with blocks and all parameters at one rate: the one that was given, else that of `plan`'s blocks."""
    rate = settings.learning_rate
    if rate is None:
        rate = next(iter(plan.blocks.values()))[0].settings.get("learning_rate")
    assert not isinstance(rate, Mapping)
    return replace(
        plan,
        full=[with_learning_rate(spec, rate) for spec in plan.full],
        blocks={k: [with_learning_rate(spec, rate) for spec in specs] for k, specs in plan.blocks.items()},
    )


def added_runs(plan: Plan, settings: SweepSettings) -> list[RunSpec]:
    """The runs that the regimes need beside those of `plan`: all parameters at the one rate, and where that was given,
    every block at it. Their number is known before the rates are."""
    equal = at_one_rate(plan, settings)
    if settings.learning_rate is None:
        return list(equal.full)
    by_seed = zip(equal.full, *equal.blocks.values(), strict=True)
    return [spec for of_seed in by_seed for spec in of_seed]


def describe_added(plan: Plan, settings: SweepSettings) -> str:
    """What the regimes add, in one line, to be said before anything runs."""
    runs, seeds = len(added_runs(plan, settings)), len(plan.full)
    of_seeds = "the seed" if seeds == 1 else f"each of {seeds} seeds"
    if settings.learning_rate is None:
        what = f"all parameters at the blocks' tuned rate, for {of_seeds}"
    else:
        what = f"all parameters and {len(plan.blocks)} blocks at {settings.learning_rate:g}, for {of_seeds}"
    plural = "s" * (runs != 1)
    return f"--regimes adds {runs} run{plural} to the sweep ({what}), fewer where a tuned rate is the same"


def make_regimes(plan: Plan, settings: SweepSettings, rows: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    """C of each block under each regime.

    Args:
        plan: at its tuned rates.
        rows: of its runs and of `added_runs`, by the digests of their specifications.

    Returns:
        By regime "block_rate", "full_rate", "full_gain" with its standard error, "contribution" and
        "contribution_errors" with one entry for each block of the model, None where there is none, and "undefined",
        why.
    """
    equal = at_one_rate(plan, settings)
    base = rows[plan.base.digest()]["scores"]
    chosen = {EQUAL: (equal, equal), FULL_TUNED: (equal, plan), BOTH_TUNED: (plan, plan)}
    found = {}
    for name, (of_blocks, of_full) in chosen.items():
        full = [rows[spec.digest()]["scores"] for spec in of_full.full]
        values = {}
        for k, specs in of_blocks.blocks.items():
            finished = [rows[s.digest()]["scores"] for s in specs if "stopped" not in rows[s.digest()]]
            if finished:
                values[k] = layer_contribution(finished, base, full)
        blocks = range(plan.num_layers)
        found[name] = {
            "block_rate": next(iter(of_blocks.blocks.values()))[0].settings["learning_rate"],
            "full_rate": of_full.full[0].settings["learning_rate"],
            "full_gain": list(gain(full, base)),
            "contribution": [values[k].value if k in values else None for k in blocks],
            "contribution_errors": [values[k].standard_error if k in values else None for k in blocks],
            "undefined": next((c.reason for c in values.values()), None),
        }
    return found


def regime_table(regimes: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table: C of each measured block under each regime, with its 95 % interval."""

    def cell(regime: Mapping[str, Any], k: int) -> str:
        value, error = regime["contribution"][k], regime["contribution_errors"][k]
        if value is None:
            return "undefined" if regime["undefined"] else ""
        half = Z_95 * (error or 0.0)
        return f"{value:.2f}" + ("" if error is None else f" [{value - half:.2f}, {value + half:.2f}]")

    depth = len(regimes[EQUAL]["contribution"])
    measured = [k for k in range(depth) if any(r["contribution"][k] is not None for r in regimes.values())]
    rows = [["rates: block, full", *(f"{r['block_rate']:g}, {r['full_rate']:g}" for r in regimes.values())]]
    for k in measured:
        rows.append([f"C of block {k}", *(cell(regime, k) for regime in regimes.values())])
    if len(measured) > 1:
        best = [max((v for v in r["contribution"] if v is not None), default=None) for r in regimes.values()]
        rows.append(["highest C", *("" if value is None else f"{value:.2f}" for value in best)])
    return ["", *regimes], rows


def regime_lines(regimes: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> list[str]:
    """What has to be said beside the table: what the intervals hold, which regimes coincide, which is the paper's."""
    spread = "over the problems, paired, and over the seeds"
    noise = spread if len(seeds) > 1 else "over the problems, paired; of one seed the spread of seeds is not known"
    lines = [f"[ ] 95 % intervals {noise}."]
    rates = {name: (regime["block_rate"], regime["full_rate"]) for name, regime in regimes.items()}
    same = [name for name in regimes if name != BOTH_TUNED and rates[name] == rates[BOTH_TUNED]]
    if same:
        lines.append(f"{' and '.join(same)}: the same runs as {BOTH_TUNED}; another --learning-rate would be one more.")
    lines += [f"C is undefined under {name}: {r['undefined']}." for name, r in regimes.items() if r["undefined"]]
    return [*lines, papers_regime(rates)]


def papers_regime(rates: Mapping[str, tuple[float, float]]) -> str:
    """Which regime the paper's table is likely to hold, in words.

    Args:
        rates: of a block and of all parameters, by regime.
    """
    ratios = {name: full / block for name, (block, full) in rates.items()}
    nearest = min(ratios, key=lambda name: abs(math.log(ratios[name] / SCRIPTS_RATIO)))
    said = (
        f"The paper ({PAPER}): its table of settings has one rate for both (transcribed), which is {EQUAL}; the public "
        f"scripts that appear to be its authors' train all parameters at {SCRIPTS_RATIO:g} of a block's rate."
    )
    if ratios[nearest] == 1:
        return f"{said} If these made its tables, none of the regimes here is theirs."
    near = f"{nearest} is nearest to it here, with {ratios[nearest]:.2g}"
    return f"{said} Its tables likely hold what the scripts ran: {near}. Which they hold cannot be told from outside."
