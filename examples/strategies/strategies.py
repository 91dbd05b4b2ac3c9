"""The strategies of arXiv 2607.01232 on the embedded demo model: python examples/strategies/strategies.py

Arithmetic, 40 steps of the demo's recipe for each run, three seeds: the middle block, five blocks (the best, the middle
and the worst by one ranking), all parameters, these with the best five at twice the rate, and all at twice the rate.
The ranking is one of `onelayer probe`, kept in results/ranking.json. Every row of results/demo.jsonl is made once; the
table is printed at the end.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from peft_onelayer.records.jsonl import append_record, read_records
from peft_onelayer.rl.recipe import DEMO_LEARNING_RATE, demo_config
from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs import ProbeSettings, TrainingSettings, probe, train
from peft_onelayer.runs.models import load_adapter, load_causal_lm, without_progress_bars
from peft_onelayer.tasks import load_task

MODEL = str(files("peft_onelayer") / "demo_model")
RESULTS = Path(__file__).parent / "results"
ROWS, RANKING = RESULTS / "demo.jsonl", RESULTS / "ranking.json"
STEPS, SEEDS, PROBLEMS, SAMPLES = 40, (0, 1, 2), 512, 4
# The demo's for one block; else, of 3e-4, 1e-3 and 3e-3, the one with which mid-5, or all, gained most in two steps.
RATES = {"middle": DEMO_LEARNING_RATE} | dict.fromkeys(("top-5", "mid-5", "worst-5"), 1e-3)
RATES |= dict.fromkeys(("all", "all, top-5 boosted"), 3e-4) | {"all, twice the rate": 6e-4}
BLOCKS = {name: f"{name}@{RANKING}" for name in ("top-5", "worst-5")} | {"middle": "middle", "mid-5": "mid-5"}


def config() -> dict[str, Any]:
    """The demo's recipe, but for the rate."""
    return {k: v for k, v in demo_config(STEPS).items() if k != "learning_rate"} | {"save_strategy": "no"}


def trained(out: Path, seed: int, rate: float, task: str = "arithmetic", **what: Any) -> Path:
    """Train the demo model as `onelayer train` does."""
    common: dict[str, Any] = {"model": MODEL, "task": task, "out": out, "steps": STEPS, "seed": seed}
    train(TrainingSettings(**common, learning_rate=rate, config=config(), eval_problems=0, **what))
    return out


def score(run: Path | None, task: str = "arithmetic", problems: int = PROBLEMS) -> Any:
    """The evaluation of an adapter, of a whole model, or of the base."""
    whole = run is not None and (run / "config.json").exists()
    model, tokenizer = load_causal_lm(str(run) if whole else MODEL)
    policy = model if run is None or whole else load_adapter(model, run)
    data = load_task(task)
    return evaluate(policy, tokenizer, data, data.rows("test", problems, 0), Sampling(samples=SAMPLES))


def strategy(name: str, rate: float | None, seed: int, scratch: Path) -> dict[str, Any]:
    what: dict[str, Any] = {"full": True} if name.startswith("all") else {"layer": BLOCKS.get(name)}
    what |= {"boost": f"top-5@{RANKING}:2.0"} if name.endswith("boosted") else {}
    found = score(None if rate is None else trained(scratch / "run", seed, rate, **what))
    return {"mean": found.mean, "standard_error": found.standard_error}


def keep(file: Path, make: Any, **about: Any) -> dict[str, Any]:
    """The row of `about` in `file`, made now if it is not there."""
    for row in read_records(file):
        if all(row[name] == value for name, value in about.items()):
            return row
    start = time.perf_counter()
    with without_progress_bars(), tempfile.TemporaryDirectory() as scratch:
        row = {**about, **make(**about, scratch=Path(scratch))}
    append_record(file, row | {"seconds": round(time.perf_counter() - start, 1)})
    print(about, row.get("mean", ""), f"{time.perf_counter() - start:.0f} s", flush=True)
    return row


def mean_and_error(values: Sequence[float]) -> str:
    """The mean, of several with its standard error over them."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


def table() -> str:
    """What the rows say."""
    rows, lines = read_records(ROWS), ["| trained | rate | accuracy | by seed |", "|---|---|---|---|"]
    for name in ("base", *RATES):
        means = [row["mean"] for row in rows if row["name"] == name]
        rate = f"{RATES[name]:g}" if name in RATES else ""
        lines.append(f"| {name} | {rate} | {mean_and_error(means)} | {', '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    if not RANKING.exists():
        probe(ProbeSettings(model=MODEL, task="arithmetic", out=RANKING, steps=STEPS, config=config()))
        ranking = json.loads(RANKING.read_text(encoding="utf-8")) | {"model": "the demo model"}  # in place of its path
        RANKING.write_text(json.dumps(ranking, indent=2) + "\n", encoding="utf-8")
    keep(ROWS, strategy, name="base", rate=None, seed=SEEDS[0])
    for name, rate in RATES.items():
        for seed in SEEDS:
            keep(ROWS, strategy, name=name, rate=rate, seed=seed)
    print(table())


if __name__ == "__main__":
    main()
