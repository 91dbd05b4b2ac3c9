"""Which runs make the evidence, in their order: the blocks, all parameters, and what is compared with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from one_run import HERE, Run, Setting

from peft_onelayer.records.ranking import LayerRanking

RESULTS = HERE / "results"
SEEDS = (0, 1)
RATES, LORA_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SETTINGS = [
    Setting("smollm2-135m", "sums", RATES, LORA_RATES),
    Setting("smollm2-135m", "repeated", RATES, LORA_RATES),
    Setting("qwen2.5-coder-0.5b", "repeated", RATES[:4], LORA_RATES[:4]),
]
DEPTH = {"smollm2-135m": 30, "qwen2.5-coder-0.5b": 24}  # blocks
STRIDE = {"smollm2-135m": 3, "qwen2.5-coder-0.5b": 3}  # between the blocks that are measured first
EVERY = {"smollm2-135m-sums": 1, "smollm2-135m-repeated": 2, "qwen2.5-coder-0.5b-repeated": 3}  # n-th block is aimed at
COMPARED = ("lora-all-sized", "lora-block", "mask", "norms")  # beside blocks, all parameters and LoRA on all linears


def spread(num_layers: int, stride: int) -> list[int]:
    """Every block, those first that are `stride` apart, the last block among them.

    >>> spread(7, 3)
    [0, 3, 6, 1, 2, 4, 5]
    """
    first = [k for k in range(num_layers) if k % stride == 0 or k == num_layers - 1]
    return first + [k for k in range(num_layers) if k not in first]


def aimed(setting: Setting) -> list[int]:
    """The blocks that a study measures, ascending; the middle and the last one are always among them."""
    depth, stride = DEPTH[setting.model], EVERY[setting.name]
    return [k for k in range(depth) if k % stride == 0 or k in (depth // 2, depth - 1)]


def picked(setting: Setting, probes: Sequence[dict[str, Any]]) -> list[int]:
    """The blocks that rankings chose and that are not among those aimed at, ascending.

    What they gain is measured too, so that every choice can be held against the best block. The best block of a sweep
    stays one of those aimed at.
    """
    rankings = [LayerRanking.from_dict(row["ranking"], "a probe") for row in probes if row["ranking"]]
    return sorted({k for ranking in rankings for k in ranking.choice} - {*aimed(setting)})


def grid(kind: str) -> str:
    """The field of `Setting` with the rates that are tried for a kind.

    A norm's weights are about one, those of a matrix far below, and AdamW's steps are of one size: norms take LoRA's.
    """
    return "lora_rates" if kind.startswith("lora") or kind == "norms" else "rates"


def best_rate(rows: Sequence[dict[str, Any]], kind: str) -> float | None:
    """The rate of the highest score on the search's problems, the lowest of equal ones; None before all are there."""
    found = {r["run"]["rate"]: r["search_mean"] for r in rows if r["run"]["kind"] == kind and r["run"]["searched"]}
    asked = {len(r["setting"][grid(kind)]) for r in rows}
    return max(sorted(found), key=found.__getitem__) if asked and len(found) == max(asked) else None


def best_block(rows: Sequence[dict[str, Any]], setting: Setting) -> int | None:
    """The block of the highest score in the sweep of the first seed; None before all of it is there."""
    rate, asked = best_rate(rows, "block"), aimed(setting)
    found = [r for r in rows if (r["run"]["kind"], r["run"]["rate"], r["run"]["seed"]) == ("block", rate, SEEDS[0])]
    of_sweep = [r for r in found if r["run"]["block"] in asked]
    if rate is None or not {r["run"]["block"] for r in of_sweep}.issuperset(asked):
        return None
    return int(max(of_sweep, key=lambda r: r["mean"])["run"]["block"])


def runs(setting: Setting, rows: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]] = ()) -> Iterator[Run]:
    """The runs that can be named yet, in their order: those at a tuned rate only when its search is done.

    Args:
        rows: of the runs that are there.
        probes: rankings of the blocks, whose choices are run too.
    """
    num_layers = DEPTH[setting.model]
    middle = num_layers // 2
    yield Run("base", searched=True)
    yield from (Run("block", middle, rate, searched=True) for rate in setting.rates)
    yield from (Run("full", None, rate, searched=True) for rate in setting.rates)
    block, full = best_rate(rows, "block"), best_rate(rows, "full")
    blocks = [k for k in spread(num_layers, STRIDE[setting.model]) if k in aimed(setting)]
    if block is not None:
        measured = [Run("block", k, block, searched=k == middle) for k in blocks]
        yield from measured[: blocks.index(num_layers - 1) + 1]
    yield from (Run("lora-all", None, rate, searched=True) for rate in setting.lora_rates)
    if block is None or full is None:
        return
    yield from measured
    chosen = picked(setting, probes)
    yield from (Run("block", k, block) for k in chosen)
    best = best_block(rows, setting)
    for kind in COMPARED:
        at = middle if kind == "lora-block" else None
        yield from (Run(kind, at, rate, searched=True) for rate in getattr(setting, grid(kind)))
        yield from repetitions(kind, SEEDS[0], rows, middle, best)
    for seed in SEEDS[1:]:
        yield from (Run("full", None, rate, seed) for rate in sorted({full, block}))
        yield from (Run("block", k, block, seed) for k in [*blocks, *chosen])
        for kind in ("lora-all", *COMPARED):
            yield from repetitions(kind, seed, rows, middle, best)


def repetitions(kind: str, seed: int, rows: Sequence[dict[str, Any]], middle: int, best: int | None) -> Iterator[Run]:
    """The runs of a kind at its tuned rate; LoRA of one block on the middle one and, once it is known, the best."""
    rate = best_rate(rows, kind)
    if rate is not None:
        at = [middle, *({best} - {None, middle})] if kind == "lora-block" else [None]
        yield from (Run(kind, k, rate, seed, searched=seed == SEEDS[0] and k in (None, middle)) for k in at)


def same(run: Run, row: dict[str, Any]) -> bool:
    return {**row["run"], "searched": None} == {**asdict(run), "searched": None}
