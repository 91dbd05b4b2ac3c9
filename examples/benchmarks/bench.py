"""Runs the benchmarks of this folder that a CPU can, one after another, and prints one table of their ratios.

    python examples/benchmarks/bench.py [--only NAME ...] [--out FILE.md]

Each script runs by itself too, and prints more. `x` is a ratio of two things measured in one run; `ideal` is what that
ratio would be by the operations or bytes that are needed. Those that need a pretrained model take SmolLM2-135M-Instruct
from `$ONELAYER_MODELS` (default ~/.cache/onelayer-models), and are left out, with a word, where it is not there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FILE = "ONELAYER_BENCH_ROWS"  # names the file that the scripts add their rows to
MODEL = Path(os.environ.get("ONELAYER_MODELS") or "~/.cache/onelayer-models").expanduser() / "smollm2-135m"
PEERS = ["ours", "ours, beta .04", "full", "LoRA, all linears", "freezing"]
SCRIPTS: dict[str, list[str]] = {
    "import_time": ["--rounds", "3"],
    "graph_cut": ["--pairs", "2"],
    "growth": ["--pairs", "2"],
    "training_prompts": ["--prompts", "64", "256"],
    "prefix_cache": ["--rows", "8"],
    "step_calls": ["--steps", "2"],
    "shared_sweep": ["--steps", "2", "--problems", "64"],
    "race_prefix": ["--pairs", "1", "--blocks", "6", "18"],
    "threads": [],
    "half_products": [],
    "mask_memory": [],
    "memory": ["--only", "Qwen3-1.7B-Base"],
    "merge_checkpoint": [],
    "decoding": [str(MODEL), "--rows", "1", "16", "--tokens", "8", "--pairs", "2"],
    "peers": [str(MODEL), "--steps", "1", "--only", *PEERS],
    "sync_bytes": [str(MODEL), "--steps", "2"],
}


def row(what: str, ratio: float, ideal: float | None = None) -> None:
    """Add a row to the table, where a script runs for one."""
    if file := os.environ.get(FILE):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps([Path(sys.argv[0]).stem, what, ratio, ideal]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="file that the table is written to as well")
    given = parser.parse_args()
    missing, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        file.touch()
        for name in given.only:
            if str(MODEL) in SCRIPTS[name] and not (MODEL / "config.json").exists():
                missing.append(name)
                continue
            print(f"--- {name}", flush=True)
            script = Path(__file__).with_name(f"{name}.py")
            done = subprocess.run([sys.executable, str(script), *SCRIPTS[name]], env={**os.environ, FILE: str(file)})
            failed += [name] if done.returncode else []
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [machine(), "", "| benchmark | what | x | ideal |", "|---|---|---|---|"]
    for name, what, ratio, ideal in rows:
        lines.append(f"| {name} | {what} | {ratio:.3f} | {'' if ideal is None else f'{ideal:.3f}'} |")
    for names, why in ((missing, f"Left out, no model in `{MODEL.name}`"), (failed, "Failed")):
        lines += ["", f"{why}: {', '.join(names)}."] if names else []
    table = "\n".join(lines)
    print(f"\n{table}")
    if given.out is not None:
        given.out.write_text(f"# The benchmarks that a CPU can run\n\n{table}\n", encoding="utf-8")
    if failed:
        sys.exit(1)


def machine() -> str:
    """Date, processors and versions, in one line."""
    import torch  # here, because import_time.py compares imports
    from gpu_rows import environment

    row = environment(torch.device("cpu"))
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    return f"{row['date']}, {row['processors']} CPU cores, which had other work. Python {row['python']}, {versions}."


if __name__ == "__main__":
    main()
