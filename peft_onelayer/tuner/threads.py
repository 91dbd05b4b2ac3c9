"""Threads that run one model: which adapters are active and whether they are on is the model's, not a thread's.

Passes that run side by side are independent (`instance.py`). A thread that switches adapters changes the passes of all
others. Such a pass would be of two adapters, or of the base, without a word: it is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .layer import tuned_layers

_SPOILED = -1


class RunningPasses:
    """The passes of one model that are under way, by thread. Two hooks on the model keep them.

    Raises:
        RuntimeError: at a pass's beginning, if another thread has switched the adapters off and runs a pass itself; at
            its end, if another thread has switched adapters since.
    """

    def __init__(self) -> None:
        self.switches: dict[int, int] = {}  # by the thread's identity: those of other threads when its pass began

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        layers = tuned_layers(model)
        if torch.compiler.is_compiling() or not layers:
            return
        mine, owner = threading.get_ident(), layers[0].switched_off_by
        if owner is not None:
            others = [thread for thread in list(self.switches) if thread != mine]
            if owner in others:
                raise RuntimeError(
                    "another thread has switched the model's adapters off and runs it, so this thread would get the "
                    "base's output too; instead of disable_adapter() pass adapter_names= with '__base__' in a call."
                )
            if owner == mine:
                for thread in others:
                    self.switches[thread] = _SPOILED
        self.switches[mine] = switches_of_others(model)

    def end(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook, also called after an exception."""
        if torch.compiler.is_compiling():
            return
        before = self.switches.pop(threading.get_ident(), None)
        if before is not None and before != switches_of_others(model):
            raise _mixed()


def switches_of_others(model: nn.Module) -> int:
    """How often other threads have switched the model's adapters."""
    mine = threading.get_ident()
    return sum(
        count for layer in tuned_layers(model) for thread, count in list(layer.switches.items()) if thread != mine
    )


@contextmanager
def no_switch_by_others(model: nn.Module) -> Iterator[None]:
    """Raise RuntimeError if another thread switches the model's adapters meanwhile."""
    before = switches_of_others(model)
    yield
    if before != switches_of_others(model):
        raise _mixed()


def _mixed() -> RuntimeError:
    return RuntimeError(
        "another thread has switched the model's adapters during this pass, whose output would be of both; switch them "
        "when no other thread runs the model, or pass adapter_names=, which is for one call."
    )
