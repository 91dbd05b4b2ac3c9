"""Runs the core of the suite in fresh environments, at the lowest and at the newest versions, and prints a table.

    python tests/compat.py [lowest] [newest] [--python 3.13] [--keep NAME==VERSION ...]

`lowest` has every dependency at its lower bound in pyproject.toml, `newest` at the newest version that pip finds within
the bounds. `--keep` sets one dependency to another version. An environment stays in .cache/compat/ and is used again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "compat"
# The tuner (wrapping, training, saving and loading, merging, the graph cut, checkpointing), the sparse encoding and the
# adapter's files, a run of TRL's GRPO, rollouts against TRL's, the trainers of our own, the records, and the demo.
CORE = [
    "tests/test_dependencies.py",
    "tests/test_imports.py",
    "tests/test_package.py",
    "tests/test_seams.py",
    "tests/tuner/test_config.py",
    "tests/tuner/test_training.py",
    "tests/tuner/test_save_load.py",
    "tests/tuner/test_merge.py",
    "tests/tuner/test_graph_cut.py",
    "tests/tuner/test_precision.py",
    "tests/tuner/test_adapters.py",
    "tests/tuner/test_resume.py",
    "tests/tuner/test_steps.py",
    "tests/tuner/test_freed.py",
    "tests/sparse",
    "tests/records",
    "tests/adapter/test_sparse.py",
    "tests/adapter/test_export.py",
    "tests/adapter/test_merge_checkpoint.py",
    "tests/adapter/test_stored.py",
    "tests/rollouts/test_sampling.py",
    "tests/rl/test_training.py",
    "tests/rl/test_gigpo_trainer.py",
    "tests/rl/test_entropy.py",
    "tests/runs/test_training.py",
    "tests/runs/test_demo.py",
    "tests/hub/test_pull.py",
    "tests/sweep/test_local_engine.py",
]
TESTING = ["aiohttp", "build", "packaging>=24.2", "pytest", "setuptools>=77"]
SHOWN = ("torch", "transformers", "peft", "trl", "huggingface-hub", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=["lowest", "newest", []], default=["lowest", "newest"])
    parser.add_argument("--python", default=sys.executable, help="the interpreter (default: the one that runs this)")
    parser.add_argument("--keep", nargs="*", default=[], help="requirements in place of those of pyproject.toml")
    options = parser.parse_args()
    rows = [run(which, options.python, options.keep) for which in options.which]
    header = ("environment", "python", *SHOWN, "passed", "failed", "seconds")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return any(row[-2] != "0" for row in rows)


def requirements(which: str, keep: list[str]) -> list[str]:
    """What the environment is made of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    kept = {re.split(r"[=<>]", requirement)[0]: requirement for requirement in keep}
    declared = [kept.get(requirement.partition(">=")[0], requirement) for requirement in project["dependencies"]]
    if which == "lowest":
        declared = [requirement.partition(",")[0].replace(">=", "==") for requirement in declared]
    return declared


def run(which: str, python: str, keep: list[str]) -> tuple[str, ...]:
    """One row of the table; what pytest prints goes to a file beside the environment."""
    version = output(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    folder = CACHE / "-".join([which, version, *keep])
    interpreter = install(folder, python, requirements(which, keep), upgrade=which == "newest")
    code = f"from importlib.metadata import version; print(*map(version, {SHOWN}))"
    versions = output(interpreter, "-c", code).split()
    log = folder.with_name(f"{folder.name}.log")
    print(f"running the core in {folder.relative_to(ROOT)}; see {log.relative_to(ROOT)}", file=sys.stderr, flush=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CORE]
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
    seconds = f"{time.monotonic() - start:.0f}"
    summary = log.read_text(encoding="utf-8").rstrip().splitlines()[-1]
    passed, failed, errors = (
        sum(map(int, re.findall(rf"(\d+) {word}", summary))) for word in ("passed", "failed", "errors?")
    )
    return (which, version, *versions, str(passed), str(failed + errors) if passed else "all", seconds)


def install(folder: Path, python: str, wanted: list[str], *, upgrade: bool) -> Path:
    """The interpreter of an environment with these requirements, this package and what the tests need."""
    interpreter = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    stamp = folder / "requirements.txt"
    text = "\n".join([*wanted, *TESTING]) + "\n"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == text and not upgrade:
        return interpreter
    print(f"installing {', '.join(wanted)}", file=sys.stderr, flush=True)
    if not stamp.is_file():
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *(["--upgrade"] if upgrade else []), *wanted, *TESTING], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    stamp.write_text(text, encoding="utf-8")
    return interpreter


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
