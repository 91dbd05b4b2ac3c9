"""Weights in effect that are a copy of the masters (rounded to the base's dtype): writing to them writes the masters.

Code of the plain model initialises or edits `module.weight` in place. On a copy that would have no effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

# What these get or set is the parameter's, not its values'.
_TENSOR: Any = torch.Tensor
OF_THE_PARAMETER = (
    _TENSOR.requires_grad.__set__,
    _TENSOR.requires_grad_,
    _TENSOR.grad.__get__,
    _TENSOR.grad.__set__,
    _TENSOR.register_hook,
)
SETS_DATA = _TENSOR.data.__set__


class WritableCopy(torch.Tensor):
    """A copy of a master weight. In-place operations on it, its views and its `.data` reach the master."""

    whole: WritableCopy | None  # what a view is of
    master: nn.Parameter
    write: Callable[[torch.Tensor, torch.Tensor | None], None]

    @classmethod
    def of(cls, copy: torch.Tensor, master: nn.Parameter, write: Callable) -> WritableCopy:
        """`copy`; after every write `write` is called with all of it, and a mask of what may have been written."""
        made = copy.as_subclass(cls)
        made.whole, made.master, made.write = None, master, write
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        copies = [value for value in tree_leaves((args, kwargs)) if isinstance(value, WritableCopy)]
        with torch._C.DisableTorchFunctionSubclass():
            if func in OF_THE_PARAMETER:
                return func(*map(_parameter, args))
            if func == SETS_DATA:
                func(*args)
                if args[0].whole is None:
                    args[0].write(_plain(args[0]), None)
                return None
            result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
            if _writes(func.__name__) or "out" in kwargs:
                for copy in copies:
                    whole = copy if copy.whole is None else copy.whole
                    whole.write(_plain(whole), _entries_of(copy, whole))
            return tree_map(lambda value: _as_view(value, copies), result)


def _parameter(value: Any) -> Any:
    if not isinstance(value, WritableCopy):
        return value
    return value.master if value.whole is None else value.whole.master


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, WritableCopy) else value


def _writes(name: str) -> bool:
    """Whether a function of this name may write: `mul_`, `__iadd__`, `__setitem__`; never too few."""
    return (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))


def _entries_of(view: torch.Tensor, whole: torch.Tensor) -> torch.Tensor | None:
    """Which entries of `whole` its view has, as a mask; None for all."""
    if view.numel() == whole.numel():
        return None
    entries = whole.untyped_storage().nbytes() // whole.element_size()
    mask = torch.zeros(entries, dtype=torch.bool, device=whole.device)
    mask.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return mask.as_strided(whole.shape, whole.stride(), whole.storage_offset())


def _as_view(value: Any, copies: list[WritableCopy]) -> Any:
    """`value`, as a part of the copy that it shares its memory with, if any."""
    if type(value) is not torch.Tensor:
        return value
    for copy in copies:
        if value.untyped_storage()._cdata == copy.untyped_storage()._cdata:
            view = value.as_subclass(WritableCopy)
            view.whole = copy if copy.whole is None else copy.whole
            return view
    return value
