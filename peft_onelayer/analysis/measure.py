"""What changed in one tensor: counts, norms and rank, in one pass over its pieces and, for the rank, a second one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from peft_onelayer.records.movement import TensorMovement

from .sources import Pair, Values
from .spectrum import LIMIT, effective_rank, numerical_rank, singular_values

PIECE = 2**19  # entries looked at in one go
TOLERANCES = {"0": 0.0, "1e-08": 1e-8, "1e-05": 1e-5, "0.0001": 1e-4}
TOP = 16  # singular values that are kept


@dataclass(frozen=True)
class TensorChange:
    """What changed in one tensor. "Stored" values are those in the files: of a dense adapter the masters.

    Attributes:
        name: in the base.
        dtype: of the base's tensor; with an adapter that records it, the dtype in which it was loaded for training.
        other_dtype: of the other's stored values: of a dense adapter that of its masters.
        shape: of both.
        unchanged: by tolerance, the share of entries with |other - base| <= tolerance, stored values in float64.
        unchanged_official: the same as the official code of arXiv 2505.11711 counts: both rounded to bfloat16,
            subtracted in bfloat16, and compared in bfloat16.
        changed: entries with another value once the other is rounded to the base's dtype.
        changed_bfloat16: entries with another value once both are rounded to bfloat16.
        norm: Frobenius norm of the stored values' change, in float64.
        norm_rounded: the same once the other is rounded to the base's dtype.
        base_norm: of the base's tensor.
        rows, columns: number with at least one entry whose stored value differs; None but of matrices.
        rank: singular values of the stored values' change above float32's tolerance; None but of matrices.
        rank_official: the same of the difference of the official code, taken in bfloat16.
        effective_rank: exponential of the entropy of the normalized singular values; None but of matrices.
        largest_rank: the largest that `rank` could be.
        singular_values: the largest ones, descending; None but of matrices.
        measured: the shape of the part that the ranks and singular values are of, where that is not the whole: they
            are lower bounds then.
    """

    name: str
    dtype: str
    other_dtype: str
    shape: list[int]
    unchanged: dict[str, float]
    unchanged_official: dict[str, float]
    changed: int
    changed_bfloat16: int
    norm: float
    norm_rounded: float
    base_norm: float
    rows: int | None = None
    columns: int | None = None
    rank: int | None = None
    rank_official: int | None = None
    effective_rank: float | None = None
    largest_rank: int | None = None
    singular_values: list[float] | None = None
    measured: list[int] | None = None

    @property
    def entries(self) -> int:
        """Their number."""
        return math.prod(self.shape)

    @property
    def moved(self) -> int:
        """Entries whose stored value differs."""
        return self.entries - round(self.unchanged["0"] * self.entries)

    @property
    def relative(self) -> float | None:
        """`norm` over `base_norm`; None where that is 0."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def movement(self) -> TensorMovement:
        """The part of it that run.json holds."""
        return TensorMovement(
            self.name,
            self.dtype,
            self.other_dtype,
            self.entries,
            self.moved,
            self.changed,
            self.changed_bfloat16,
            self.norm,
            self.relative,
        )


@dataclass
class _Counts:
    """What the pass over the pieces adds up."""

    within: np.ndarray = field(default_factory=lambda: np.zeros(len(TOLERANCES), dtype=np.int64))
    within_official: np.ndarray = field(default_factory=lambda: np.zeros(len(TOLERANCES), dtype=np.int64))
    changed: int = 0
    squares: float = 0.0  # of the change
    squares_rounded: float = 0.0  # of the change in the base's dtype
    squares_base: float = 0.0
    rows: int = 0
    exact: bool = True  # whether the difference in bfloat16 is that in float64


def measure(pair: Pair, spectrum: bool = True, limit: int = LIMIT) -> TensorChange:
    """Measure the change of one tensor, with a few pieces of it in memory.

    Args:
        pair: the two tensors, with at least one entry.
        spectrum: whether ranks and singular values are wanted, which costs most of the time.
        limit: of a matrix' shorter side; of a longer one a part is measured.

    Raises:
        ValueError: NaN or Inf in one of the tensors.
    """
    shape = pair.base.shape
    width = shape[-1] if len(shape) > 1 else 1
    entries = math.prod(shape)
    counts, columns = _Counts(), torch.zeros(width, dtype=torch.bool)
    step = max(1, PIECE // width) * width
    for start in range(0, entries, step):
        _add(pair, start, min(start + step, entries), width, counts, columns)
    matrix = len(shape) == 2
    return TensorChange(
        name=pair.name,
        dtype=pair.base.dtype,
        other_dtype=pair.other.dtype,
        shape=list(shape),
        unchanged=_shares(counts.within, entries),
        unchanged_official=_shares(counts.within_official, entries),
        changed=counts.changed,
        changed_bfloat16=entries - int(counts.within_official[0]),
        norm=math.sqrt(counts.squares),
        norm_rounded=math.sqrt(counts.squares_rounded),
        base_norm=math.sqrt(counts.squares_base),
        rows=counts.rows if matrix else None,
        columns=int(torch.count_nonzero(columns)) if matrix else None,
        **(_ranks(pair, counts, limit) if matrix and spectrum else {}),
    )


def _add(pair: Pair, start: int, stop: int, width: int, counts: _Counts, columns: torch.Tensor) -> None:
    """Add the entries [start, stop), whole rows of `width`."""
    base, other = pair.base.read(start, stop), pair.other.read(start, stop)
    original = base.double()
    counts.squares_base += _square(original, f"{pair.name} of the base")
    if base.dtype == other.dtype and torch.equal(base, other):  # the rule in most of a model
        counts.within += stop - start
        counts.within_official += stop - start
        return
    difference = other.double() - original
    rounded = other.to(base.dtype)
    difference_rounded = rounded.double() - original
    counts.squares += _square(difference, f"{pair.name} of the other")
    counts.squares_rounded += _square(difference_rounded, f"{pair.name} of the other in {pair.base.dtype}")
    official = other.bfloat16() - base.bfloat16()
    size, size_official = difference.abs(), official.abs()
    for i, tolerance in enumerate(TOLERANCES.values()):
        counts.within[i] += int(torch.count_nonzero(size <= tolerance))
        counts.within_official[i] += int(torch.count_nonzero(size_official <= tolerance))
    counts.changed += int(torch.count_nonzero(rounded != base))
    touched = (difference != 0).view(-1, width)
    counts.rows += int(torch.count_nonzero(touched.any(1)))
    columns |= touched.any(0)
    counts.exact = counts.exact and bool((official.double() == difference).all())


def _square(values: torch.Tensor, where: str) -> float:
    """The sum of the squares of (n,) float64."""
    if not math.isfinite(square := float(values @ values)):
        raise ValueError(f"{where} holds NaN or Inf, or numbers above 1e150: its change cannot be measured.")
    return square


def _ranks(pair: Pair, counts: _Counts, limit: int) -> dict:
    """The fields of `TensorChange` that come from singular values, of a matrix."""
    height, width = pair.base.shape
    largest = min(height, width)
    if not counts.squares:
        none: dict = {"rank": 0, "effective_rank": 0.0, "largest_rank": largest, "singular_values": []}
        return none | {"rank_official": 0}

    def part(values: Values, axis: int, start: int, stop: int) -> torch.Tensor:
        return values.columns(start, stop) if axis else values.read(start * width, stop * width).view(-1, width)

    def stored(axis: int, start: int, stop: int) -> torch.Tensor:
        base, other = (part(values, axis, start, stop) for values in (pair.base, pair.other))
        return other.double() - base.double()

    def in_bfloat16(axis: int, start: int, stop: int) -> torch.Tensor:
        base, other = (part(values, axis, start, stop) for values in (pair.base, pair.other))
        return (other.bfloat16() - base.bfloat16()).double()

    def decompose(change: Callable[[int, int, int], torch.Tensor]) -> tuple[np.ndarray, tuple[int, int]]:
        return singular_values(partial(change, 0), partial(change, 1), (height, width), limit)

    values, shape = decompose(stored)
    official = values if counts.exact else decompose(in_bfloat16)[0]
    return {
        "rank": numerical_rank(values, shape),
        "rank_official": numerical_rank(official, shape),
        "effective_rank": effective_rank(values),
        "largest_rank": min(shape),
        "singular_values": values[:TOP].tolist(),
        "measured": None if shape == (height, width) else list(shape),
    }


def _shares(counts: np.ndarray, entries: int) -> dict[str, float]:
    return {name: int(count) / entries for name, count in zip(TOLERANCES, counts, strict=True)}
