"""How far to trust each way of choosing the block: python examples/study/study.py [--part ...] [--quick] [--out DIR]

Ground truth are full sweeps (truth.py) of pretrained bases and of bases with one damaged block (bases.py). Every method
ranks the blocks of every case; the table says how well the ranking and its choice do, and what it cost. Parts:

    bases     build the models                                    (hours on 2 cores with the next two)
    truth     sweep every case
    rank      let every method rank every case
    table     write RESULTS.md and curve.png from the results     (seconds; the results are in the repository)

The results are truth.jsonl and rankings.jsonl, which are only added to: run the same command again to go on after a
kill. --quick takes the three smallest cases.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

import bases as models
import diagnostics
import torch
import transformers
from short_runs import rank_by_short_runs
from table import PAGE, RANKINGS, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer
from truth import CORRELATED, UNDAMAGED, VIOLATING, Cell, measure

from peft_onelayer.probe.probe import probe_layers
from peft_onelayer.records.jsonl import append_record, find_records, read_records
from peft_onelayer.rl.recipe import demo_recipe
from peft_onelayer.tasks import load_task

HERE = Path(__file__).parent
TRAINING_STEPS = 150  # of the demo's recipe, 24 prompts x 8: the run that costs are shares of
SEEDS = (0, 1, 2, 3, 4)  # of the races at the default budget; the first for all else
DEFAULT = 0.25  # the budget
CURVE = (0.05, 0.1, 0.5, 1.0)  # beside the default
PARTS = ("bases", "truth", "rank", "table")
STAGES = ("default", "diagnostics", "curve", "short")
QUICK = ("short6-arithmetic-grpo", "quiet0-arithmetic-grpo", "norms4-arithmetic-grpo")


def rank(cell: Cell, bases: Path, out: Path, stage: str) -> None:
    """Add the rankings of a case that belong to `stage`, one of `STAGES`, unless they are there."""
    asked: list[tuple[str, float | None, int]]
    if stage == "default":
        asked = [(method, DEFAULT, seed) for seed in SEEDS for method in ("auto", "race")]
    elif stage == "curve":
        asked = [("auto", budget, SEEDS[0]) for budget in CURVE]
    else:
        asked = [("diagnostics" if stage == "diagnostics" else "short_runs", None, SEEDS[0])]
    for method, budget, seed in asked:
        key = {"case": cell.name, "method": method, "budget": budget, "seed": seed}
        if not find_records(read_records(out / RANKINGS), **key):
            record = _rank(bases / cell.base, cell.task, method, budget, seed)
            append_record(out / RANKINGS, {**key, "record": record})
            print(*key.values(), flush=True)


def _rank(base: Path, task_name: str, method: str, budget: float | None, seed: int) -> dict[str, Any]:
    task = load_task(task_name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    recipe = demo_recipe(task, TRAINING_STEPS)
    if method == "diagnostics":
        start = time.perf_counter()
        scores, generated, passed = diagnostics.diagnose(model, tokenizer, task, seed)
        return {"scores": scores, "tokens": generated + passed, "seconds": time.perf_counter() - start}
    if method == "short_runs":
        return rank_by_short_runs(
            model, tokenizer, task, seed=seed, training_steps=TRAINING_STEPS, recipe=recipe
        ).to_dict()
    assert budget is not None
    return probe_layers(
        model,
        tokenizer,
        task,
        method=method,
        budget=budget,
        seed=seed,
        training_steps=TRAINING_STEPS,
        recipe=recipe,
    ).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, help="default: all")
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
    parts = options.part or PARTS
    only = options.only or (QUICK if options.quick else None)
    cells = [c for c in (*UNDAMAGED, *VIOLATING, *CORRELATED) if not only or c.name in only]
    if options.quick:
        cells = [Cell(c.base, c.task, c.algorithm) for c in cells]
    for cell in cells:
        if "bases" in parts:
            models.make(next(b for b in (*models.PRETRAINED, *models.DAMAGED) if b.name == cell.base), options.bases)
        if "truth" in parts:
            measure(cell, options.bases, out, options.workers)
    if "rank" in parts:
        for stage in options.stages or (STAGES[:2] if options.quick else STAGES):
            for cell in cells:
                if cell.algorithm == "grpo":
                    rank(cell, options.bases, out, stage)
    if "table" in parts:
        every = cells if options.quick else [*UNDAMAGED, *VIOLATING, *CORRELATED]
        write_results(every, out, PAGE if out == HERE / "results" else None)


if __name__ == "__main__":
    main()
