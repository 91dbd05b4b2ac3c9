"""One batch whose rows take different adapters: PEFT's `adapter_names`, for inference.

A module that adapters are on gets the rows of each adapter separately and puts the results back in order; everything
else runs once for all rows.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .stack import find_decoder_stack, text_config

if TYPE_CHECKING:
    from .layer import SingleLayerLayer

BASE = "__base__"  # PEFT's name for the base model without an adapter
TIME_FIRST = ("xlnet",)  # model types whose blocks take (T, B, H)


class _Now(threading.local):
    """The pass under way in this thread."""

    states: tuple[int, ...] = ()  # the shape of what the block under way was given
    beams = 1  # rows of it for one name; 0 where it has none


_now = _Now()


@contextmanager
def row_adapters(tuner: BaseTuner, names: list[str], args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """Have row i of the batches that `tuner` is called with take the adapter `names[i]`.

    Args:
        tuner: of single-layer adapters.
        names: of adapters, or `BASE` for none.
        args, kwargs: of the call of the model or of its `generate`.

    Raises:
        ValueError: in training mode, while adapters are merged, for names that do not exist, or not one per row; a
            model whose blocks have time before the rows.
    """
    layers = [module for module in tuner.modules() if isinstance(module, tuner.tuner_layer_cls)]
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call eval() first.")
    if any(layer.merged for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if unknown := sorted(set(names) - {BASE} - set(tuner.peft_config)):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; the model has "
            f"{', '.join(tuner.peft_config)}, and {BASE} stands for none."
        )

    config = text_config(tuner.model)
    if config is not None and config.model_type in TIME_FIRST:
        raise ValueError(
            f"Cannot pass `adapter_names` to a model of type {config.model_type}, whose blocks take time before the "
            "rows; run the rows as one batch for each adapter."
        )

    thread = threading.get_ident()  # other threads run the same modules, and with them the hooks

    def check_length(rows: int | None) -> None:
        if threading.get_ident() == thread and rows not in (None, len(names)):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} names for a batch of {rows} rows."
            )

    handles = []
    rows = batch_size(args, kwargs, plain=config is None)
    check_length(rows)
    if rows is None:  # PeftModelForCausalLM.forward keeps the inputs to itself
        handles.append(
            tuner.model.register_forward_pre_hook(
                lambda _, args, kwargs: check_length(batch_size(args, kwargs)), with_kwargs=True
            )
        )

    def note_states(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            _now.states = states = tuple(first_tensor([*args, *kwargs.values()]).shape)
            beams, rest = divmod(states[is_stacked(states)], len(names))
            _now.beams = 0 if rest else beams

    for pattern in {each.layers_pattern for each in tuner.peft_config.values()}:
        for block in find_decoder_stack(tuner.model, pattern).blocks:
            if any(isinstance(module, tuner.tuner_layer_cls) for module in block.modules()):
                handles.append(block.register_forward_pre_hook(note_states, with_kwargs=True))
    for module in tuner.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs: (
                        (args, {**kwargs, "adapter_names": list(names)}) if threading.get_ident() == thread else None
                    ),
                    with_kwargs=True,
                )
            )
    try:
        for layer in layers:
            layer.row_adapters = list(names)
        yield
    finally:
        for layer in layers:
            layer.row_adapters = None
        for handle in handles:
            handle.remove()
        _now.states, _now.beams = (), 1


def rows_by_adapter(layer: SingleLayerLayer) -> dict[str, list[int]]:
    """Which entries of `layer.row_adapters` take each adapter; those whose adapter is elsewhere take the base."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(layer.row_adapters or []):
        rows.setdefault(name if name in layer.single_layer_params else BASE, []).append(row)
    return rows


def adapter_of_all_rows(layer: SingleLayerLayer) -> list[str]:
    """The one adapter that all rows take; RuntimeError if they take several."""
    names = list(rows_by_adapter(layer))
    if len(names) > 1:
        raise RuntimeError(
            f"this model reads a weight of {type(layer.base_layer).__name__} without calling it, so the rows of one "
            "batch cannot take different adapters; run them as one batch for each adapter."
        )
    return names


def run_by_adapter(layer: SingleLayerLayer, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a method of the base layer once for the rows of each adapter; wrapped modules inside it see the same."""
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    cache = CacheRows(caches[0], layer.base_layer.layer_idx) if caches else None
    names = layer.row_adapters or []
    given = first_tensor([*args, *kwargs.values()]).shape
    total, each = given[0], entries_of_a_row(given, len(names) * _now.beams, _now.states)
    if each is None:
        raise RuntimeError(cannot_be_told(layer, f"is given {tuple(given)}"))
    repeats = each * _now.beams
    inside = [module for module in layer.modules() if isinstance(module, type(layer))]
    results, rows = [], []
    try:
        for entries in rows_by_adapter(layer).values():
            rows.append(index := row_numbers(entries, repeats))
            for module in inside:
                module.row_adapters = [names[entry] for entry in entries]
            if cache is not None:
                cache.take(index)
            some = take_rows([list(args), list(kwargs.values())], index, total)
            results.append(layer._run(method, *some[0], **dict(zip(kwargs, some[1], strict=True))))
    finally:
        for module in inside:
            module.row_adapters = names
        if cache is not None:
            cache.restore()
    if cache is not None:
        cache.join(rows)
    try:
        return join_rows(results, rows)
    except ValueError:
        raise RuntimeError(cannot_be_told(layer, "does not return an entry for each row")) from None


def cannot_be_told(layer: SingleLayerLayer, what: str) -> str:
    """Why rows that take different adapters cannot go through a module together."""
    rows = len(layer.row_adapters or []) * _now.beams
    return (
        f"a {type(layer.base_layer).__name__} {what} in a batch of {rows} rows, so the rows cannot take different "
        "adapters there; run them as one batch for each adapter, or train other modules (target_modules)."
    )


def entries_of_a_row(shape: Sequence[int], rows: int, states: Sequence[int]) -> int | None:
    """How many of a module's leading entries belong to each row: one, or its tokens where both are one dimension.

    Args:
        shape: of what the module is given.
        rows: that it is called for.
        states: the shape of what its block was given, (B, T, ...), which may be more rows; (B, H) or () of models
            without tokens.

    Returns:
        None where that cannot be told: experts may take their tokens in another order, and Gemma 3n stacks predictions
        of its states, (4, B, T, H).
    """
    tokens = states[1 + is_stacked(states)] if len(states) > 2 else 1
    if is_stacked(states) and tuple(shape) == tuple(states):
        return None
    if shape[0] == rows and (tokens == 1 or len(shape) > 2):
        return 1
    return tokens if shape[0] == rows * tokens else None


def is_stacked(states: Sequence[int]) -> bool:
    """Whether a block's states have a dimension before the rows."""
    return len(states) > 3


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


def first_tensor(values: Sequence[Any]) -> torch.Tensor:
    """Of a module's arguments; that is what it works on."""
    return next(value for value in values if isinstance(value, torch.Tensor))


def take_rows(value: Any, rows: torch.Tensor | slice, total: int) -> Any:
    """`value` with only these rows of every tensor in it that has `total` rows, (total, ..., ...)."""
    if isinstance(value, torch.Tensor):
        if value.ndim < 2 or value.shape[0] != total:
            return value
        return value[rows if isinstance(rows, slice) else rows.to(value.device)]
    if isinstance(value, (tuple, list)):
        return type(value)(take_rows(item, rows, total) for item in value)
    return value


def join_rows(parts: list[Any], rows: list[torch.Tensor]) -> Any:
    """Put results computed from `rows` of a batch back in the batch's order. The inverse of `take_rows`; a result may
    also have the same number of entries, one behind another, for each row, as a router's for each token.

    Raises:
        ValueError: it has not.
    """
    if isinstance(parts[0], torch.Tensor):
        each = len(parts[0]) // len(rows[0]) if parts[0].ndim else 0
        if not each or any(len(part) != each * len(index) for part, index in zip(parts, rows, strict=True)):
            raise ValueError("a result is not one of the rows")
        order = row_numbers(torch.cat(rows).argsort().tolist(), each)
        return torch.cat(parts)[order.to(parts[0].device)]
    if isinstance(parts[0], (tuple, list)):
        kind = tuple if isinstance(parts[0], tuple) else list
        return kind(join_rows(list(items), rows) for items in zip(*parts, strict=True))
    if any(part is not parts[0] and part != parts[0] for part in parts):
        raise ValueError("a result is of some rows alone")
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
