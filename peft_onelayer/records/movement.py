"""Which tensors of a trained model moved away from the base's, and how far: the part of run.json that says so."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .fields import without_missing_parts

NAMED = 6  # tensors that a message names; of more it gives the number
MOSTLY = 0.5  # share of the moved entries from which on their loss in a merge is worth a note


@dataclass(frozen=True)
class TensorMovement:
    """How far one tensor moved.

    Attributes:
        name: in the base model.
        dtype: of the base's tensor.
        master_dtype: of the trained values as they are kept: of the masters, or of the other checkpoint.
        entries: number of entries.
        moved: entries whose kept value differs from the base's at all.
        changed: entries whose value differs once rounded to the base's dtype.
        changed_bfloat16: entries whose value differs once both are rounded to bfloat16.
        norm: Frobenius norm of the change of the kept values, in float64.
        relative: the same over the norm of the base's tensor; None where that is 0.
    """

    name: str
    dtype: str
    master_dtype: str
    entries: int
    moved: int
    changed: int
    changed_bfloat16: int
    norm: float
    relative: float | None = None


@dataclass(frozen=True)
class Movement:
    """How far a model's tensors moved.

    Attributes:
        tensors: those that were trained, sorted by name.
    """

    tensors: list[TensorMovement]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return without_missing_parts(self)

    @property
    def never_moved(self) -> list[str]:
        """The tensors of which no entry has another value in the base's dtype, by name."""
        return [tensor.name for tensor in self.tensors if not tensor.changed]

    @property
    def share(self) -> float:
        """The share of all entries that have another value in the base's dtype."""
        return sum(t.changed for t in self.tensors) / max(sum(t.entries for t in self.tensors), 1)

    @property
    def dtype(self) -> str:
        """The base's dtype or dtypes, in words."""
        return " and ".join(sorted({tensor.dtype for tensor in self.tensors}))

    def summary(self) -> str:
        """One line: how many entries changed, and which tensors never moved.

        >>> moved = TensorMovement("layers.1.mlp.weight", "bfloat16", "float32", 100, 90, 61, 61, 0.1)
        >>> still = TensorMovement("layers.1.norm.weight", "bfloat16", "float32", 10, 10, 0, 0, 1e-5)
        >>> Movement([moved, still]).summary()
        '55 % of the entries changed in bfloat16; 1 of 2 tensors NEVER MOVED: norm.weight'
        """
        never, total = self.never_moved, len(self.tensors)
        if len(never) == total:
            return f"NOTHING MOVED: in {self.dtype} all {total} tensors equal the base's"
        text = f"{percent(self.share)} of the entries changed in {self.dtype}"
        if never:
            text += f"; {len(never)} of {total} tensors NEVER MOVED: {self._names(never)}"
        return text

    def notes(self) -> list[str]:
        """What a merge into a bfloat16 checkpoint would lose, one sentence each; [] where it loses little."""
        moved = sum(tensor.moved for tensor in self.tensors)
        lost = moved - sum(min(tensor.changed_bfloat16, tensor.moved) for tensor in self.tensors)
        gone = [tensor.name for tensor in self.tensors if tensor.moved and not tensor.changed_bfloat16]
        found = []
        if moved and lost >= MOSTLY * moved:
            found.append(
                f"a bfloat16 merge would lose {percent(lost / moved)} of the moved entries: they moved by less than a "
                "rounding step of bfloat16"
            )
        if gone:
            found.append(
                f"the whole change of {len(gone)} of {len(self.tensors)} tensors would vanish in a bfloat16 merge: "
                f"{self._names(gone)}"
            )
        return found

    def _names(self, names: Iterable[str]) -> str:
        return short_names(names, (tensor.name for tensor in self.tensors))


def percent(share: float) -> str:
    """A share in words that neither hides a little nor rounds up to everything.

    >>> percent(0.613), percent(0.00002), percent(0.996), percent(0.09999), percent(1.0), percent(0.0)
    ('61 %', '0.0020 %', 'more than 99 %', '10 %', '100 %', '0 %')
    """
    if share in (0.0, 1.0) or 0.0995 <= share <= 0.99:
        return f"{100 * share:.0f} %"
    return "more than 99 %" if share > 0.99 else f"{100 * share:#.2g} %"


def short_names(names: Iterable[str], among: Iterable[str]) -> str:
    """The first few of the names without what all of `among` begin with, and how many more there are."""
    shared = os.path.commonprefix(list(among))  # noqa: RUF071  these are no paths
    cut = shared.rfind(".") + 1
    listed = [name[cut:] for name in names]
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more
