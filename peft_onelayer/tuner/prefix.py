"""Starts passes of a model at one of its blocks, from hidden states kept from an earlier pass.

The blocks below a trained one are frozen, so that what enters it is the same in every pass over one batch: in a race's
updates (for every later candidate a part of what it needs), and for a policy, its older self and its reference.

The states are what the last block below returns, and not what a hook gives to the first block above. Such a hook runs
inside what is checkpointed before transformers 5.23, and would not be there when the backward pass runs it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states that enter a block.

    Attributes:
        blocks: of the model, in order.
        layer: index of the block.
        values: (B, T, H), in the model's dtype, a row per sequence.
        returns_tuple: for each block below, whether its forward returns a tuple.
    """

    blocks: nn.ModuleList
    layer: int
    values: torch.Tensor
    returns_tuple: tuple[bool, ...]

    def part(self, rows: slice | torch.Tensor) -> HiddenStates:
        return replace(self, values=self.values[rows])


@contextmanager
def starting_at(states: HiddenStates) -> Iterator[None]:
    """Within, this thread's passes of the model skip the blocks below `states.layer`, whose input are the states'
    values."""
    below = states.blocks[: states.layer]
    with ExitStack() as stack:
        for index, (block, returns_tuple) in enumerate(zip(below, states.returns_tuple, strict=True)):
            values = states.values if index == states.layer - 1 else None
            stack.enter_context(_replaced_forward(block, returns_tuple, values))
        yield


def hidden_states_entering(
    blocks: nn.ModuleList, layer: int, run_model: Callable[[], object], start: HiddenStates | None = None
) -> HiddenStates:
    """The hidden states that enter block `layer`.

    Args:
        run_model: passes the sequences through the model; the pass is ended at `layer`.
        start: the states that enter a block which is not above `layer`, to start the pass there.
    """
    if start is not None and start.layer == layer:
        return start
    found: list[torch.Tensor] = []
    returns_tuple = list(start.returns_tuple) if start else []

    def note_type(block: nn.Module, args: tuple, output: object) -> None:
        returns_tuple.append(isinstance(output, tuple))

    def stop(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _BlockReachedError

    with ExitStack() as stack, torch.no_grad():
        for block in blocks[start.layer if start else 0 : layer]:
            stack.callback(block.register_forward_hook(note_type).remove)
        stack.callback(blocks[layer].register_forward_pre_hook(stop, with_kwargs=True).remove)
        if start is not None:
            stack.enter_context(starting_at(start))
        with suppress(_BlockReachedError):
            run_model()
    return HiddenStates(blocks, layer, found[0], tuple(returns_tuple))


class _BlockReachedError(Exception):
    """Ends a pass at the block whose input was wanted."""


@contextmanager
def _replaced_forward(block: nn.Module, returns_tuple: bool, values: torch.Tensor | None) -> Iterator[None]:
    """Have a block return `values`, or what it is given; other threads run it as it is."""
    own, whole, thread = vars(block).get("forward"), block.forward, threading.get_ident()

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return whole(hidden_states, *args, **kwargs)
        result = hidden_states if values is None else values
        return (result,) if returns_tuple else result

    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
