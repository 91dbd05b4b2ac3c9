"""The strategies of arXiv 2607.01232 on the embedded demo model: python examples/strategies/strategies.py

Arithmetic, 40 steps of the demo's recipe for each run, three seeds: the middle block, five blocks (the best, the middle
and the worst by one ranking), all parameters, and all parameters with the best five at twice the rate. Beside them a
vote of three blocks' adapters. The ranking is one of `onelayer probe`, kept in results/ranking.json. One block trains
at the demo's rate; five blocks and all parameters at the better of two, chosen with the first seed on problems of the
train split. Every row of results/demo.jsonl is made once; the table is printed at the end.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from peft_onelayer.layers import resolve_layers
from peft_onelayer.records.jsonl import append_record, read_records
from peft_onelayer.rl.recipe import DEMO_LEARNING_RATE, demo_config
from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs import ProbeSettings, TrainingSettings, VoteSettings, probe, train, vote
from peft_onelayer.runs.models import load_adapter, load_causal_lm, without_progress_bars
from peft_onelayer.tasks import load_task

MODEL = str(files("peft_onelayer") / "demo_model")
RESULTS = Path(__file__).parent / "results"
ROWS, RANKING = RESULTS / "demo.jsonl", RESULTS / "ranking.json"
STEPS, SEEDS, PROBLEMS, SAMPLES = 40, (0, 1, 2), 512, 4
SEARCHED = {"mid-5": ("top-5", "mid-5"), "worst-5": ("worst-5",), "all": ("all", "all, top-5 boosted")}
RATES = {"mid-5": (1e-3, 3e-3), "worst-5": (3e-4, 1e-3), "all": (3e-4, 1e-3)}  # that are tried
BLOCKS = {name: f"{name}@{RANKING}" for name in ("top-5", "worst-5")} | {"middle": "middle", "mid-5": "mid-5"}
STRATEGIES = ("middle", "top-5", "mid-5", "worst-5", "all", "all, top-5 boosted")
VOTERS, VOTES = 3, 2  # adapters, and completions of each


def config() -> dict[str, Any]:
    """The demo's recipe, but for the rate."""
    return {k: v for k, v in demo_config(STEPS).items() if k != "learning_rate"} | {"save_strategy": "no"}


def trained(out: Path, seed: int, rate: float, task: str = "arithmetic", **what: Any) -> Path:
    """Train the demo model as `onelayer train` does."""
    common: dict[str, Any] = {"model": MODEL, "task": task, "out": out, "steps": STEPS, "seed": seed}
    train(TrainingSettings(**common, learning_rate=rate, config=config(), eval_problems=0, **what))
    return out


def score(run: Path | None, task: str = "arithmetic", split: str = "test", problems: int = PROBLEMS) -> Any:
    """The evaluation of an adapter, of a whole model, or of the base."""
    whole = run is not None and (run / "config.json").exists()
    model, tokenizer = load_causal_lm(str(run) if whole else MODEL)
    policy = model if run is None or whole else load_adapter(model, run)
    data = load_task(task)
    rows = data.rows(split, problems, 0 if split == "test" else 1_000_000)
    return evaluate(policy, tokenizer, data, rows, Sampling(samples=SAMPLES))


def strategy(name: str, rate: float, seed: int, scratch: Path) -> dict[str, Any]:
    what: dict[str, Any] = {"full": True} if name.startswith("all") else {"layer": BLOCKS[name]}
    what |= {"boost": f"top-5@{RANKING}:2.0"} if name.endswith("boosted") else {}
    run = trained(scratch / "run", seed, rate, **what)
    found = score(run)
    searched = score(run, split="train", problems=128).mean
    return {"mean": found.mean, "standard_error": found.standard_error, "search_mean": searched}


def voting(name: str, rate: float, seed: int, scratch: Path) -> dict[str, Any]:
    """The adapters of the best blocks, each trained alone, and as many samples of the best ranked one."""
    (best,) = resolve_layers(f"top-1@{RANKING}", 12)
    blocks = resolve_layers(f"top-{VOTERS}@{RANKING}", 12)
    runs = [trained(scratch / str(block), seed, rate, layer=block) for block in blocks]
    record = vote(
        VoteSettings(
            adapters=[str(run) for run in runs],
            against=blocks.index(best),
            task="arithmetic",
            problems=PROBLEMS,
            samples=VOTES,
        )
    )
    kept = ("samples", "of_adapters", "of_one", "averages", "difference")
    return {"blocks": blocks, "best": best, **{k: v for k, v in asdict(record).items() if k in kept}}


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


def best_rate(name: str) -> float:
    """Of a strategy: the demo's for one block, else the better of `RATES` with the first seed."""
    asked = next((key for key, names in SEARCHED.items() if name in names), None)
    if asked is None:
        return DEMO_LEARNING_RATE
    found = {rate: keep(ROWS, strategy, name=asked, rate=rate, seed=SEEDS[0])["search_mean"] for rate in RATES[asked]}
    return max(RATES[asked], key=found.__getitem__)


def mean_and_error(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def main() -> None:
    torch.set_num_threads(1)
    if not RANKING.exists():
        probe(ProbeSettings(model=MODEL, task="arithmetic", out=RANKING, steps=STEPS, config=config()))
        ranking = json.loads(RANKING.read_text(encoding="utf-8")) | {"model": "the demo model"}  # in place of its path
        RANKING.write_text(json.dumps(ranking, indent=2) + "\n", encoding="utf-8")
    print(f"base: {score(None).mean:.3f}\n\n| trained | rate | accuracy | by seed |\n|---|---|---|---|")
    for name in STRATEGIES:
        rate = best_rate(name)
        means = [keep(ROWS, strategy, name=name, rate=rate, seed=seed)["mean"] for seed in SEEDS]
        print(f"| {name} | {rate:g} | {mean_and_error(means)} | {', '.join(f'{m:.3f}' for m in means)} |")
    for seed in SEEDS:
        keep(ROWS, voting, name="vote", rate=DEMO_LEARNING_RATE, seed=seed)


if __name__ == "__main__":
    main()
