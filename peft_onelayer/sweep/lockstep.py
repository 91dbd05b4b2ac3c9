"""Several functions in threads of which one runs at a time, and which wait for each other where they ask for something.

A function asks by `Member.ask`, and waits. When all wait, what they asked for is served together, and they go on. To
each of them the process is as if it ran alone in it: what libraries keep for the whole process, such as states of
random numbers, is exchanged whenever another one goes on.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from peft_onelayer.seams import check

SINGLETONS = (PartialState, AcceleratorState, GradientState)

Serve = Callable[[Sequence["Member"]], None]


class Member:
    """One of the functions.

    Attributes:
        request: what it asks for and waits for; None while it asks for nothing.
        result: what the function returned.
    """

    def __init__(self, name: str, function: Callable[[Member], Any]) -> None:
        self.name, self.function = name, function
        self.request: Any = None
        self.result: Any = None
        self.ended = self.stopped = False
        self._answer: Any = None
        self._state: _ProcessState | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def ask(self, request: Any) -> Any:
        """In the function: wait until `request` is served, and return the answer.

        Raises:
            BaseException: the answer, where it is an exception.
        """
        self.request = request
        self._back.release()
        self._go.acquire()
        self.check()
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def check(self) -> None:
        """In the function: end it here if nobody waits for it any more."""
        if self.stopped:
            raise _StoppedError

    def answer(self, value: Any) -> None:
        """Answer the request: with an exception, to be raised there."""
        self.request, self._answer = None, value

    def go_on(self, outside: _ProcessState) -> None:
        """Let the function run until it asks for something or ends.

        Args:
            outside: what it begins with; what is there afterwards is the function's.
        """
        (self._state or outside).restore()
        if not self._thread.ident:
            self._thread.start()
        self._go.release()
        self._back.acquire()
        self._state = None if self.ended else _ProcessState()

    def stop(self) -> None:
        """End the function where it asks for something or checks, and wait until it has ended."""
        self.stopped = True
        if self._thread.ident:
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self.stopped:
                self.result = self.function(self)
        except _StoppedError:
            pass
        finally:
            self.ended = True
            self._back.release()


def run_together(functions: Mapping[str, Callable[[Member], Any]], serve: Serve) -> Generator[Member, None, None]:
    """Run the functions, and yield each with its result as it ends.

    Args:
        functions: by name; they raise nothing.
        serve: is given all that run, when every one waits; answers at least one of them.
    """
    check(__name__)
    members = [Member(name, function) for name, function in functions.items()]
    living = list(members)
    try:
        while living:
            outside = _ProcessState()
            try:
                for member in living:
                    if member.request is None:
                        member.go_on(outside)
            finally:
                outside.restore()
            ended = [member for member in living if member.ended]
            living = [member for member in living if not member.ended]
            yield from ended
            if living:
                serve(living)
    finally:
        for member in living:
            member.stop()


class _StoppedError(BaseException):
    """Ends a function that nobody waits for any more."""


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Afterwards the process's state is what it was before: for a function that runs here, by itself."""
    before = _ProcessState()
    try:
        yield
    finally:
        before.restore()


class _ProcessState:
    """What libraries keep for the whole process, and a function takes for its own."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self.python, self.numpy = random.getstate(), np.random.get_state()
        self.filters, self.showwarning = warnings.filters, warnings.showwarning  # which `catch_warnings` replaces
        self.singletons = [dict(singleton._shared_state) for singleton in SINGLETONS]

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        warnings.filters, warnings.showwarning = self.filters, self.showwarning
        for singleton, content in zip(SINGLETONS, self.singletons, strict=True):
            singleton._shared_state.clear()
            singleton._shared_state.update(content)
