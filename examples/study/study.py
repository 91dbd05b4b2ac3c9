"""How far to trust each way of choosing the block: python examples/study/study.py [--part ...] [--quick] [--out DIR]

Ground truth are full sweeps (truth.py) of pretrained bases and of bases with one damaged block (bases.py). Every method
ranks the blocks of every case; the table says how well the ranking and its first block do, and what it cost. Parts:

    bases     build the models                                    (hours on 2 cores with the next two)
    truth     sweep every case
    rank      let every method rank every case
    table     write RESULTS.md and curve.png from the results     (seconds; the results are in the repository)

What is there is kept: run the same command again to go on after a kill. --quick takes the three smallest cases.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path

import bases as models
import diagnostics
import torch
import transformers
from short_runs import rank_by_short_runs
from table import write_results
from transformers import AutoModelForCausalLM, AutoTokenizer
from truth import CORRELATED, UNDAMAGED, VIOLATING, Cell, measure

from peft_onelayer.probe.probe import probe_layers
from peft_onelayer.rl.recipe import demo_recipe
from peft_onelayer.tasks import load_task

HERE = Path(__file__).parent
TRAINING_STEPS = 150  # of the demo's recipe, 24 prompts x 8: the run that costs are shares of
SEEDS = (0, 1, 2, 3, 4)  # of the races at the default budget; the first for all else
CURVE = (0.05, 0.1, 0.5, 1.0)  # beside the default
STAGES = ("default", "diagnostics", "curve", "short")
QUICK = ("short6-arithmetic-grpo", "quiet0-arithmetic-grpo", "norms4-arithmetic-grpo")


def rank(cell: Cell, bases: Path, folder: Path, stage: str) -> None:
    """Write the rankings of a case that belong to `stage`, one of `STAGES`, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    task = load_task(cell.task)

    def load():
        path = bases / cell.base
        return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    if stage in ("default", "curve"):
        chosen = [("auto", 0.25), ("race", 0.25)] if stage == "default" else [("auto", budget) for budget in CURVE]
        for seed in SEEDS if stage == "default" else SEEDS[:1]:
            for method, budget in chosen:
                path = folder / f"{method}-{budget:g}-{seed}.json"
                if not path.exists():
                    model, tokenizer = load()
                    ranking = probe_layers(
                        model, tokenizer, task, method=method, budget=budget, seed=seed, training_steps=TRAINING_STEPS
                    )
                    _write(path, json.loads(ranking.to_json()))
        return
    path = folder / f"{stage}.json"
    if path.exists():
        return
    model, tokenizer = load()
    if stage == "diagnostics":
        start = time.perf_counter()
        scores, generated, passed = diagnostics.diagnose(model, tokenizer, task, SEEDS[0])
        _write(path, {"scores": scores, "tokens": generated + passed, "seconds": time.perf_counter() - start})
    else:
        recipe = demo_recipe(task, TRAINING_STEPS)
        ranking = rank_by_short_runs(
            model, tokenizer, task, seed=SEEDS[0], training_steps=TRAINING_STEPS, recipe=recipe
        )
        _write(path, json.loads(ranking.to_json()))


def _write(path: Path, data: dict) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(data, indent=1) + "\n")
    scratch.rename(path)
    print(path, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("bases", "truth", "rank", "table"), help="default: all")
    parser.add_argument("--quick", action="store_true", help="three small cases, one seed, one budget")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="of rank (default: all)")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="such as wide12-arithmetic-grpo")
    parser.add_argument("--bases", type=Path, default=HERE / "bases", help="folder of the models")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results, or quick, beside this file)")
    parser.add_argument("--workers", type=int, help="runs at a time in the sweeps (default: one per core)")
    options = parser.parse_args()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    out = options.out or HERE / ("quick" if options.quick else "results")
    parts = options.part or ("bases", "truth", "rank", "table")
    only = options.only or (QUICK if options.quick else None)
    cells = [c for c in (*UNDAMAGED, *VIOLATING, *CORRELATED) if not only or c.name in only]
    if options.quick:
        cells = [Cell(c.base, c.task, c.algorithm) for c in cells]
    for cell in cells:
        if "bases" in parts:
            models.make(next(b for b in (*models.PRETRAINED, *models.DAMAGED) if b.name == cell.base), options.bases)
        if "truth" in parts:
            measure(cell, options.bases, out / "truth", options.workers)
    if "rank" in parts:
        for stage in options.stages or (STAGES[:2] if options.quick else STAGES):
            for cell in cells:
                if cell.algorithm == "grpo":
                    rank(cell, options.bases, out / "rankings" / cell.name, stage)
    if "table" in parts:
        every = cells if options.quick else [*UNDAMAGED, *VIOLATING, *CORRELATED]
        write_results(every, out, None if out != HERE / "results" else HERE.parents[1] / "README.md")


if __name__ == "__main__":
    main()
