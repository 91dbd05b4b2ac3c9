"""Does the block that the race picks gain? The commands that a user types, on a pretrained model.

    python examples/evidence/race.py qwen2.5-coder-0.5b repeated --steps 40 [--models FOLDER] [--jobs 1]

`onelayer probe` with no rate given; then `onelayer train` on its pick (of several blocks the first), on the middle
block and on the one ranked last, at the race's rate, or a rate that is found where it has none; then `onelayer eval`
of each with three seeds. Every command's record is a line of results/MODEL-TASK-race.jsonl. It is not resumed: where
this file is there, nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from one_run import HERE
from planned import DEPTH, RESULTS

from peft_onelayer.records.jsonl import append_record

SEEDS = (0, 1, 2)  # of the evaluation


def onelayer(folder: Path, command: str) -> str:
    """Run a command in `folder`, and say which.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "onelayer_cli", *shlex.split(command)],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise RuntimeError(f"onelayer {command}: exit {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    print(f"onelayer {command}\n{done.stdout}", flush=True)
    return f"onelayer {command}"


def read(file: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return fields


def train_and_evaluate(
    folder: Path, model: str, task: str, steps: int, name: str, block: int, rate: float | None
) -> list[dict[str, Any]]:
    """The rows of one block: its run and its evaluations. `task` is the options that name it."""
    given = "" if rate is None else f" --learning-rate {rate}"
    command = onelayer(folder, f"train {model} {task} --steps {steps} --layer {block}{given} --out {name}")
    common = {"name": name, "block": block}
    rows = [{"what": "run", **common, "command": command, "record": read(folder / name / "run.json")}]
    for seed in SEEDS:
        out = f"{name}-{seed}.json"
        asked = f"eval {model} --adapter {name} {task} --problems 256 --samples 4 --no-greedy --seed {seed} --out {out}"
        onelayer(folder, asked)
        record = {k: v for k, v in read(folder / out).items() if k not in ("problems", "examples")}
        rows.append({"what": "evaluation", **common, "seed": seed, "command": f"onelayer {asked}", "record": record})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(DEPTH))
    parser.add_argument("task", help="of this folder, such as sums")
    parser.add_argument("--steps", type=int, default=60)
    default = os.environ.get("ONELAYER_MODELS", "~/.cache/onelayer-models")
    parser.add_argument("--models", type=Path, default=Path(default).expanduser())
    parser.add_argument("--jobs", type=int, default=1, help="blocks that are trained at a time")
    options = parser.parse_args()
    path = RESULTS / f"{options.model}-{options.task}-race.jsonl"
    if path.exists():
        parser.error(f"{path} is there; take it away to measure again")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / options.model).symlink_to((options.models / options.model).resolve())
        (folder / f"{options.task}.py").write_bytes((HERE / f"{options.task}.py").read_bytes())
        model, task = f"./{options.model}", f"--task {options.task}.py --plain"
        command = onelayer(folder, f"probe {model} {task} --steps {options.steps} --out ranking.json")
        ranking = read(folder / "ranking.json")
        append_record(path, {"what": "ranking", "command": command, "record": ranking})
        chosen = ranking["order"][0] if ranking["pick"] is None else ranking["pick"]
        blocks = {"pick": chosen, "mid": DEPTH[options.model] // 2, "worst": ranking["order"][-1]}
        with ThreadPoolExecutor(options.jobs) as pool:
            made = [
                pool.submit(
                    train_and_evaluate, folder, model, task, options.steps, name, block, ranking["learning_rate"]
                )
                for name, block in blocks.items()
            ]
            for future in as_completed(made):
                for row in future.result():
                    append_record(path, row)


if __name__ == "__main__":
    main()
