"""Masks of the entries to train: those that a run changed, those that it changed most, or as many at random."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_onelayer.records.files import check_file, output, whole_file

from .change import recorded_revision
from .sources import Change, Pair, open_base, open_change, open_other

if TYPE_CHECKING:
    import torch

PIECE = 2**19  # entries looked at in one go
DIGITS = 16  # bits of a score that one pass over the entries decides
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
        passes = 2 if share is None and random is None else 2 + 64 // DIGITS
        chosen = _Chosen(change, share, random, seed, lambda done: on_progress(done, passes * change.entries))
        return chosen.write(path)


class _Chosen:
    """Which entries of the tensors of `change` are True.

    Of a share, they are those with a score above a threshold and the first ones at it. The score is the change or a
    random number, not negative, so that its bits as an integer order as it does; the threshold is found 16 bits in
    each pass, from how many entries have which next bits.
    """

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
        self.threshold, self.at_threshold = -1, 0
        self.by_share = share is not None or random is not None
        wanted = share if share is not None else random
        if wanted is not None:
            self._find_threshold(round(wanted * change.entries))

    def _pieces(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of a tensor, piece by piece: the scores' bits, (n,) int64, and whether the entries changed, (n,)."""
        pair = self.change.pair(name)
        entries = math.prod(pair.base.shape)
        for start in range(0, entries, PIECE):
            stop = min(start + PIECE, entries)
            changed, size = _compare(pair, start, stop)
            if self.random:
                # whatever the tensors' sizes, the same number for the same entry
                key = [self.seed, self.change.names.index(name), start]
                size = np.random.default_rng(key).random(stop - start) + 1.0  # above 0: every entry may be drawn
            self.done += stop - start
            self.on_progress(self.done)
            yield size.view(np.int64), changed

    def _find_threshold(self, wanted: int) -> None:
        """Set the threshold such that `wanted` entries are taken, or all with a score above 0 where these are fewer."""
        if wanted < 1:
            raise ValueError("the share is less than one entry; give a larger one.")
        prefix, left = 0, wanted
        for shift in range(64 - DIGITS, -1, -DIGITS):
            counts = np.zeros(2**DIGITS, dtype=np.int64)
            for name in self.change.names:
                for bits, _ in self._pieces(name):
                    bits = bits[bits > 0]
                    same = bits >> (shift + DIGITS) == prefix if shift + DIGITS < 64 else np.ones(len(bits), bool)
                    counts += np.bincount((bits[same] >> shift) & (2**DIGITS - 1), minlength=2**DIGITS)
            above = np.cumsum(counts[::-1])[::-1]  # with this digit or a larger one
            if above[0] < left:  # in the first pass: fewer entries have a score than are wanted
                return
            digit = int(np.flatnonzero(above >= left)[-1])
            left -= int(above[digit]) - int(counts[digit])
            prefix = (prefix << DIGITS) | digit
        self.threshold, self.at_threshold = prefix, left

    def _masks(self, name: str, at_threshold: int) -> Iterator[tuple[np.ndarray, int, int]]:
        """Of a tensor, piece by piece: the mask, the entries at the threshold that are left to take, and how many
        changed."""
        for bits, changed in self._pieces(name):
            mask = changed
            if self.by_share:
                mask = bits > max(self.threshold, 0)
                equal = np.flatnonzero(bits == self.threshold)[:at_threshold]
                mask[equal] = True
                at_threshold -= len(equal)
            yield mask, at_threshold, int(np.count_nonzero(changed))

    def write(self, path: Path) -> MaskSummary:
        """Write the masks; the file appears complete or not at all."""
        counts: dict[str, tuple[int, int]] = {}
        starts: dict[str, int] = {}
        changed, rest = 0, self.at_threshold
        for name in self.change.names:
            starts[name], trained = rest, 0
            for mask, rest, moved in self._masks(name, starts[name]):  # noqa: B007  used for the next tensor
                trained += int(np.count_nonzero(mask))
                changed += moved
            if trained:
                counts[name] = trained, math.prod(self.change.pair(name).base.shape)
        if not counts:
            raise ValueError(f"{self.change.label} changes no entry of the base: there is nothing to make a mask of.")
        with whole_file(path) as staging, staging.open("wb") as file:
            file.write(_header({name: self.change.pair(name).base.shape for name in counts}))
            for name in counts:
                for mask, _, _ in self._masks(name, starts[name]):
                    file.write(mask.tobytes())
        return MaskSummary(
            path, len(counts), sum(trained for trained, _ in counts.values()), self.change.entries, changed
        )


def _compare(pair: Pair, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the flat entries [start, stop): whether each has another value in the base's dtype, and how far it moved."""
    base, other = pair.base.read(start, stop), pair.other.read(start, stop)
    size: torch.Tensor = (other.double() - base.double()).abs()
    if not math.isfinite(float(size.max())):
        raise ValueError(f"{pair.name} holds NaN or Inf: its change cannot be measured.")
    return (other.to(base.dtype) != base).numpy(), size.numpy()


def _header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """The head of a safetensors file of boolean tensors, in this order."""
    head: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape)
        head[name] = {"dtype": "BOOL", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
