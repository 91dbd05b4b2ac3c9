"""Does one block match full-parameter RL? Measured on pretrained models, resumably, a run at a time.

    python examples/evidence/evidence.py smollm2-135m sums [--models FOLDER] [--minutes 60]

FOLDER has a folder for each model. Every finished run is a line of results/MODEL-TASK.jsonl, and runs that are there
are not repeated. `--list` says what is there and what is missing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from one_run import HERE, Run, Setting, execute
from transformers import AutoConfig

from peft_onelayer.records.jsonl import append_record, read_records

RESULTS = HERE / "results"
SEEDS = (0, 1)
RATES, LORA_RATES = (1e-5, 3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3, 3e-3)
SETTINGS = [
    Setting("smollm2-135m", "sums", RATES, LORA_RATES),
    Setting("smollm2-135m", "repeated", RATES, LORA_RATES),
    Setting("qwen2.5-coder-0.5b", "repeated", RATES, LORA_RATES),
]
STRIDE = {"smollm2-135m": 3, "qwen2.5-coder-0.5b": 3}  # between the blocks that are measured first


def spread(num_layers: int, stride: int) -> list[int]:
    """Every block, those first that are `stride` apart, the last block among them.

    >>> spread(7, 3)
    [0, 3, 6, 1, 2, 4, 5]
    """
    first = [k for k in range(num_layers) if k % stride == 0 or k == num_layers - 1]
    return first + [k for k in range(num_layers) if k not in first]


def best_rate(rows: Sequence[dict[str, Any]], kind: str) -> float | None:
    """The rate of the highest score on the search's problems, the lowest of equal ones; None before all are there."""
    found = {r["run"]["rate"]: r["search_mean"] for r in rows if r["run"]["kind"] == kind and r["run"]["searched"]}
    asked = {len(r["setting"]["lora_rates" if kind.startswith("lora") else "rates"]) for r in rows}
    return max(sorted(found), key=found.__getitem__) if asked and len(found) == max(asked) else None


def runs(setting: Setting, num_layers: int, rows: Sequence[dict[str, Any]]) -> Iterator[Run]:
    """The runs that can be named yet, in their order: those at a tuned rate only when its search is done."""
    middle = num_layers // 2
    yield Run("base", searched=True)
    yield from (Run("block", middle, rate, searched=True) for rate in setting.rates)
    yield from (Run("full", None, rate, searched=True) for rate in setting.rates)
    block, full = best_rate(rows, "block"), best_rate(rows, "full")
    blocks = spread(num_layers, STRIDE[setting.model])
    if block is not None:
        measured = [Run("block", k, block, searched=k == middle) for k in blocks]
        yield from measured[: blocks.index(num_layers - 1) + 1]
    yield from (Run("lora-all", None, rate, searched=True) for rate in setting.lora_rates)
    if block is None or full is None:
        return
    yield from measured
    for seed in SEEDS[1:]:
        yield from (Run("full", None, rate, seed) for rate in sorted({full, block}))
        yield from (Run("block", k, block, seed) for k in blocks)


def same(run: Run, row: dict[str, Any]) -> bool:
    return {**row["run"], "searched": None} == {**asdict(run), "searched": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted({setting.model for setting in SETTINGS}))
    parser.add_argument("task", choices=sorted({setting.task for setting in SETTINGS}))
    default = os.environ.get("ONELAYER_MODELS", "~/.cache/onelayer-models")
    parser.add_argument("--models", type=Path, default=Path(default).expanduser())
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--list", action="store_true", help="what is there, and what is missing")
    options = parser.parse_args()
    try:
        setting = next(s for s in SETTINGS if (s.model, s.task) == (options.model, options.task))
    except StopIteration:
        parser.error(f"no study of {options.model} on {options.task}")
    folder = options.models / setting.model
    if not (folder / "config.json").exists():
        parser.error(f"{folder} holds no model; give the folder that has {setting.model} with --models")
    num_layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    path, start = RESULTS / f"{setting.name}.jsonl", time.perf_counter()
    while True:
        rows = read_records(path)
        planned = list(dict.fromkeys(runs(setting, num_layers, rows)))
        missing = [run for run in planned if not any(same(run, row) for row in rows)]
        if options.list:
            print(f"{len(rows)} runs are there; next of {len(missing)}: " + "; ".join(map(str, missing[:5])))
            return
        if not missing or time.perf_counter() - start > 60 * options.minutes:
            return
        row = execute(setting, missing[0], folder)
        append_record(path, row)
        print(f"{missing[0]}: {row['mean']:.4f} ± {row['standard_error']:.4f}, {row['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
