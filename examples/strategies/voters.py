"""A vote of adapters on the embedded demo model: python examples/strategies/voters.py

The three best blocks by results/ranking.json (strategies.py makes it) learn arithmetic, each alone. Their adapters give
two completions of each problem, and the best ranked one alone gives six. Every row of results/vote.jsonl is made once;
the table is printed at the end.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from strategies import PROBLEMS, RANKING, RATES, RESULTS, SEEDS, keep, mean_and_error, trained

from peft_onelayer.layers import resolve_layers
from peft_onelayer.records.jsonl import read_records
from peft_onelayer.runs import VoteSettings, vote

ROWS = RESULTS / "vote.jsonl"
VOTERS, VOTES = 3, 2  # adapters, and completions of each


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


def table() -> str:
    """What the rows say."""
    rows, lines = read_records(ROWS), ["| completions | vote | avg | pass |", "|---|---|---|---|"]
    for ballot, what in (("of_adapters", "of three adapters"), ("of_one", "of the best ranked one")):
        figures = ([row[ballot][name]["mean"] for row in rows] for name in ("vote", "average", "best"))
        lines.append(f"| {rows[0]['samples']} {what} | {' | '.join(map(mean_and_error, figures))} |")
    difference = mean_and_error([row["difference"]["mean"] for row in rows])
    return "\n".join([*lines, f"| difference of the votes | {difference} | | |"])


def main() -> None:
    torch.set_num_threads(1)
    for seed in SEEDS:
        keep(ROWS, voting, name="vote", rate=RATES["middle"], seed=seed)
    print(table())


if __name__ == "__main__":
    main()
