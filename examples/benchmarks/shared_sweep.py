"""CPU time of a sweep's runs in processes of their own (`--engine local`) against in one process (`--engine shared`).

    python examples/benchmarks/shared_sweep.py [--model MODEL] [--layers all] [--steps 6] [--problems 128]

GRPO with the defaults of `onelayer sweep`, 8 prompts x 8 completions a step and 4 completions of each problem, of every
block that is named and of the base. The full-parameter run is left out: it is the same for both. Without MODEL it is
the embedded demo model on its sums; with one it is `examples/evidence/sums.py`. The time is that of the whole process
and of those that it starts, imports and loading included. Both engines' rows are compared: how many runs have equal
rewards and scores throughout, and the largest difference of a run's score.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any

from bench import row

SUMS = Path(__file__).parents[1] / "evidence" / "sums.py"


def run_engine(name: str, given: argparse.Namespace) -> None:
    """Run the sweep with one engine, and print its rows as JSON lines."""
    from peft_onelayer.sweep.engines import load_engine
    from peft_onelayer.sweep.plan import plan_sweep
    from peft_onelayer.sweep.settings import SweepSettings

    demo = given.model is None
    rate = given.learning_rate or (3e-3 if demo else 1e-4)
    plan = plan_sweep(
        SweepSettings(
            model=str(files("peft_onelayer") / "demo_model") if demo else given.model,
            task="arithmetic" if demo else str(SUMS),
            layers=given.layers,
            steps=given.steps,
            learning_rate=rate,
            problems=given.problems,
            chat=False,
        )
    )
    specs = [spec for spec in plan.specs if spec.layer != "full"]
    workers = {"shared": given.together or len(specs), "local": given.processes}[name]
    run: Any = load_engine(name)
    with tempfile.TemporaryDirectory() as folder, closing(run(specs, folder=Path(folder), workers=workers)) as rows:
        for done in rows:
            print(json.dumps(done), flush=True)


def measure(name: str) -> tuple[float, dict[str, dict[str, Any]]]:
    """CPU seconds of one engine, and its rows by block."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, {str(done["spec"]["layer"]): done for done in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a pretrained model (default: the demo model)")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--together", type=int, help="runs that share at a time (default: all)")
    parser.add_argument("--processes", type=int, help="of the engine local (default: its own)")
    parser.add_argument("--one", choices=("local", "shared"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_engine(given.one, given)
        return
    shared, together = measure("shared")
    print(f"shared: {shared:.1f} s of CPU for {len(together)} runs", flush=True)
    local, alone = measure("local")
    print(f"local:  {local:.1f} s of CPU; {local / shared:.2f} x")
    equal = [k for k in alone if all(alone[k][what] == together[k][what] for what in ("scores", "rewards"))]
    most = max(abs(alone[k]["mean"] - together[k]["mean"]) for k in alone)
    print(f"rewards and scores all equal in {len(equal)} of {len(alone)} runs; scores differ by at most {most:.4f}")
    row(f"a sweep's {len(alone)} runs, in one process against in their own", shared / local)


if __name__ == "__main__":
    main()
