"""Keeps weights as they are computed with, rounded to the base's dtype, from one pass of a generation to the next.

A generation makes a pass for every token, and the float32 masters do not change on the way. They are rounded again when
torch says that one was written to or replaced. Writes through `.data`, as some optimizers make them, torch does not
count. So nothing is kept beyond the call to `generate`, and nothing where gradients are on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

Stamp = tuple[tuple[int, int, int], ...]


class _Kept(threading.local):
    weights: dict[Any, tuple[Stamp, Stamp, dict[str, torch.Tensor]]] | None = None


_kept = _Kept()


@contextmanager
def keeping_rounded() -> Iterator[None]:
    """Within, this thread rounds weights once in all passes without gradients."""
    before = _kept.weights
    _kept.weights = {} if before is None else before
    try:
        yield
    finally:
        _kept.weights = before


def keeps() -> bool:
    """Whether this thread keeps rounded weights now."""
    return _kept.weights is not None and not torch.is_grad_enabled()


def find(key: Any, sources: list[torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The weights kept under `key`, if they and all of `sources` are as they were."""
    assert _kept.weights is not None
    of, own, weights = _kept.weights.get(key, ((), (), {}))
    return weights if weights and of == _stamp(sources) and own == _stamp(weights.values()) else None


def keep(key: Any, sources: list[torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    """Keep `weights`, made of `sources`, until the generation ends."""
    assert _kept.weights is not None
    _kept.weights[key] = _stamp(sources), _stamp(weights.values()), weights


def _stamp(tensors: Any) -> Stamp:
    return tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
