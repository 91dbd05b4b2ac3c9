"""The formulas by which several adapters become one, on one tensor at a time, in float64.

An adapter that does not train a tensor leaves it as it is in the base: its change there is 0. TIES and DARE are PEFT's
own functions (`peft.utils.merge_utils`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from peft_onelayer.seams import check

TINY = 1e-6  # radians: an angle below which SLERP is linear


def fuse(method: str, base: torch.Tensor, values: Sequence[torch.Tensor], density: float, seed: int) -> torch.Tensor:
    """The fused weight.

    Args:
        method: "sum", "average", "slerp", "ties" or "dare".
        base: W_0, float64.
        values: W_i of each adapter, float64 and of its shape.
        density: of "ties" and "dare": the share of each change that is kept.
        seed: of what "dare" drops.

    Returns:
        float64, of the base's shape.
    """
    if method == "slerp":
        return slerp_all(values)
    check(__name__)
    from peft.utils.merge_utils import dare_linear, ties

    changes = [value - base for value in values]
    ones = torch.ones(len(changes), dtype=torch.float64)
    if method == "sum":
        return base + torch.stack(changes).sum(0)
    if method == "average":
        return base + torch.stack(changes).sum(0) / len(changes)
    if method == "ties":
        return base + ties(changes, ones, density)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return base + dare_linear(changes, ones, density)


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """From `a` to `b` on the sphere by the share `t`, as one vector each; linear where the angle between them is below
    `TINY` or one of them is 0.

    >>> slerp(torch.tensor([2.0, 0.0]).double(), torch.tensor([0.0, 2.0]).double(), 0.5)
    tensor([1.4142, 1.4142], dtype=torch.float64)
    """
    norms = float(a.norm()), float(b.norm())
    if not all(norms):
        return (1 - t) * a + t * b
    # Kahan's form: the arc cosine would know nothing of an angle below 1e-8, and most are small.
    left, right = a / norms[0], b / norms[1]
    omega = 2 * math.atan2(float((left - right).norm()), float((left + right).norm()))
    if omega < TINY or math.sin(omega) < TINY:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)


def slerp_all(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """SLERP of several weights, one after another; each counts as much as the others where angles are small."""
    result = values[0]
    for count, value in enumerate(values[1:], 2):
        result = slerp(result, value, 1 / count)
    return result


def transplant(values: Sequence[torch.Tensor], cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """CPI-FT's fusion (arXiv 2508.21741): core entries take their task's value, those in no core are SLERP.

    It starts from the last of `values`, and the others follow in their order. Of an entry in several cores the value is
    that of the last of these tasks.

    Args:
        values: W_i of each task, float64, the last fine-tuning stage last.
        cores: which entries are of each task's core region, bool.
    """
    rest = ~torch.stack(list(cores)).any(0)
    result = values[-1].clone()
    if rest.any():
        result[rest] = slerp_all([value[rest] for value in (values[-1], *values[:-1])])
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
