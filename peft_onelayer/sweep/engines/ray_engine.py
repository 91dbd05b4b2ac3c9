"""Runs on a Ray cluster, one task each: the one at RAY_ADDRESS, or one of this machine alone. Needs the extra `ray`.

The nodes need the package and the model (a folder at the same path). A task whose process or node is lost is run again
elsewhere, by Ray. Early stopping is Ray Tune's ASHA (arXiv 1810.05934).
"""

from __future__ import annotations

import queue
import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from peft_onelayer.records.text import one_line
from peft_onelayer.sweep.run_layer import FORMAT, Row, RunSpec, run_layer

from . import TRIES, Answer, RunsFailedError, attempt

Answers = queue.SimpleQueue[tuple[RunSpec, Answer] | BaseException | None]

WINDOW = 5  # steps whose mean reward a run is compared by
REDUCTION = 3  # at every rung the best third goes on; rungs at 1/9 and 1/3 of the steps


def run(
    specs: Sequence[RunSpec],
    *,
    folder: Path,
    workers: int | None = None,
    run_row: Callable[..., Row] = run_layer,
    early_stop: bool = False,
) -> Iterator[Row]:
    """Yield the rows of `specs` as they are done; see the package for what happens to failures.

    Every run takes one CPU and, where the cluster has any, one GPU.

    Args:
        folder: Ray Tune's files go to ray/ in it.
        workers: runs at a time (default: as many as the cluster has room for).
        run_row: with `early_stop` it is given `on_step`, as `run_layer`.
        early_stop: stop runs of blocks whose reward falls behind. Only those that reach the same step in this call are
            compared. A stopped one gives a row with "stopped", its steps, with its rewards and without scores.
    """
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, logging_level="ERROR")
    failures: list[tuple[RunSpec, str]] = []
    raced = [spec for spec in specs if early_stop and isinstance(spec.layer, int) and spec.split == "test"]
    try:
        for spec, answer in _tasks([spec for spec in specs if spec not in raced], workers, run_row):
            if "row" in answer:
                yield answer["row"]
            else:
                failures.append((spec, answer["error"]))
        for spec, answer in _race(raced, folder, workers, run_row) if raced else ():
            if "row" in answer:
                yield answer["row"]
            else:
                failures.append((spec, answer["error"]))
    finally:
        if ours:
            ray.shutdown()
    if failures:
        raise RunsFailedError(failures)


def _gpus() -> int:
    return 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0


def _tasks(
    specs: Sequence[RunSpec], workers: int | None, run_row: Callable[..., Row]
) -> Iterator[tuple[RunSpec, Answer]]:
    task = ray.remote(num_cpus=1, num_gpus=_gpus(), max_retries=TRIES - 1)(attempt)
    todo = deque(specs)
    running: dict[ray.ObjectRef, RunSpec] = {}
    try:
        while todo or running:
            while todo and len(running) < (workers or len(specs)):
                spec = todo.popleft()
                running[task.remote(run_row, spec)] = spec
            (done,), _ = ray.wait(list(running), num_returns=1)
            spec = running.pop(done)
            try:
                answer = ray.get(done)
            except ray.exceptions.RayError as error:
                answer = {"error": f"lost {TRIES} times: {one_line(error)}"}
            yield spec, answer
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _race(
    specs: Sequence[RunSpec], folder: Path, workers: int | None, run_row: Callable[..., Row]
) -> Iterator[tuple[RunSpec, Answer]]:
    """Runs as trials of Ray Tune, whose scheduler stops the worse two thirds at every rung."""
    steps = specs[0].steps
    answers: Answers = queue.SimpleQueue()

    def trial(config: dict[str, Any]) -> None:
        rewards: list[float] = []

        def on_step(step: int, reward: float) -> None:
            rewards.append(reward)
            tune.report({"reward": statistics.fmean(rewards[-WINDOW:]), "rewards": rewards})

        answer = attempt(run_row, specs[config["run"]], on_step)
        tune.report({"reward": statistics.fmean(rewards[-WINDOW:]) if rewards else 0.0, "answer": answer})

    # The report behind the last step carries the row; a run that gets there has won.
    scheduler = ASHAScheduler(max_t=steps + 1, grace_period=max(1, steps // REDUCTION**2), reduction_factor=REDUCTION)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1, "gpu": _gpus()}),
        param_space={"run": tune.grid_search(list(range(len(specs))))},
        tune_config=tune.TuneConfig(
            metric="reward", mode="max", scheduler=scheduler, max_concurrent_trials=workers or len(specs)
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder.resolve() / "ray"),
            callbacks=[_Collect(specs, answers)],
            failure_config=tune.FailureConfig(max_failures=TRIES - 1),
            verbose=0,
        ),
    )

    def fit() -> None:
        try:
            tuner.fit()
            answers.put(None)
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=fit, daemon=True).start()
    while (answer := answers.get()) is not None:
        if isinstance(answer, BaseException):
            raise answer
        yield answer


class _Collect(tune.Callback):
    """Puts the answer of every trial that ended into a queue."""

    def __init__(self, specs: Sequence[RunSpec], answers: Answers) -> None:
        self.specs, self.answers = specs, answers

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps its settings in a file, from which nobody continues

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        spec, last = self.specs[trial.config["run"]], trial.last_result
        answer = last.get("answer") or {"row": _stopped(spec, last["rewards"], last["time_total_s"])}
        self.answers.put((spec, answer))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        answer = {"error": f"lost {TRIES} times; see {trial.local_path}"}
        self.answers.put((self.specs[trial.config["run"]], answer))


def _stopped(spec: RunSpec, rewards: list[float], seconds: float) -> Row:
    missing = ("scores", "mean", "standard_error", "greedy_scores", "problems_digest", "versions")
    return {
        "format": FORMAT,
        "digest": spec.digest(),
        "spec": asdict(spec),
        "stopped": len(rewards),
        "steps": len(rewards),
        "rewards": rewards,
        "seconds": round(seconds, 2),
        **dict.fromkeys(missing),
    }
