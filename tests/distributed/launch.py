"""Starts a worker script on several processes of this machine, as torchrun does, and reports what they printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def torchrun(script: Path, *arguments: str | Path, processes: int = 2, timeout: int = 420, **environment: str) -> str:
    """Run `script` on `processes` CPU processes (gloo) and return their output; an AssertionError shows it on failure.

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
        text=True,
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
