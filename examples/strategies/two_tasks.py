"""Adapters of one block and two tasks, made one by every method: python examples/strategies/two_tasks.py

Block 6 of the embedded demo model learns arithmetic in one run and sorting in another, three seeds. What
`combine` makes of the two, CPI-FT with and without its fourth stage among it, is evaluated on both tasks. Every row
of results/two_tasks.jsonl is made once; the table is printed at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from strategies import MODEL, RESULTS, SEEDS, STEPS, keep, mean_and_error, score, trained

from peft_onelayer import combine_adapters
from peft_onelayer.records.jsonl import read_records
from peft_onelayer.rl.recipe import DEMO_LEARNING_RATE
from peft_onelayer.runs import combine_with_stage_four

TASKS, BLOCK = ("arithmetic", "sort"), 6
METHODS = ("sum", "average", "slerp", "ties", "dare", "cpi")
PROBLEMS = 128
ROWS = RESULTS / "two_tasks.jsonl"


def combinations(name: str, seed: int, scratch: Path) -> dict[str, Any]:
    """The mean score on each task, by what was evaluated."""
    adapters = [trained(scratch / task, seed, DEMO_LEARNING_RATE, task, layer=BLOCK) for task in TASKS]
    made: dict[str, Path | None] = {"base": None}
    made |= {f"adapter of {task}": adapter for task, adapter in zip(TASKS, adapters, strict=True)}
    conflicts: float | None = None
    for method in METHODS:
        found = combine_adapters(adapters, scratch / method, method, base=MODEL, seed=seed)
        made[method], conflicts = scratch / method, found.conflict_share
    made["cpi, stage four"] = scratch / "four"
    combine_with_stage_four(
        adapters,
        scratch / "four",
        TASKS,
        steps=STEPS // 2,
        learning_rate=DEMO_LEARNING_RATE / 3,
        training_seed=seed,
        base=MODEL,
    )
    scores = {what: {task: score(run, task, PROBLEMS).mean for task in TASKS} for what, run in made.items()}
    return {"scores": scores, "conflict_share": conflicts}


def table() -> str:
    """What the rows say."""
    rows = read_records(ROWS)
    lines = [f"| | {' | '.join(TASKS)} | mean of both |", "|---" * (len(TASKS) + 2) + "|"]
    for what in rows[0]["scores"]:
        found = [[row["scores"][what][task] for task in TASKS] for row in rows]
        columns = [*zip(*found, strict=True), [sum(each) / len(each) for each in found]]
        lines.append(f"| {what} | {' | '.join(map(mean_and_error, columns))} |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    for seed in SEEDS:
        keep(ROWS, combinations, name="combine", seed=seed)
    print(table())


if __name__ == "__main__":
    main()
