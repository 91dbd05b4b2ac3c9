"""Completions of one prompt share its first pass: `generate` is given every prompt once for each of its completions.

The pass runs the rows that differ, and what it leaves in the cache is then there for all rows. Every row gets the
numbers of a batch of the differing rows, so that they may differ by the rounding of another batching. Where rows take
different adapters, only the blocks below the lowest one that an adapter trains are shared.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from peft_onelayer.seams import check

from .layer import SingleLayerLayer
from .pass_inputs import pass_inputs
from .prefix import hidden_states_entering, starting_at
from .stack import find_decoder_stack

LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # of a cache, whose rows can be chosen


@contextmanager
def sharing_prompts(model: nn.Module) -> Iterator[None]:
    """Within, the first pass of a generation runs equal rows once, in this thread.

    It does so for prompts without padding and with, for `num_return_sequences` and for beams. Passes with gradients,
    with other caches than transformers' dynamic one and with embeddings in place of token ids are left alone, and so
    are models without one stack of blocks.

    Args:
        model: wrapped by PEFT or not.
    """
    check(__name__)
    decoder = decoder_of(model)
    if decoder is None:
        yield
        return
    sharing = _Sharing()
    handles = [
        decoder.register_forward_pre_hook(sharing.before, with_kwargs=True),
        decoder.register_forward_hook(sharing.behind, with_kwargs=True, always_call=True),
    ]
    try:
        yield
    finally:
        sharing.skipping.close()
        for handle in handles:
            handle.remove()


class _Sharing:
    """The hooks of one thread.

    Attributes:
        back: for each row of the pass under way, its place among those that differ; None where nothing is shared.
        below: what the blocks that a pass skips left in a cache of their own, of the rows that differ; None for none.
        skipping: while a pass skips blocks.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.back: torch.Tensor | None = None
        self.below: list[Any] | None = None
        self.skipping = ExitStack()
        self.busy = False

    def _is_due(self) -> bool:
        return threading.get_ident() == self.thread and not self.busy

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not self._is_due():
            return None
        self.skipping.close()
        self.back = self.below = None
        if not kwargs.get("use_cache") or not is_fresh(kwargs.get("past_key_values")):
            return None
        inputs = pass_inputs(decoder, args, kwargs, left_out=("past_key_values",))
        if inputs is None or len(set(inputs.rows)) == len(inputs.rows) or set(inputs.by_row) - set(inputs.given):
            return None
        places = {row: place for place, row in enumerate(dict.fromkeys(inputs.rows))}
        device = inputs.given["input_ids"].device
        back = torch.tensor([places[row] for row in inputs.rows], device=device)
        chosen = torch.tensor([inputs.rows.index(row) for row in places], device=device)
        unique = {**inputs.given, **{name: inputs.given[name][chosen] for name in inputs.by_row}}
        lowest = _lowest_mixed(decoder)
        if lowest is None:
            self.back = back
            return (), unique
        self._skip(decoder, lowest, unique, back)
        return None

    def _skip(self, decoder: nn.Module, lowest: int, unique: dict[str, Any], back: torch.Tensor) -> None:
        """Run the rows that differ through the blocks below `lowest`, which the pass under way then skips."""
        below = DynamicCache(config=decoder.config)
        fits = [type(layer) for layer in below.layers] == [type(layer) for layer in unique["past_key_values"].layers]
        if lowest == 0 or not fits:
            return
        blocks = find_decoder_stack(decoder).blocks
        self.busy = True
        try:
            states = hidden_states_entering(blocks, lowest, lambda: decoder(**{**unique, "past_key_values": below}))
        finally:
            self.busy = False
        self.skipping.enter_context(starting_at(replace(states, values=states.values[back.to(states.values.device)])))
        self.back, self.below = back, below.layers[:lowest]

    def behind(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not self._is_due():
            return
        self.skipping.close()
        back, below, cache = self.back, self.below, cast(DynamicCache, kwargs.get("past_key_values"))
        self.back = self.below = None
        if back is None or output is None:  # nothing shared, or an exception
            return
        if below is None:
            cache.batch_select_indices(back)
            output.last_hidden_state = output.last_hidden_state[back.to(output.last_hidden_state.device)]
            return
        for index, layer in enumerate(below):
            layer.batch_select_indices(back)
            cache.layers[index] = layer


def _lowest_mixed(decoder: nn.Module) -> int | None:
    """The lowest block with a module whose rows take different adapters, or 0 where one stands before the blocks; None
    where all rows take the same."""
    names = [m.row_adapters or [] for m in decoder.modules() if isinstance(m, SingleLayerLayer)]
    if not any(len(set(own)) > 1 for own in names):
        return None
    for index, block in enumerate(find_decoder_stack(decoder).blocks):
        for module in block.modules():
            if isinstance(module, SingleLayerLayer) and set(module.row_adapters or []) & set(
                module.single_layer_params
            ):
                return index
    return 0


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The module of a model, wrapped by PEFT or not, whose forward runs the blocks; None without one stack of them."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        return base.get_submodule(find_decoder_stack(base).owner)
    except ValueError:
        return None


def is_fresh(cache: Any) -> bool:
    """Whether a cache is empty, and its rows can be chosen once it is not."""
    return can_be_split(cache) and not cache.get_seq_length()


def can_be_split(cache: Any) -> bool:
    """Whether the rows of a cache can be chosen."""
    return type(cache) is DynamicCache and not cache.offloading and all(type(layer) in LAYERS for layer in cache.layers)
