"""Figures in words: scores, gains and C with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from figures import Row, Study

from peft_onelayer.statistics import Z_95
from peft_onelayer.sweep.metric import LayerContribution

MODELS = {"smollm2-135m": "SmolLM2-135M-Instruct", "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct"}
TASKS = {"sums": "sums of two-digit numbers", "repeated": "the repeated word"}


def where(study: Study) -> str:
    return f"{MODELS[study.setting.model]}, {TASKS[study.setting.task]}"


def seeds_of(rows: Sequence[Row]) -> str:
    seeds = sorted({row["run"]["seed"] for row in rows})
    return "one seed" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"


def interval(value: float, error: float | None) -> tuple[float, float, float]:
    half = Z_95 * (error or 0.0)
    return value, value - half, value + half


def contribution(c: LayerContribution | None) -> str:
    if c is None:
        return "not measured"
    if c.value is None:
        return "undefined"
    value, low, high = interval(c.value, c.standard_error)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def cell(c: LayerContribution | None) -> str:
    return "" if c is None else contribution(c)


def points(value: float, error: float | None) -> str:
    value, low, high = (100 * number for number in interval(value, error))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"


def gained(value: float, error: float | None, digits: int = 3) -> str:
    return f"{value:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def mean_of(rows: Sequence[Row]) -> str:
    return f"{statistics.fmean(row['mean'] for row in rows):.3f}"


def score(rows: Sequence[Row]) -> str:
    return f"{mean_of(rows)}" if rows else "not measured"
