"""The process that scores completions within limits: `limits.py` starts it.

It makes the scorers, which are trusted, and forks for every batch. The fork calls the scorer, one completion after the
other, and writes each number as it comes. The kernel ends a fork whose completion has used up its CPU time: the signal
of the timer keeps its default action, which no code of Python has to run for. What waits instead is ended by this
process. The completions that are left go on in another fork.
"""

import contextlib
import json
import os
import pickle
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from peft_onelayer.tasks.limits import MEMORY, WALL, make, receive, send

if sys.platform == "win32":
    raise ImportError("scoring within limits needs fork(), which Windows does not have")

import resource

Results = list[float | None]


def serve() -> None:
    """Answer requests on standard input until it closes.

    A request is pickled: the scorer's name, its argument, the calls, pickled by themselves, and the seconds of each. An
    answer is JSON: a list of numbers, null for a call over its limit, or a string that says what failed.
    """
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # what a scorer prints
    scorers: dict[tuple[str, str], Callable[..., float]] = {}
    while True:
        try:
            name, argument, pickled, seconds = pickle.loads(receive(requests))
        except EOFError:
            return
        answer: Results | str
        try:
            if (name, argument) not in scorers:
                scorers[name, argument] = make(name, argument)
            calls = pickle.loads(pickled)  # which may need what the scorer has imported
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        else:
            answer = _score(scorers[name, argument], calls, seconds, requests.fileno())
        try:
            send(answers, json.dumps(answer).encode())
        except BrokenPipeError:
            return


def _score(scorer: Callable[..., float], calls: Sequence[tuple[Any, ...]], seconds: float, requests: int) -> Any:
    """Return the scores of `calls`, or what the scorer raised; ends this process when `requests` closes meanwhile."""
    results: Results = []
    while len(results) < len(calls):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            _work(scorer, calls[len(results) :], seconds, theirs)
        os.close(theirs)
        failure = None
        try:
            with os.fdopen(ours, "rb", buffering=0) as pipe:
                while len(results) < len(calls):
                    ready, _, _ = select.select([pipe.fileno(), requests], [], [], seconds * WALL)
                    if requests in ready:  # nothing is sent during a batch: it has closed
                        sys.exit()
                    if not ready:
                        break
                    try:
                        one = json.loads(receive(pipe))
                    except EOFError:
                        break
                    if isinstance(one, str):
                        failure = one
                        break
                    results.append(one)
                else:
                    return results
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)  # and what it started
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)  # where it has no group of its own yet
            os.waitpid(child, 0)
        if failure is not None:
            return failure
        results.append(None)
    return results


def _work(scorer: Callable[..., float], calls: Sequence[tuple[Any, ...]], seconds: float, pipe: int) -> NoReturn:
    """In the fork: score the calls, and end."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS does not hold to it
        with open("/proc/self/statm", encoding="utf-8") as file:
            size = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
        _, highest = resource.getrlimit(resource.RLIMIT_AS)
        if highest == resource.RLIM_INFINITY or size < highest:
            resource.setrlimit(resource.RLIMIT_AS, (size, highest))
    results = os.fdopen(pipe, "wb", buffering=0)
    try:
        for call in calls:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            result: float | str | None
            try:
                result = float(scorer(*call))
            except MemoryError:
                result = None
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            send(results, json.dumps(result).encode())
    finally:
        os._exit(0)
