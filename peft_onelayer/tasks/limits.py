"""A limit of time and memory for each completion that a reward scores, in any thread and process.

A scorer that gets an answer such as 1e999999999 may never end, and nothing inside of a process can stop it: signals
reach the main thread only, and not while a C function runs. So the answers are scored in a process of their own
(`scorer.py`), which the kernel ends at the limit:

    scored = score("package.module:make", "argument", [("answer", "column"), ...])
    return settle(scored, kwargs)

That process is started when it is first needed, once per process that scores, and serves one batch at a time. It sees
no GPU, belongs to another session than the terminal's, and ends when this process ends or closes its pipe. A batch
costs one round trip.
"""

import atexit
import importlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

SECONDS = 2.0  # CPU time of one completion
WALL = 5  # times the CPU time, for what waits or does not get the processor
MEMORY = 1 << 30  # bytes beyond what the scoring process holds before it sees an answer
OVER_LIMIT = "completions/over_reward_limit"  # the metric: completions of a batch that were stopped

_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_START = "import sys; sys.path[:] = sys.argv[1:]; from peft_onelayer.tasks import scorer; scorer.serve()"

_lock = threading.Lock()
_process: "subprocess.Popen[bytes] | None" = None


class ScorerError(RuntimeError):
    """The scorer itself failed: it cannot be made, raised an exception, or its process ended."""


def score(
    scorer: str, argument: str, calls: Sequence[tuple[Any, ...]], *, seconds: float = SECONDS
) -> list[float | None]:
    """Call `scorer` for each of `calls` and return its numbers, None for those that passed the limit.

    On Windows, which has neither fork() nor such a clock, the scorer runs in this process and without a limit.

    Args:
        scorer: "package.module:function", a function of one string that returns the callable that scores.
        argument: that string. The callable is made once and kept.
        calls: the positional arguments of each call, of types that pickle; they are read there when the scorer is
            made, so that they may be of classes that making it imports.
        seconds: CPU time of a call. The limit on the time of the clock is `WALL` times as long; that on memory is
            `MEMORY`.

    Raises:
        ScorerError: when the scorer raised an exception; a MemoryError counts as over the limit.
    """
    if sys.platform == "win32":
        function = make(scorer, argument)
        return [float(function(*call)) for call in calls]
    if not calls:
        return []
    request = pickle.dumps((scorer, argument, pickle.dumps(list(calls)), seconds))
    with _lock:
        try:
            answer = _answer(request)
        except (EOFError, BrokenPipeError):  # somebody ended the process
            try:
                answer = _answer(request)
            except (EOFError, BrokenPipeError) as error:
                raise ScorerError("the process that scores completions was ended twice; is memory short?") from error
    if isinstance(answer, str):
        raise ScorerError(answer)
    return answer


def settle(scored: Sequence[float | None], kwargs: Mapping[str, Any]) -> list[float]:
    """Return the rewards, 0 over the limit, and log how many of them those are where the trainer has a log.

    Args:
        scored: from `score`.
        kwargs: of the reward; TRL passes `log_metric` among them.
    """
    # In every call, 0 too: trainers average the metric over calls.
    log_metric: Callable[[str, float], None] | None = kwargs.get("log_metric")
    if log_metric is not None:
        log_metric(OVER_LIMIT, float(sum(one is None for one in scored)))
    return [0.0 if one is None else one for one in scored]


def make(scorer: str, argument: str) -> Callable[..., float]:
    """Import the function named `scorer` and call it with `argument`."""
    module, _, name = scorer.partition(":")
    function: Callable[..., float] = getattr(importlib.import_module(module), name)(argument)
    return function


def send(file: IO[bytes], data: bytes) -> None:
    """Write `data` with its length ahead to an unbuffered file."""
    view = memoryview(len(data).to_bytes(8) + data)
    while view:
        view = view[file.write(view) :]


def receive(file: IO[bytes]) -> bytes:
    """Read what `send` wrote; EOFError where the other side has closed."""
    return _read(file, int.from_bytes(_read(file, 8)))


def _read(file: IO[bytes], size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (chunk := file.read(size - len(data))):
            raise EOFError
        data += chunk
    return data


def _answer(request: bytes) -> Any:
    try:
        return _ask(request)
    except BaseException:  # after Ctrl-C its answer would be taken for the next one's
        _stop()
        raise


def _ask(request: bytes) -> Any:
    global _process
    if _process is None:
        _process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
        )
    assert _process.stdin is not None and _process.stdout is not None
    send(_process.stdin, request)
    return json.loads(receive(_process.stdout))


def _stop() -> None:
    """End the process; it ends what it runs when its input closes."""
    global _process
    process, _process = _process, None
    if process is None:
        return
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:  # it is making a scorer
        process.kill()
        process.wait()


def _forget() -> None:
    """In a forked child: leave the parent's process to the parent, and let the pipe close with the parent."""
    global _lock, _process
    _lock = threading.Lock()
    if _process is not None and _process.stdin is not None and _process.stdout is not None:
        _process.stdin.close()
        _process.stdout.close()
        _process.returncode = 0  # not a child of this process, so nothing to wait for
    _process = None


atexit.register(_stop)
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget)
