"""One batch whose rows take different adapters: PEFT's `adapter_names`, for inference.

A module that adapters are on gets the rows of each adapter separately and puts the results back in order; everything
else runs once for all rows. Knows nothing of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

BASE = "__base__"  # PEFT's name for the base model without an adapter


def batch_size(args: tuple, kwargs: dict[str, Any], plain: bool = False) -> int | None:
    """Rows of the first input tensor among a model's arguments, None if they hold none.

    A `plain` module may call its inputs anything; transformers' models also take tensors that have no row for each.
    """
    names = kwargs if plain else ("input_ids", "inputs", "inputs_embeds")
    given = [*args, *(kwargs.get(name) for name in names)]
    return next((tensor.shape[0] for tensor in given if isinstance(tensor, torch.Tensor)), None)


def row_numbers(names: list[int], repeats: int) -> torch.Tensor:
    """The rows of the batch that belong to these entries of `adapter_names`, (len(names) * repeats,) int64.

    `generate` repeats each row for beams and returned sequences, experts see tokens in place of rows; either way the
    rows of one name lie together.
    """
    return (torch.tensor(names)[:, None] * repeats + torch.arange(repeats)).flatten()


def leading_dimension(values: Sequence[Any]) -> int:
    """Rows of the first tensor among a module's arguments."""
    return next(value.shape[0] for value in values if isinstance(value, torch.Tensor))


def take_rows(value: Any, rows: torch.Tensor, total: int) -> Any:
    """`value` with only these rows of every tensor in it that has `total` rows, (total, ..., ...)."""
    if isinstance(value, torch.Tensor):
        return value[rows.to(value.device)] if value.ndim > 1 and value.shape[0] == total else value
    if isinstance(value, (tuple, list)):
        return type(value)(take_rows(item, rows, total) for item in value)
    return value


def join_rows(parts: list[Any], rows: list[torch.Tensor]) -> Any:
    """Put results computed from `rows` of a batch back in the batch's order. The inverse of `take_rows`."""
    if isinstance(parts[0], torch.Tensor):
        order = torch.cat(rows).argsort()
        return torch.cat(parts)[order.to(parts[0].device)]
    if isinstance(parts[0], tuple):
        return tuple(join_rows(list(items), rows) for items in zip(*parts, strict=True))
    return parts[0]


class CacheRows:
    """The key-value cache of one attention module, while the module runs for some rows of the batch at a time.

    Raises:
        ValueError: a cache of another kind than transformers' dynamic ones.
    """

    def __init__(self, cache: Any, layer: int) -> None:
        self.layers, self.layer = cache.layers, layer
        self.whole: Any = cache.layers[layer] if layer < len(cache.layers) else None
        self.parts: list[Any] = []
        if type(self.whole) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"a cache of {type(self.whole).__name__} cannot be split by rows, as this module with parameters of "
                "its own beside its parts would need; pass use_cache=False with adapter_names."
            )

    def take(self, rows: torch.Tensor) -> None:
        """From here to the next call the module reads and writes these rows."""
        self.parts.append(part := copy.copy(self.whole))
        part.batch_select_indices(rows)
        self.layers[self.layer] = part

    def restore(self) -> None:
        self.layers[self.layer] = self.whole

    def join(self, rows: list[torch.Tensor]) -> None:
        keys, values = ([getattr(part, name) for part in self.parts] for name in ("keys", "values"))
        vars(self.whole).update(vars(self.parts[0]), keys=join_rows(keys, rows), values=join_rows(values, rows))
