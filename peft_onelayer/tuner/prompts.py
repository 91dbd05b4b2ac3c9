"""Completions of one prompt share its first pass: `generate` is given every prompt once for each of its completions.

The pass runs the rows that differ, and what it leaves in the cache is then there for all rows. Every row gets the
numbers of a batch of the differing rows, so that they may differ by the rounding of another batching. Where rows take
different adapters, only the blocks below the lowest one that an adapter trains are shared.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

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
    decoder = decoder_of(model)
    if decoder is None:
        yield
        return
    own, whole, thread = vars(decoder).get("forward"), decoder.forward, threading.get_ident()

    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or threading.get_ident() != thread:
            return whole(*args, **kwargs)
        if cache is None or not kwargs.get("use_cache") or not _is_fresh(cache):
            return whole(*args, **kwargs)
        inputs = pass_inputs(decoder, whole, args, kwargs, left_out=("past_key_values",))
        first = {row: index for index, row in reversed(list(enumerate(inputs.rows)))} if inputs else {}
        if inputs is None or len(first) == len(inputs.rows):
            return whole(*args, **kwargs)
        chosen = sorted(first.values())
        place = {inputs.rows[index]: at for at, index in enumerate(chosen)}
        device = inputs.given["input_ids"].device
        back = torch.tensor([place[row] for row in inputs.rows], device=device)
        rows = {name: inputs.given[name][torch.tensor(chosen, device=device)] for name in inputs.by_row}
        unique = {**inputs.given, **rows}
        if (lowest := _lowest_mixed(decoder)) is not None:
            return _share_below(decoder, lowest, whole, args, kwargs, unique, back)
        output = whole(**unique)
        cache.batch_select_indices(back)
        output.last_hidden_state = output.last_hidden_state[back.to(output.last_hidden_state.device)]
        return output

    decoder.forward = forward
    try:
        yield
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own


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


def _share_below(
    decoder: nn.Module, lowest: int, whole: Any, args: tuple, kwargs: dict[str, Any], unique: dict, back: torch.Tensor
) -> Any:
    """A first pass whose blocks below `lowest` run the rows that differ, and the others all rows.

    Args:
        whole: the decoder's forward.
        args, kwargs: what it is given.
        unique: the same by name, of the rows that differ.
        back: for each row, which of those it equals.
    """
    cache = kwargs["past_key_values"]
    below = DynamicCache(config=decoder.config)
    fits = [type(layer) for layer in below.layers] == [type(layer) for layer in cache.layers]
    if lowest == 0 or not fits:
        return whole(*args, **kwargs)
    blocks = find_decoder_stack(decoder).blocks
    states = hidden_states_entering(blocks, lowest, lambda: whole(**{**unique, "past_key_values": below}))
    with starting_at(replace(states, values=states.values[back.to(states.values.device)])):
        output = whole(*args, **kwargs)
    for index in range(lowest):  # what the pass above has skipped
        below.layers[index].batch_select_indices(back)
        cache.layers[index] = below.layers[index]
    return output


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The module of a model, wrapped by PEFT or not, whose forward runs the blocks; None without one stack of them."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        return base.get_submodule(find_decoder_stack(base).owner)
    except ValueError:
        return None


def _is_fresh(cache: Any) -> bool:
    """Whether a cache is empty, and its rows can be chosen once it is not."""
    if type(cache) is not DynamicCache or cache.get_seq_length() or cache.offloading:
        return False
    return all(type(layer) in LAYERS for layer in cache.layers)
