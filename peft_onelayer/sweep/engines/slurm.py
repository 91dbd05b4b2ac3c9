"""Runs on a Slurm cluster, one job each, through submitit. Needs the extra `slurm`.

The folder must be on a file system that the nodes share. A job whose process or node is lost is submitted again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit

from peft_onelayer.records.text import one_line
from peft_onelayer.sweep.run_layer import Row, RunSpec, run_layer

from . import TRIES, Answer, RunsFailedError, attempt

DAY = 24 * 60  # minutes


def run(
    specs: Sequence[RunSpec],
    *,
    folder: Path,
    workers: int | None = None,
    run_row: Callable[[RunSpec], Row] = run_layer,
    parameters: Mapping[str, Any] | None = None,
    poll: float = 5.0,
) -> Iterator[Row]:
    """Yield the rows of `specs` as their jobs end; see the package for what happens to failures.

    Args:
        folder: submitit's files and the jobs' logs go to slurm/ in it.
        workers: jobs in the queue at a time (default: all).
        parameters: of `submitit.AutoExecutor.update_parameters`, such as {"slurm_partition": "gpu", "gpus_per_node":
            1, "timeout_min": 600}; and "cluster", submitit's executor: "slurm", or "local" to try it without a cluster.
        poll: seconds between looks at the jobs.

    Raises:
        ValueError: no Slurm here, or parameters that submitit does not take.
    """
    settings = {"name": "onelayer-sweep", "timeout_min": DAY, "tasks_per_node": 1, **(parameters or {})}
    cluster = settings.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder / "slurm", cluster=cluster)
        executor.update_parameters(**settings)
    except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:  # as submitit refuses
        raise ValueError(f"submitit refused {cluster} with {settings}: {one_line(error)}") from error
    todo = deque((spec, 1) for spec in specs)
    running: dict[submitit.Job, tuple[RunSpec, int]] = {}
    failures = []
    try:
        while todo or running:
            while todo and len(running) < (workers or len(specs)):
                spec, tries = todo.popleft()
                running[executor.submit(attempt, run_row, spec)] = spec, tries
            ended = [job for job in running if job.done()]
            if not ended:
                time.sleep(poll)
            for job in ended:
                spec, tries = running.pop(job)
                lost = job.exception()
                if lost is not None and tries < TRIES:
                    todo.append((spec, tries + 1))
                    continue
                answer: Answer = {"error": f"lost {TRIES} times; see {job.paths.stderr}"}
                if lost is None:
                    answer = job.result()
                if "row" in answer:
                    yield answer["row"]
                else:
                    failures.append((spec, answer["error"]))
    finally:
        for job in running:
            job.cancel(check=False)
    if failures:
        raise RunsFailedError(failures)
