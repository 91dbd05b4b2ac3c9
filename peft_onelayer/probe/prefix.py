"""Starts passes of a model at one of its blocks, from hidden states kept from an earlier pass.

The blocks below a candidate are frozen, so that what enters its block is the same in every update on one batch, and
for every later candidate a part of what it needs. It knows nothing of losses or candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Entering:
    """What enters a block.

    Attributes:
        blocks: of the model, in order.
        layer: index of the block.
        hidden: (B, T, H), a row per sequence.
        tuples: for each block below, whether it returns a tuple.
    """

    blocks: nn.ModuleList
    layer: int
    hidden: torch.Tensor
    tuples: tuple[bool, ...]

    def part(self, rows: slice | torch.Tensor) -> Entering:
        return Entering(self.blocks, self.layer, self.hidden[rows], self.tuples)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within, passes of the model skip the blocks below and take `hidden` as the input of `layer`."""
        with ExitStack() as stack:
            for i in range(self.layer):
                stack.enter_context(_replaced_forward(self.blocks[i], _identity(self.tuples[i])))
            hook = self.blocks[self.layer].register_forward_pre_hook(self._enter, with_kwargs=True)
            stack.callback(hook.remove)
            yield

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return ((self.hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.hidden})


def reach(blocks: nn.ModuleList, layer: int, run: Callable[[], object], start: Entering | None = None) -> Entering:
    """What enters block `layer`, from the beginning or from `start` at a block that is not above it.

    Args:
        run: passes the sequences through the model; it is ended at `layer`.
    """
    if start is not None and start.layer == layer:
        return start
    found: list[torch.Tensor] = []
    tuples = list(start.tuples) if start else []
    with ExitStack() as stack, torch.no_grad():
        for i in range(start.layer if start else 0, layer):
            hook = blocks[i].register_forward_hook(lambda _, __, output: tuples.append(isinstance(output, tuple)))
            stack.callback(hook.remove)
        stop = blocks[layer].register_forward_pre_hook(_stop_with(found), with_kwargs=True)
        stack.callback(stop.remove)
        if start is not None:
            stack.enter_context(start.in_force())
        with suppress(_StopError):
            run()
    return Entering(blocks, layer, found[0], tuple(tuples))


class _StopError(Exception):
    """Ends a pass at the block that was to be reached."""


def _stop_with(found: list[torch.Tensor]) -> Callable[..., None]:
    def stop(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _StopError

    return stop


def _identity(returns_tuple: bool) -> Callable[..., Any]:
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if returns_tuple else hidden_states

    return forward


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
