"""Reads every tensor of an adapter, as far as that goes without loading a model."""

from __future__ import annotations

from pathlib import Path

import torch

from peft_onelayer.adapter.checkpoint import Checkpoint
from peft_onelayer.adapter.reader import AdapterFile


def check_tensors(adapter: AdapterFile, base: Path | None) -> tuple[int, bool]:
    """Read all tensors: finite, and with `base` of exactly the values that a sparse adapter's digests promise.

    Args:
        base: the base's checkpoint folder; without one the parts of a sparse adapter are checked for NaN and Inf alone.

    Returns:
        The number of parameters, and whether their values are known to be right.

    Raises:
        ValueError: damaged, or made for another base than the one in `base`.
    """
    records = adapter.sparse.tensors if adapter.sparse else {}
    checkpoint = Checkpoint(base) if base is not None and records else None
    parameters, known = 0, True
    for name in adapter.names:
        if name not in records:
            parameters += adapter.tensor(name).numel()
            continue
        parameters += torch.Size(records[name].shape).numel()
        if checkpoint is not None and name in checkpoint.stored_as:
            adapter.tensor(name, checkpoint.read(checkpoint.stored_as[name]).to(records[name].dtype))
            continue
        known = False
        for part in adapter.parts(name).values():
            if part.is_floating_point() and not torch.isfinite(part).all():
                raise ValueError(f"the adapter's {name} holds NaN or Inf.")
    return parameters, known
