"""Running an untrusted Python program against tests, so that it can neither harm the machine nor fake the result.

    >>> run(["def double(x): return 2 * x"], "assert double(4) == 8", ["double"])
    Outcome(passed=True, reason='')
    >>> run(["import os; os._exit(0)"], "assert double(4) == 8", ["double"])
    Outcome(passed=False, reason='the program exited with code 0')

The program and the tests run in two processes (`child.py`). The tests call the program's functions by value:
arguments and results cross a pipe as plain data, and the tests compare built-in objects of their own. The program never
holds the tests, their expected values or the channel of the result, so that exiting, printing, replaced builtins,
objects that equal everything, and search through frames or memory gain nothing: it passes by answering right.

What holds the program, on Linux with user namespaces:

- its own process namespace and process group: when the tests end, or at the time limit, the kernel kills all of it;
- no network: an empty network namespace, and no sockets;
- a file system of its own: the interpreter's libraries, read-only, and an empty working directory in memory;
- limits on time, CPU time, address space, size of files, number of processes and threads, open files, timers;
- an empty environment, a user without capabilities and without way to gain them, and a filter of system calls.

What this does not cover:

- Bugs of the kernel or the processor, and what uname() and timing tell about the machine. Where somebody means harm,
  run all of it in a virtual machine.
- The limits on memory and CPU time are per process: together the processes of one program may use `processes` times
  `memory`, and `scratch` bytes besides. Where memory runs out, the kernel ends the sandbox before the training.
- The kernel counts pipes per user: one program can hold 63, of some thousand.
- A program that knows the right answers passes, wherever it has them from, also if it tried something else before.
- Only the standard library can be imported, and what is in the interpreter's `lib` folders can be read.
- Results other than plain data fail: None, numbers, strings, bytes, lists, tuples, sets, dicts, and iterators of these
  pass, those of derived types as the built-in one. The tests see no changes to their arguments, and all exceptions of
  the program as one type.
- The tests are trusted: they too run in the sandbox, but report the result.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 10.0  # seconds
CPU_SECONDS = 3
MEMORY = 512 << 20  # bytes
SCRATCH = 16 << 20  # bytes
PROCESSES = 8
OVER_TIME = ("time limit", "CPU time limit")  # how the reasons of a program that ran into a limit of time begin
START_UP = 60.0  # seconds that a busy machine may take to set a sandbox up and to take it down

_CHILD = Path(__file__).with_name("child.py")

# The kernel limits the processes of every user but root, and not every container tells who is root outside.
_PROBE = """
import os, time
def start_processes():
    for n in range(100):
        try:
            if os.fork() == 0: time.sleep(1000)
        except BlockingIOError:
            return n
    return n
"""


class SandboxError(OSError):
    """No sandbox can be made here, or it broke: nothing is known about the program."""


@dataclass(frozen=True)
class Outcome:
    """What came of a program: whether it passed all tests, and why it did not ("" when it did)."""

    passed: bool
    reason: str = ""


def run(
    programs: Sequence[str],
    tests: str,
    functions: Sequence[str],
    *,
    timeout: float = TIMEOUT,
    cpu_seconds: int = CPU_SECONDS,
    memory: int = MEMORY,
    scratch: int = SCRATCH,
    processes: int = PROCESSES,
    unsafe: bool = False,
) -> Outcome:
    """Run a program, then tests that call its functions, in a sandbox of their own; blocks until all of it is gone.

    May be called from several threads at once.

    Args:
        programs: readings of one program; the first that compiles is run, as a module named "program".
        tests: Python statements; they pass when they end without an exception.
        functions: names of the program that the tests can call, with plain data as arguments.
        timeout: seconds of wall-clock time for the program and the tests together.
        cpu_seconds: CPU time of each process.
        memory: bytes of address space of each process.
        scratch: bytes that all files in the working directory may hold together.
        processes: processes and threads, the two of the sandbox among them.
        unsafe: where no sandbox can be made, run without one. Time, CPU time and memory are limited still, the
            environment is empty, and on Linux (x86_64, aarch64) the filter of system calls holds: no sockets, no
            signals, no leaving of the process group. But the program has your user's rights: it can write to your files
            and to the memory of your processes, this one among them, and so end this process or fake the result. Where
            you are root its number of processes has no limit, and elsewhere what leaves the process group stays alive.

    Raises:
        SandboxError: where no sandbox can be made and `unsafe` is not set, or when it broke.
        ValueError: for tests that do not compile or that pass something other than plain data to a function.
    """
    require(unsafe=unsafe)
    request = {
        "namespaces": available() is None,
        "programs": list(programs),
        "functions": list(functions),
        "timeout": timeout,
        "cpu_seconds": cpu_seconds,
        "memory": memory,
        "scratch": scratch,
        "processes": processes,
    }
    return _run(request, tests, deadline=timeout + START_UP)


@functools.cache
def available() -> str | None:
    """Return None where `run` can make a sandbox, else one line that says why not; found out by making one."""
    if sys.platform != "linux":
        return f"running a model's code needs Linux with user namespaces, and this is {sys.platform}"
    limits = {"cpu_seconds": CPU_SECONDS, "memory": MEMORY, "scratch": SCRATCH, "processes": PROCESSES}
    request = {"namespaces": True, "programs": [_PROBE], "functions": ["start_processes"], "timeout": 60.0} | limits
    tests = f"assert start_processes() <= {PROCESSES - 2}  # more: nothing limits the processes of root"
    try:
        outcome = _run(request, tests, deadline=60.0 + START_UP)
    except SandboxError as error:
        return str(error)
    return None if outcome.passed else f"no sandbox can be made here: {outcome.reason}"


def require(*, unsafe: bool) -> None:
    """Raise `SandboxError` where no sandbox can be made, or only warn of what is missing if that is accepted."""
    why = available()
    if why and not unsafe:
        raise SandboxError(f"{why}. --unsafe (in Python unsafe=True) runs the code without a sandbox")
    if why:
        warnings.warn(
            f"{why}. The model's code runs without a sandbox: it can read and write whatever you can",
            stacklevel=3,
        )


def _run(request: dict[str, Any], tests: str, deadline: float) -> Outcome:
    head = json.dumps(request).encode()
    environment = {"PYTHONHASHSEED": "0"}  # sets have the same order in every run
    if "LD_LIBRARY_PATH" in os.environ:  # the interpreter may not start without it
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    with contextlib.nullcontext("/") if request["namespaces"] else tempfile.TemporaryDirectory() as folder:
        ours, theirs = socket.socketpair()  # a pipe of this process could be opened by others of the same user
        process = subprocess.Popen(
            # -P, -s, -S: only the standard library on the path
            [sys.executable, "-P", "-s", "-S", "-B", str(_CHILD)],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        try:
            ours.settimeout(deadline)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended, and says why
                ours.sendall(len(head).to_bytes(8) + head + tests.encode())
                ours.shutdown(socket.SHUT_WR)
            _, errors = process.communicate(timeout=deadline)
            output = _received(ours)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired | TimeoutError):
                raise SandboxError(
                    f"the sandbox did not end within {deadline:g} s; is the machine overloaded?"
                ) from error
            raise
        finally:
            ours.close()
    lines = [json.loads(line) for line in output.splitlines()] or [{}]
    if why := lines[0].get("refused"):
        raise SandboxError(
            f"no sandbox can be made here ({why}): it needs Linux 5.14 with user namespaces; in Docker run with "
            "--security-opt seccomp=unconfined --security-opt apparmor=unconfined, on Ubuntu set "
            "kernel.apparmor_restrict_unprivileged_userns=0"
        )
    if "started" not in lines[0]:
        last_words = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise SandboxError(f"the sandbox ended with code {process.returncode} before it ran anything: {last_words}")
    result = lines[1] if len(lines) > 1 else {"failed": "the processes of the sandbox were killed"}
    if "invalid" in result:
        raise ValueError(result["invalid"])
    return Outcome("passed" in result, result.get("failed", ""))


def _received(connection: socket.socket) -> bytes:
    chunks = []
    with contextlib.suppress(ConnectionResetError):  # the other side has left something unread
        while chunk := connection.recv(1 << 16):
            chunks.append(chunk)
    return b"".join(chunks)
