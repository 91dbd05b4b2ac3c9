"""Does one block match full-parameter RL? Measured on pretrained models, resumably, run by run.

    python examples/evidence/evidence.py smollm2-135m sums [--models FOLDER] [--minutes 60] [--jobs 1]

FOLDER has a folder for each model. Every finished run is a line of results/MODEL-TASK.jsonl, and runs that are there
are not repeated. `--list` says what is there and what is missing. `--probes` ranks the blocks, and `--retention`
repeats chosen runs to see what they did to another task and to plain text; both have files of their own. `--repeat RUN`
runs one row again and says whether it comes out within the row's interval; it writes nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from measures import execute_probe, probe_runs, retention_of, retention_runs
from one_run import Run, Setting, execute
from planned import RESULTS, SETTINGS, runs, same

from peft_onelayer.records.jsonl import append_record, read_records
from peft_onelayer.statistics import Z_95
from peft_onelayer.sweep.metric import gain


def parse_run(text: str) -> Run:
    """The run that `str(Run)` names, such as "block 15, rate 1e-4, seed 0", "lora-all, rate 0.001, seed 1" or "base".

    Raises:
        ValueError: the text is not of this form.
    """
    match = re.fullmatch(r"([a-z-]+?)(?: (\d+))?(?:, rate ([\d.e-]+))?(?:, seed (\d+))?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} names no run; expected such as 'block 15, rate 1e-4, seed 0' or 'base'")
    kind, block, rate, seed = match.groups()
    return Run(kind, None if block is None else int(block), None if rate is None else float(rate), int(seed or 0))


@dataclass(frozen=True)
class Repetition:
    """A row and the same run again.

    Attributes:
        interval: of the row's mean, at 95 %, over the problems.
        inside: whether the new mean lies in it.
        equal: problems that scored exactly the same.
        difference: new less old, with its paired standard error.
    """

    interval: tuple[float, float]
    inside: bool
    equal: int
    difference: tuple[float, float | None]


def compare(row: Mapping[str, Any], again: Mapping[str, Any]) -> Repetition:
    """Whether a run that was repeated comes out within the interval of its row."""
    low, high = (row["mean"] + sign * Z_95 * row["standard_error"] for sign in (-1, 1))
    equal = sum(a == b for a, b in zip(row["scores"], again["scores"], strict=True))
    return Repetition((low, high), low <= again["mean"] <= high, equal, gain(again["scores"], row["scores"]))


def repeat(setting: Setting, rows: Sequence[dict[str, Any]], text: str, folder: Path) -> bool:
    """Run one row again, say what came out, and whether it lies within the row's interval; nothing is written.

    Raises:
        ValueError: no such row.
    """
    run = parse_run(text)
    found = [row for row in rows if same(run, row)]
    if not found:
        there = "; ".join(str(Run(**row["run"])) for row in rows) or "none"
        raise ValueError(f"no row of {run}; the rows are: {there}")
    row, again = found[0], execute(setting, run, folder)
    seen = compare(row, again)
    difference, error = seen.difference
    print(
        f"{run}: {again['mean']:.4f}, {'within' if seen.inside else 'OUTSIDE'} the row's {row['mean']:.4f} "
        f"[{seen.interval[0]:.4f}, {seen.interval[1]:.4f}]; the difference is {difference:+.4f} ± {error or 0:.4f}, "
        f"and {seen.equal} of {len(row['scores'])} problems scored the same"
    )
    if again["versions"] != row["versions"]:
        print(f"the row's versions: {row['versions']}\nthese versions: {again['versions']}")
    return seen.inside


def collect(
    path: Path,
    wanted: Callable[[], Sequence[Any]],
    there: Callable[[Any, Any], bool],
    make: Callable[[Any], dict[str, Any]],
    minutes: float,
    jobs: int,
) -> list[str]:
    """Make what is wanted and not yet a row of `path`, until nothing is missing or the time is over.

    Args:
        wanted: asked again after every row, as it may name more then.
        there: whether a row is of one that is wanted.
        make: gives the row of one that is wanted; called in other processes.
        minutes: none is begun after so many.
        jobs: that are made at a time, each in a process of its own.

    Returns:
        What failed, with the reason, in a line each; it is not begun again.
    """
    start = time.perf_counter()
    failed: dict[str, str] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        begun: dict[Future[dict[str, Any]], Any] = {}
        while True:
            rows = read_records(path)
            for one in wanted() if time.perf_counter() - start <= 60 * minutes else ():
                known = str(one) in failed or one in begun.values() or any(there(one, row) for row in rows)
                if not known and len(begun) < jobs:
                    begun[pool.submit(make, one)] = one
            if not begun:
                return [f"{name}: {reason}" for name, reason in failed.items()]
            for future in wait(begun, return_when=FIRST_COMPLETED).done:
                one = begun.pop(future)
                if isinstance(error := future.exception(), Exception):
                    failed[str(one)] = f"{type(error).__name__}: {error}"
                    print(f"{one} failed: {failed[str(one)]}", flush=True)
                    continue
                row = future.result()
                append_record(path, row)
                score = f": {row['mean']:.4f} ± {row['standard_error']:.4f}" if "mean" in row else ""
                print(f"{one}{score}, {row['seconds']} s", flush=True)


def study_options(parser: argparse.ArgumentParser, studies: Sequence[Setting], what: str) -> None:
    """Model and task of a study, where the models are, and how long and how many at a time; `what` is one row's."""
    parser.add_argument("model", choices=sorted({setting.model for setting in studies}))
    parser.add_argument("task", choices=sorted({setting.task for setting in studies}))
    default = os.environ.get("ONELAYER_MODELS", "~/.cache/onelayer-models")
    parser.add_argument("--models", type=Path, default=Path(default).expanduser())
    parser.add_argument("--minutes", type=float, default=float("inf"), help=f"begin no {what} after so many")
    parser.add_argument("--jobs", type=int, default=1, help=f"{what}s at a time, on one GPU or on as many cores")


def study_of(parser: argparse.ArgumentParser, options: argparse.Namespace, studies: Sequence[Setting]) -> Setting:
    """The study of the model and the task that were given; the parser's error where there is none."""
    found = next((s for s in studies if (s.model, s.task) == (options.model, options.task)), None)
    return found or parser.error(f"no study of {options.model} on {options.task}")


def check_model(parser: argparse.ArgumentParser, folder: Path) -> None:
    """The parser's error where the folder of a model holds none."""
    if not (folder / "config.json").exists():
        parser.error(f"{folder} holds no model; give the folder that has {folder.name} with --models")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study_options(parser, SETTINGS, "run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="what is there, and what is missing")
    what.add_argument("--probes", action="store_true", help="rank the blocks, by depth and by races")
    what.add_argument("--retention", action="store_true", help="repeat chosen runs, for what they kept")
    what.add_argument("--repeat", metavar="RUN", help="run one row again, such as 'block 15, rate 1e-4, seed 0'")
    options = parser.parse_args()
    setting = study_of(parser, options, SETTINGS)
    folder, path = options.models / setting.model, RESULTS / f"{setting.name}.jsonl"
    rankings = RESULTS / f"{setting.name}-probes.jsonl"

    def wanted() -> list[Run]:
        return list(dict.fromkeys(runs(setting, read_records(path), read_records(rankings))))

    if options.list:
        rows = read_records(path)
        missing = [run for run in wanted() if not any(same(run, r) for r in rows)]
        print(f"{len(rows)} runs are there; next of {len(missing)}: " + "; ".join(map(str, missing[:5])))
        return
    check_model(parser, folder)
    if options.repeat is not None:
        try:
            sys.exit(not repeat(setting, read_records(path), options.repeat, folder))
        except ValueError as error:
            parser.error(str(error))
    limits = options.minutes, options.jobs
    if options.probes:
        failed = collect(
            rankings,
            lambda: probe_runs(setting),
            lambda probe, row: row["probe"] == probe,
            partial(execute_probe, setting, folder=folder),
            *limits,
        )
    elif options.retention:
        failed = collect(
            RESULTS / f"{setting.name}-retention.jsonl",
            lambda: retention_runs(setting, read_records(path)),
            same,
            partial(execute, setting, folder=folder, also=partial(retention_of, setting)),
            *limits,
        )
    else:
        failed = collect(
            path,
            wanted,
            same,
            partial(execute, setting, folder=folder),
            *limits,
        )
    if failed:
        sys.exit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
