"""What a pass through a decoder is given, row by row, so that rows that are the same can be told by their bytes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MADE_FROM = "onelayer_made_from"  # of a mask: the smaller tensor that, with the other arguments, it was made from
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")  # which every block would add to


@dataclass(frozen=True)
class PassInputs:
    """The arguments of one call of a decoder's `forward`.

    Attributes:
        given: the arguments by name, those behind `**kwargs` among them.
        rows: for each row of `input_ids`, the bytes of the row in every tensor of two dimensions or more that has a row
            for it.
        rest: everything else: names, shapes and dtypes, the bytes of other tensors, plain values, and autocast.
        by_row: the names of the tensors in `rows`; of one in a dict "argument.name".
    """

    given: dict[str, Any]
    rows: tuple[bytes, ...]
    rest: tuple[Any, ...]
    by_row: tuple[str, ...]


def pass_inputs(
    decoder: nn.Module, args: tuple, kwargs: dict[str, Any], left_out: tuple[str, ...] = ()
) -> PassInputs | None:
    """What a decoder is given; None if it is given no token ids, wants the outputs of its blocks, or holds an object
    whose content is not known.

    Args:
        left_out: names of arguments that do not matter.
    """
    given: dict[str, Any] = {}
    for name, value in inspect.signature(decoder.forward).bind(*args, **kwargs).arguments.items():
        given |= value if name == "kwargs" else {name: value}
    ids = given.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or given.get("inputs_embeds") is not None:
        return None
    config = getattr(decoder, "config", None)
    if any(given.get(name, getattr(config, name, False)) for name in OUTPUTS):
        return None
    rows = [b""] * len(ids)
    rest: list[Any] = [torch.is_autocast_enabled(ids.device.type), torch.get_autocast_dtype(ids.device.type)]
    by_row = []
    for name, value in _by_name(given):
        if name in left_out:
            continue
        value = getattr(value, MADE_FROM, value)
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, bool | int | float | str | None):
                return None
            rest.append((name, value))
            continue
        rest.append((name, value.shape[1:], value.dtype, value.device))
        content = value.detach().contiguous().cpu()
        if value.dim() > 1 and len(value) == len(ids):
            by_row.append(name)
            parts = content.reshape(len(ids), -1).view(torch.uint8).numpy()
            rows = [row + part.tobytes() for row, part in zip(rows, parts, strict=True)]
        else:
            rest.append(content.reshape(-1).view(torch.uint8).numpy().tobytes())
    return PassInputs(given, tuple(rows), tuple(rest), tuple(by_row))


def _by_name(given: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments by name, and those of a dict, such as masks by the kind of block, as "argument.name"."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        found |= (
            {f"{name}.{inner}": part for inner, part in value.items()} if isinstance(value, dict) else {name: value}
        )
    return sorted(found.items())
