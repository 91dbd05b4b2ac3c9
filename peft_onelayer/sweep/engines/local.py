"""Runs on this machine: one process per visible GPU or, on the CPU, one per core with a single thread each.

A worker is a new Python process (worker.py), which does one run after the other. It ends with the process that started
it, however that ends, and is replaced when it dies.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from peft_onelayer.sweep.run_layer import Row, RunSpec, run_layer

from . import TRIES, Answer, RunsFailedError


def run(
    specs: Sequence[RunSpec],
    *,
    folder: Path,
    workers: int | None = None,
    run_row: Callable[..., Row] = run_layer,
) -> Iterator[Row]:
    """Yield the rows of `specs` as they are done; see the package for what happens to failures.

    Args:
        folder: gets the workers' standard error, logs/worker-0.log and so on, with a line for every step.
        workers: processes (default: one per visible GPU, without one as many as cores).
        run_row: a function that a new process can import; it takes `spec` and `on_step` of `run_layer`.
    """
    devices = visible_devices()
    count = min(workers or len(devices) or cores(), len(specs))
    if not specs:
        return
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    target = f"{run_row.__module__}:{run_row.__qualname__}"
    team = []
    for i in range(count):
        device = {"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {"OMP_NUM_THREADS": "1"}
        team.append(_Worker(target, device, logs / f"worker-{i}.log"))
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in team:
        idle.put(worker)

    def run_one(spec: RunSpec) -> Answer:
        worker = idle.get()
        try:
            for _ in range(TRIES):
                answer = worker.run(spec)
                if answer:
                    return answer
            return {"error": f"its process died {TRIES} times, at last by {worker.cause}; see {worker.log}"}
        finally:
            idle.put(worker)

    failures = []
    pool = ThreadPoolExecutor(count)
    try:
        futures = {pool.submit(run_one, spec): spec for spec in specs}
        for future in as_completed(futures):
            answer = future.result()
            if "row" in answer:
                yield answer["row"]
            else:
                failures.append((futures[future], answer["error"]))
    finally:
        for worker in team:
            worker.stop()
        pool.shutdown(cancel_futures=True)
        for worker in team:
            worker.close()
    if failures:
        raise RunsFailedError(failures)


def cores() -> int:
    """How many this process may use; outside of Linux, how many there are."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def visible_devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


class _Worker:
    """A process that is started when there is a run to do, and again after it died."""

    def __init__(self, target: str, environment: dict[str, str], log: Path) -> None:
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        self.environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", **environment}
        self.command = [sys.executable, "-P", "-m", "peft_onelayer.sweep.engines.worker", target]
        self.log = log
        self.cause = "nothing"
        self.process: subprocess.Popen[str] | None = None
        self.stopped = False
        self.lock = threading.Lock()  # a process must not be started behind the back of `stop`

    def run(self, spec: RunSpec) -> Answer | None:
        """{"row": ...} or {"error": ...} of the function; None where the process died."""
        with self.lock:
            if self.stopped:
                return {"error": "stopped"}
            if self.process is None:
                with self.log.open("a", encoding="utf-8") as log:
                    pipe = subprocess.PIPE
                    self.process = subprocess.Popen(
                        self.command, stdin=pipe, stdout=pipe, stderr=log, encoding="utf-8", env=self.environment
                    )
        process = self.process
        assert process.stdin and process.stdout
        try:
            print(json.dumps(asdict(spec)), file=process.stdin, flush=True)
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer.endswith("\n"):
            return json.loads(answer)
        code = process.wait()
        self.cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self.close()
        return None

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            if self.process is not None:
                self.process.kill()

    def close(self) -> None:
        if self.process is None:
            return
        assert self.process.stdin and self.process.stdout
        self.process.wait()
        self.process.stdout.close()
        with suppress(BrokenPipeError):  # what it had not read
            self.process.stdin.close()
        self.process = None
