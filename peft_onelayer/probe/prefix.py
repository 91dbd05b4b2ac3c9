"""Starts passes of a model at one of its blocks, from hidden states kept from an earlier pass.

The blocks below a candidate are frozen, so that what enters its block is the same in every update on one batch, and
for every later candidate a part of what it needs.
"""

from __future__ import annotations

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
    """Within, passes of the model skip the blocks below `states.layer`, whose input are the states' values."""

    def give(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return ((states.values, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states.values})

    with ExitStack() as stack:
        for block, returns_tuple in zip(states.blocks, states.returns_tuple, strict=False):
            stack.enter_context(_replaced_forward(block, _identity(returns_tuple)))
        hook = states.blocks[states.layer].register_forward_pre_hook(give, with_kwargs=True)
        stack.callback(hook.remove)
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
