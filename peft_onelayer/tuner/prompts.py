"""Completions of one prompt share its first pass: `generate` is given every prompt once for each of its completions.

The pass runs the rows that differ, and what it leaves in the cache is then there for all rows. Every row gets the
numbers of a batch of the differing rows, so that they may differ by the rounding of another batching.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .pass_inputs import pass_inputs
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
        if not kwargs.get("use_cache") or not _is_fresh(cache):
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
        output = whole(**{**inputs.given, **rows})
        cache.batch_select_indices(back)
        output.last_hidden_state = output.last_hidden_state[back.to(output.last_hidden_state.device)]
        return output

    decoder.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own  # type: ignore[method-assign]


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
