"""The entries with the largest scores among many tensors that are read one after another, exactly and in little memory.

Scores are not negative, so their bits as an integer order as they do. The threshold is found 16 bits in each of four
passes, from how many scores have which next bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

DIGITS = 16
PASSES = 64 // DIGITS


class Largest:
    """The `wanted` entries with the largest scores; of equal scores the first ones. A score of 0 is never taken.

    Args:
        scores: gives all scores anew at each call, in one order: pieces of (n,) float64.
        wanted: how many entries, at least 1; all with a score above 0 where these are fewer.
    """

    def __init__(self, scores: Callable[[], Iterable[np.ndarray]], wanted: int) -> None:
        self._threshold, self._at_threshold = 0, 0
        prefix, left = 0, wanted
        for shift in range(64 - DIGITS, -1, -DIGITS):
            counts = np.zeros(2**DIGITS, dtype=np.int64)
            for piece in scores():
                bits = piece.view(np.uint64)
                bits = bits[bits > 0]
                if shift + DIGITS < 64:
                    bits = bits[bits >> np.uint64(shift + DIGITS) == prefix]
                digits = (bits >> np.uint64(shift)) & np.uint64(2**DIGITS - 1)
                counts += np.bincount(digits.astype(np.int64), minlength=2**DIGITS)
            above = np.cumsum(counts[::-1])[::-1]  # with this digit or a larger one
            if above[0] < left:  # in the first pass: fewer have a score than are wanted
                return
            digit = int(np.flatnonzero(above >= left)[-1])
            left -= int(above[digit]) - int(counts[digit])
            prefix = (prefix << DIGITS) | digit
        self._threshold, self._at_threshold = prefix, left

    def walk(self) -> Walk:
        """What is given the pieces in their order and says which entries are taken."""
        return Walk(self._threshold, self._at_threshold)


@dataclass
class Walk:
    """A walk over the pieces, from the first one on; a copy goes on from the same place.

    Attributes:
        threshold: the bits of the smallest score that is taken.
        left: how many entries with just this score are still to be taken.
    """

    threshold: int
    left: int

    def __call__(self, piece: np.ndarray) -> np.ndarray:
        """Which entries of the next piece, (n,) float64, are taken: (n,) bool."""
        bits = piece.view(np.uint64)
        mask = bits > self.threshold
        if self.left:
            equal = np.flatnonzero(bits == self.threshold)[: self.left]
            mask[equal] = True
            self.left -= len(equal)
        return mask
