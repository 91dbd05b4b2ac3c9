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

from peft_onelayer.seams import check

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
    check(__name__)
    decoder = decoder_of(model)
    if decoder is None:
        yield
        return
    sharing = _Sharing()
    handles = [
        decoder.register_forward_pre_hook(sharing.before, with_kwargs=True),
        decoder.register_forward_hook(sharing.behind, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sharing:
    """The hooks of one thread; `back` holds, for each row of the pass under way, its place among those that differ."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.back: torch.Tensor | None = None

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or threading.get_ident() != self.thread:
            return None
        self.back = None
        if not kwargs.get("use_cache") or not _is_fresh(kwargs.get("past_key_values")):
            return None
        inputs = pass_inputs(decoder, args, kwargs, left_out=("past_key_values",))
        if inputs is None or len(set(inputs.rows)) == len(inputs.rows):
            return None
        places = {row: place for place, row in enumerate(dict.fromkeys(inputs.rows))}
        device = inputs.given["input_ids"].device
        self.back = torch.tensor([places[row] for row in inputs.rows], device=device)
        chosen = torch.tensor([inputs.rows.index(row) for row in places], device=device)
        return (), {**inputs.given, **{name: inputs.given[name][chosen] for name in inputs.by_row}}

    def behind(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != self.thread or self.back is None:
            return
        kwargs["past_key_values"].batch_select_indices(self.back)
        output.last_hidden_state = output.last_hidden_state[self.back.to(output.last_hidden_state.device)]
        self.back = None


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
