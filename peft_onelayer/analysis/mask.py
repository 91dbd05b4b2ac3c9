"""Masks of the entries to train: those that a run changed, those that it changed most, or as many at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peft_onelayer.adapter.largest import PASSES, Largest
from peft_onelayer.adapter.stored import header
from peft_onelayer.records.files import check_file, output, whole_file

from .change import recorded_revision
from .sources import Change, Pair, open_base, open_change, open_other

if TYPE_CHECKING:
    import torch

PIECE = 2**19  # entries looked at in one go
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class MaskSummary:
    """What `make_mask` wrote.

    Attributes:
        file: where it lies.
        tensors: with a True entry, which are those in the file.
        trained: number of True entries.
        entries: of all tensors that were compared.
        changed: entries that have another value in the base's dtype.
    """

    file: Path
    tensors: int
    trained: int
    entries: int
    changed: int


def make_mask(
    base: str | Path,
    other: str | Path | Sequence[str | Path],
    out: str | Path,
    share: float | None = None,
    random: float | None = None,
    seed: int = 0,
    *,
    revision: str | None = None,
    other_revision: str | None = None,
    allow_other_base: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MaskSummary:
    """Write which entries of the base's tensors to train, for `SingleLayerConfig(mask=...)`.

    By default these are the entries to which a run gave another value in the base's dtype. The file holds boolean
    tensors by the names of the base's parameters; a tensor without a True entry is left out. The tensors are those
    that base and other both have: of an adapter those that it trained, of a checkpoint all. They are read in pieces, a
    few times, and never held whole.

    Args:
        base: folder or Hub id of the base's checkpoint.
        other: what was trained from it, as `analyze_change` takes it.
        out: the new file, which ends in .safetensors.
        share: instead, this share of all entries: those with the largest change of the stored values, by absolute value
            in float64 over all tensors together. Of equal changes the first ones are taken, in the order of the names;
            an entry that did not change is never taken.
        random: instead, this share of all entries, drawn without replacement.
        seed: of the drawing.
        revision: branch, tag or commit of `base` on the Hub; default, for an adapter of it the commit that it records.
        other_revision: the same of `other`.
        allow_other_base: compare with a base that the adapter was not trained on, if the shapes fit.
        on_progress: called with the entries looked at so far and in all.

    Returns:
        What was written.

    Raises:
        ValueError: in one line: `share` and `random` together, no share, nothing changed, or as `analyze_change`.
        TargetError: `out` may not be used.
    """
    if share is not None and random is not None:
        raise ValueError("a mask of the largest changes and one at random exclude each other; give one of them.")
    for name, value in (("share", share), ("random", random)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name}={value} is no share of the entries; expected a number above 0, at most 1.")
    path = Path(out)
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} is no mask's file: give one that ends in {SUFFIX}.")
    check_file(path, lambda file: file.suffix == SUFFIX)
    names = [other] if isinstance(other, (str, Path)) else list(other)
    if not names:
        raise ValueError("nothing was given to compare the base with.")
    with output(path):
        others = [open_other(name, other_revision) for name in names]
        if revision is None:
            revision = recorded_revision(base, others)
        change = open_change(open_base(base, revision), others, ", ".join(map(str, names)), allow_other_base)
        passes = 2 if share is None and random is None else 2 + PASSES
        chosen = _Chosen(change, share, random, seed, lambda done: on_progress(done, passes * change.entries))
        return chosen.write(path)


class _Chosen:
    """Which entries of the tensors of `change` are True."""

    def __init__(
        self,
        change: Change,
        share: float | None,
        random: float | None,
        seed: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self.change, self.random, self.seed, self.on_progress = change, random is not None, seed, on_progress
        self.done = 0
        self.largest: Largest | None = None
        wanted = share if share is not None else random
        if wanted is not None:
            if (count := round(wanted * change.entries)) < 1:
                raise ValueError(f"{wanted} of {change.entries} entries is less than one; give a larger share.")
            self.largest = Largest(lambda: (size for name in change.names for size, _ in self._pieces(name)), count)

    def _pieces(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of a tensor, piece by piece: the scores, (n,) float64, and whether the entries changed, (n,)."""
        pair = self.change.pair(name)
        entries = math.prod(pair.base.shape)
        for start in range(0, entries, PIECE):
            stop = min(start + PIECE, entries)
            changed, size = _compare(pair, start, stop)
            if self.random:
                key = [self.seed, self.change.names.index(name), start]
                size = np.random.default_rng(key).random(stop - start) + 1.0  # above 0: every entry may be drawn
            self.done += stop - start
            self.on_progress(self.done)
            yield size, changed

    def _masks(self) -> Iterator[tuple[str, np.ndarray, int]]:
        """Piece by piece: the tensor's name, the mask, and how many entries changed."""
        taken = None if self.largest is None else self.largest.walk()
        for name in self.change.names:
            for size, changed in self._pieces(name):
                yield name, changed if taken is None else taken(size), int(np.count_nonzero(changed))

    def write(self, path: Path) -> MaskSummary:
        """Write the masks; the file appears complete or not at all."""
        trained, changed = dict.fromkeys(self.change.names, 0), 0
        for name, mask, moved in self._masks():
            trained[name] += int(np.count_nonzero(mask))
            changed += moved
        names = [name for name, count in trained.items() if count]
        if not names:
            raise ValueError(f"{self.change.label} changes no entry of the base: there is nothing to make a mask of.")
        with whole_file(path) as staging, staging.open("wb") as file:
            file.write(header({name: ("BOOL", self.change.pair(name).base.shape) for name in names}))
            for name, mask, _ in self._masks():
                if trained[name]:
                    file.write(mask.tobytes())
        return MaskSummary(path, len(names), sum(trained.values()), self.change.entries, changed)


def _compare(pair: Pair, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the flat entries [start, stop): whether each has another value in the base's dtype, and how far it moved."""
    base, other = pair.base.read(start, stop), pair.other.read(start, stop)
    size: torch.Tensor = (other.double() - base.double()).abs()
    if not math.isfinite(float(size.max())):
        raise ValueError(f"{pair.name} holds NaN or Inf: its change cannot be measured.")
    return (other.to(base.dtype) != base).numpy(), size.numpy()
