"""Finds a model's stack of transformer blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class DecoderStack:
    """The blocks of a model in order, and the name of the ModuleList that holds them ("model.layers")."""

    name: str
    blocks: nn.ModuleList

    @property
    def owner(self) -> str:
        """Name of the module whose forward runs the blocks ("model"; "" for the model itself)."""
        return self.name.rpartition(".")[0]


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[DecoderStack]:
    """Every ModuleList with parameters that lies inside no other one (experts lie inside a block)."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and len(child) and all(any(True for _ in m.parameters()) for m in child):
            yield DecoderStack(path, child)
        else:
            yield from _outermost_lists(child, f"{path}.")


def text_config(model: nn.Module):
    """The transformers configuration of the text decoder of `model`, or None for a plain module."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None


def layer_kinds(model: nn.Module) -> list[str] | None:
    """What each block of `model` is, "full_attention" or another kind, where its configuration says so."""
    kinds = getattr(text_config(model), "layer_types", None)
    return None if kinds is None else list(kinds)


def find_decoder_stack(model: nn.Module, layers_pattern: str | None = None) -> DecoderStack:
    """Find the one stack of transformer blocks in `model`.

    A transformers model is searched inside its text decoder, for a ModuleList as long as `num_hidden_layers`; a plain
    module, or a model with an encoder and a decoder, must hold a single ModuleList. `layers_pattern` ("layers",
    "decoder.block") picks one by its name's end.

    Raises:
        ValueError: no stack or several stacks; the message names what was found and how to choose.
    """
    found = list(_outermost_lists(model))
    names = ", ".join(f"{s.name} ({len(s.blocks)} blocks)" for s in found) or "no nn.ModuleList with parameters"
    if layers_pattern is not None:
        chosen = [s for s in found if s.name == layers_pattern or s.name.endswith(f".{layers_pattern}")]
    else:
        chosen, config = found, text_config(model)
        # Of an encoder and a decoder neither is meant more, also where only one is num_hidden_layers long.
        if config is not None and len(chosen) > 1 and not model.config.is_encoder_decoder:  # type: ignore[union-attr]
            if config is not model.config:  # a multimodal model: look inside its text decoder only
                inside = [n for n, m in model.named_modules() if type(getattr(m, "config", None)) is type(config)]
                chosen = [s for s in chosen if any(s.name.startswith(f"{n}.") for n in inside)] or chosen
            depth = getattr(config, "num_hidden_layers", None)  # BLT has three stacks and no depth of its own
            chosen = [s for s in chosen if len(s.blocks) == depth] or chosen
    if len(chosen) == 1:
        return chosen[0]
    what = f"layers_pattern={layers_pattern!r} matches {len(chosen)} of" if layers_pattern is not None else "found"
    problem = "no stack of transformer blocks" if not chosen else "more than one stack of transformer blocks"
    fix = (
        "pass layers_pattern with the name of the one to train" if found else "SingleLayerConfig needs a decoder model"
    )
    raise ValueError(f"{type(model).__name__} has {problem}: {what} {names}; {fix}.")
