"""Runs a worker script on several processes of this machine (CPU, gloo), and reports what they printed."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

TESTS = Path(__file__).parents[1]
# Imported once, by the process that all processes of `run_on_two` are forked from.
PRELOADED = ["torch.distributed.fsdp", "datasets", "transformers.models.qwen3", "peft_onelayer"]
PRELOADED += ["trl.trainer.grpo_trainer", "trl.trainer.sft_trainer"]


def run_on_two(script: Path, folder: Path, timeout: int = 420) -> None:
    """Run `script FOLDER` on two processes with the environment that torchrun gives; they print to FOLDER/RANK.log.

    Three interpreters that each import TRL, as torchrun starts them, take longer than what the scripts do.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ranks = [context.Process(target=_run, args=(script, folder, rank, port), daemon=True) for rank in (0, 1)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        while any(process.exitcode is None for process in ranks) and not any(process.exitcode for process in ranks):
            multiprocessing.connection.wait([process.sentinel for process in ranks if process.exitcode is None], 1)
            if time.monotonic() > deadline:
                break
    finally:
        for process in ranks:
            process.kill()
            process.join()
    said = "\n".join((folder / f"{rank}.log").read_text(encoding="utf-8")[-8000:] for rank in (0, 1))
    ended = [process.exitcode for process in ranks]
    assert ended == [0, 0], f"{script.name} ended with {ended} (limit {timeout} s); it printed:\n{said}"


def _run(script: Path, folder: Path, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)

    sys.argv = [str(script), str(folder)]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def end() -> None:
    """Ends the process group, after what DistributedDataParallel made of it.

    The last that holds a process group waits for its threads. A DistributedDataParallel does so with the interpreter's
    lock, for which one of the threads may be waiting.
    """
    gc.collect()
    dist.destroy_process_group()


def torchrun(script: Path, *arguments: str | Path, processes: int = 2, timeout: int = 420, **environment: str) -> str:
    """Run `script` by torchrun itself and return the output; an AssertionError shows it on failure.

    `--standalone` takes a free port. `accelerate launch --cpu --num_processes 2` would start one process.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    process = subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException:  # also an interrupt: the workers are torchrun's children, not ours
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{script.name} was stopped (limit {timeout} s); it printed:\n{output}") from None
    assert process.returncode == 0, f"{script.name} ended with {process.returncode}; it printed:\n{output[-8000:]}"
    return output
