"""Finds a model's stack of transformer blocks and turns a layer specification into block indices.

Knows nothing of adapters: it reads a module tree and returns names and numbers.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

LAYER_FORMS = 'an index, a list of indices, a range such as "8-13", "middle" or "mid-5"'


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


def parse_layers(layer: int | str | Sequence[int]) -> int | tuple[str, int, int] | list[int]:
    """Check the form of a layer specification; the number of layers is not needed for that.

    Returns an index, a list of indices, ("range", first, last) or ("mid", k, 0) with k = 0 for "middle".

    Raises:
        ValueError: the form is not one of `LAYER_FORMS`, or a list is empty.
    """
    if isinstance(layer, str):
        text = layer.strip()
        if re.fullmatch(r"-?\d+", text):
            return int(text)
        if match := re.fullmatch(r"(\d+)-(\d+)", text):
            first, last = int(match[1]), int(match[2])
            if first > last:
                raise ValueError(f"layer={layer!r} is an empty range; write it as {last}-{first}.")
            return ("range", first, last)
        if text == "middle":
            return ("mid", 0, 0)
        if match := re.fullmatch(r"mid-(\d+)", text):
            if int(match[1]) < 1:
                raise ValueError(f"layer={layer!r} selects no layer; use mid-1 or more.")
            return ("mid", int(match[1]), 0)
        near = difflib.get_close_matches(text, ["middle", "mid-5"], n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ValueError(f"layer={layer!r} is not understood; expected {LAYER_FORMS}.{hint}")
    if isinstance(layer, Sequence) and not isinstance(layer, bytes):
        if not layer:
            raise ValueError(f"layer={layer!r} is empty; expected {LAYER_FORMS}.")
        return [_index(item, layer) for item in layer]
    return _index(layer, layer)


def _index(item: object, layer: object) -> int:
    try:
        if isinstance(item, bool):
            raise TypeError
        return operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"layer={layer!r} is not understood; expected {LAYER_FORMS}.") from None


def resolve_layers(layer: int | str | Sequence[int], num_layers: int) -> list[int]:
    """Turn a layer specification into ascending block indices 0 <= i < `num_layers`.

    "middle" is block num_layers // 2. "mid-k" is the paper's rule without profiling (arXiv 2607.01232):
    the blocks floor(L/2 - k/2) <= i < floor(L/2 + k/2).

    >>> resolve_layers(-1, 28), resolve_layers("middle", 28), resolve_layers("8-10", 28)
    ([27], [14], [8, 9, 10])
    >>> resolve_layers("mid-5", 28)
    [11, 12, 13, 14, 15]

    Raises:
        ValueError: malformed, out of range, empty, or naming one block twice.
    """
    parsed = parse_layers(layer)
    if isinstance(parsed, tuple):
        kind, first, last = parsed
        if kind == "range":
            indices = list(range(first, last + 1))
        elif first == 0:
            indices = [num_layers // 2]
        elif first > num_layers:
            raise ValueError(f"layer={layer!r} asks for {first} of {num_layers} layers.")
        else:
            indices = list(range((num_layers - first) // 2, (num_layers + first) // 2))
    else:
        indices = parsed if isinstance(parsed, list) else [parsed]
    for index in indices:
        if not -num_layers <= index < num_layers:
            raise ValueError(
                f"layer={layer!r} is out of range: the model has {num_layers} layers, "
                f"so an index is 0 to {num_layers - 1} (or -{num_layers} to -1)."
            )
    indices = [index % num_layers for index in indices]
    if len(set(indices)) < len(indices):
        raise ValueError(f"layer={layer!r} names a layer twice (counted from 0: {indices}); name each layer once.")
    return sorted(indices)
