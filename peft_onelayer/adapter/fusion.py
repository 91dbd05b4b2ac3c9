"""The formulas by which several adapters become one, on pieces of one tensor, in float64.

An adapter that does not train a tensor leaves it as it is in the base: its change there is 0. TIES and DARE are PEFT's
own functions (`peft.utils.merge_utils`): what is kept of a change is chosen over the whole tensor, and the rest is done
entry by entry. The norms of SLERP are summed up over the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch

from peft_onelayer.seams import check

if TYPE_CHECKING:
    from .parts import Pieces

TINY = 1e-6  # radians: an angle below which SLERP is linear


def fuser(
    method: str, pieces: Pieces, alone: Sequence[Pieces], entries: int, density: float, seed: int
) -> Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]:
    """What fuses one tensor; it is to be given the tensor's pieces once, in their order.

    Args:
        method: "sum", "average", "slerp", "ties" or "dare".
        pieces: reads the tensor: W_0 and W_i of each adapter, (n,) float64.
        alone: the same with one adapter each.
        entries: of the whole tensor.
        density: of "ties" and "dare": the share of each change that is kept.
        seed: of what "dare" drops.

    Returns:
        A function of W_0 and the W_i of a piece, (n,) float64 each, that gives the fused weight.
    """
    if method == "slerp":
        angles = arcs(lambda: (values for _, values in pieces()))
        return lambda base, values: along(values, angles)
    if method in ("sum", "average"):
        count = len(alone) if method == "average" else 1
        return lambda base, values: base + reduce(torch.add, [value - base for value in values]) / count
    check(__name__)
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, task_arithmetic

    kept = _kept(alone, entries, density, "magnitude" if method == "ties" else "random", seed)
    start = 0

    def fuse(base: torch.Tensor, values: Sequence[torch.Tensor]) -> torch.Tensor:
        nonlocal start
        here = slice(start, start := start + len(base))
        changes = [(value - base) * mask[here] for value, mask in zip(values, kept, strict=True)]
        if method == "dare":
            changes = [change / density for change in changes]
            return base + task_arithmetic(changes, torch.ones(len(changes), dtype=torch.float64))
        stacked = torch.stack(changes)
        return base + disjoint_merge(stacked, calculate_majority_sign_mask(stacked))

    return fuse


def _kept(alone: Sequence[Pieces], entries: int, density: float, method: str, seed: int) -> list[torch.Tensor]:
    """Which entries of each adapter's change PEFT keeps, (entries,) bool; one whole change is in memory at a time."""
    from peft.utils.merge_utils import prune

    kept = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for pieces in alone:
            change = torch.empty(entries, dtype=torch.float64)
            start = 0
            for base, (value,) in pieces():
                torch.sub(value, base, out=change[start : start + len(base)])
                start += len(base)
            kept.append(prune(change, density, method=method) != 0)
    return kept


@dataclass(frozen=True)
class Arc:
    """A step of SLERP from one weight to another, whose result is (`left` a + `right` b) / `over`."""

    left: float
    right: float
    over: float

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (self.left * a + self.right * b) / self.over


def arc(pairs: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]], t: float) -> Arc:
    """From one weight to another on the sphere by the share `t`, as one vector each; linear where the angle between
    them is below `TINY` or one of them is 0.

    Args:
        pairs: gives both, piece by piece, anew at each call, (n,) float64.
    """
    a, b = _norms(pairs())
    if not a or not b:
        return Arc(1 - t, t, 1.0)
    # Kahan's form: the arc cosine would know nothing of an angle below 1e-8, and most are small.
    units = ((left / a, right / b) for left, right in pairs())
    apart, together = _norms((left - right, left + right) for left, right in units)
    omega = 2 * math.atan2(apart, together)
    if omega < TINY or math.sin(omega) < TINY:
        return Arc(1 - t, t, 1.0)
    return Arc(math.sin((1 - t) * omega), math.sin(t * omega), math.sin(omega))


def _norms(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """Of two vectors that are given piece by piece."""
    norms = [(float(a.norm()), float(b.norm())) for a, b in pairs]
    return math.hypot(*(a for a, _ in norms)), math.hypot(*(b for _, b in norms))


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """The weight at the share `t` of the arc from `a` to `b`, float64.

    >>> slerp(torch.tensor([2.0, 0.0]).double(), torch.tensor([0.0, 2.0]).double(), 0.5)
    tensor([1.4142, 1.4142], dtype=torch.float64)
    """
    return arc(lambda: [(a, b)], t)(a, b)


def arcs(pieces: Callable[[], Iterable[Sequence[torch.Tensor]]]) -> list[Arc]:
    """SLERP of several weights, one after another; each counts as much as the others where angles are small.

    Args:
        pieces: gives the weights, piece by piece, anew at each call, (n,) float64.
    """
    count = len(next(iter(pieces()), ()))
    found: list[Arc] = []
    for to in range(1, count):
        found.append(arc(lambda to=to: ((along(v[:to], found), v[to]) for v in pieces()), 1 / (to + 1)))  # type: ignore[misc]
    return found


def along(values: Sequence[torch.Tensor], steps: Sequence[Arc]) -> torch.Tensor:
    """What the steps of SLERP make of a piece."""
    result = values[0]
    for step, value in zip(steps, values[1:], strict=True):
        result = step(result, value)
    return result


def outside(values: Sequence[torch.Tensor], cores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of a piece, the entries in no core region, in the order of CPI-FT's fusion: of the last of `values` first."""
    rest = ~torch.stack(list(cores)).any(0)
    return [value[rest] for value in (values[-1], *values[:-1])]


def transplant(values: Sequence[torch.Tensor], cores: Sequence[torch.Tensor], steps: Sequence[Arc]) -> torch.Tensor:
    """CPI-FT's fusion (arXiv 2508.21741): core entries take their task's value, those in no core are SLERP.

    It starts from the last of `values`, and the others follow in their order. Of an entry in several cores the value is
    that of the last of these tasks.

    Args:
        values: W_i of each task of a piece, (n,) float64, the last fine-tuning stage last.
        cores: which entries are of each task's core region, (n,) bool.
        steps: of SLERP, of what is `outside`.
    """
    result = values[-1].clone()
    result[~torch.stack(list(cores)).any(0)] = along(outside(values, cores), steps)
    for value, core in zip(values, cores, strict=True):
        result = torch.where(core, value, result)
    return result


def components(overlaps: Sequence[Sequence[float]], threshold: float) -> list[list[int]]:
    """The connected components of the graph whose edges are overlaps of at least `threshold`, each ascending, in the
    order of their first members.

    >>> components([[1, 0.2, 0], [0.2, 1, 0.2], [0, 0.2, 1]], 0.1), components([[1, 0.05], [0.05, 1]], 0.1)
    ([[0, 1, 2]], [[0], [1]])
    """
    left, groups = set(range(len(overlaps))), []
    while left:
        group, new = set(), {min(left)}
        while new:
            group |= new
            new = {j for i in new for j in left - group if overlaps[i][j] >= threshold}
        left -= group
        groups.append(sorted(group))
    return groups
