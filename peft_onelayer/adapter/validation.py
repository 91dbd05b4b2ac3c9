"""Reads every tensor of an adapter, as far as that goes without loading a model.

Without the base this is a look for NaN and Inf in the file's bytes, for which torch is not imported.
"""

from __future__ import annotations

import math
from pathlib import Path

from .checkpoint import Checkpoint
from .merge import effective_tensor
from .reader import AdapterFile


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
        parts = adapter.stored_parts(name)
        parameters += math.prod(records[name].shape) if name in records else parts[""].entries
        if checkpoint is not None and name in records and name in checkpoint.stored_as:
            effective_tensor(adapter, name, checkpoint.read(checkpoint.stored_as[name]))
            continue
        known = known and name not in records
        if not all(part.is_finite() for part in parts.values()):
            raise ValueError(f"the adapter's {name} holds NaN or Inf.")
    return parameters, known
