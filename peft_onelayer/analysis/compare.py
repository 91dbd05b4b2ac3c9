"""What several runs on one base changed in common: overlap of the changed entries, and correlation of the changes."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_onelayer.adapter.checkpoint import Checkpoint
from peft_onelayer.adapter.reader import AdapterFile
from peft_onelayer.records.locate import check_base_of, check_revision

from .change import recorded_revision
from .sources import Change, open_base, open_change, open_other

if TYPE_CHECKING:
    import torch

PIECE = 2**20  # entries looked at in one go, divided by the number of runs
ROUNDING = 1e-12  # of the sum of squares: a spread below it is what rounding leaves of 0


@dataclass(frozen=True)
class TensorOverlap:
    """What two runs changed in one tensor.

    Attributes:
        name: in the base.
        entries: number of entries.
        changed_a: entries that the first run gave another value in the base's dtype.
        changed_b: the same of the second.
        both: entries that both changed.
        correlation: Pearson's, of the changes of the stored values over all entries; None where the changes of one are
            all equal.
    """

    name: str
    entries: int
    changed_a: int
    changed_b: int
    both: int
    correlation: float | None


@dataclass(frozen=True)
class Overlap:
    """What two runs changed in common, over the tensors that both have. An entry counts as changed where its value,
    rounded to the base's dtype, differs from the base's.

    Attributes:
        a: the first run.
        b: the second.
        tensors: those that both have, sorted by name.
        only_a: number of tensors that the first run alone trained.
        only_b: the same of the second.
        entries: of the common tensors.
        changed_a: entries that the first run changed.
        changed_b: the same of the second.
        both: entries that both changed.
        overlap_a: `both` over `changed_a`; None where that is 0, as all that follows.
        overlap_b: `both` over `changed_b`.
        chance_a: what `overlap_a` would be if the second run's entries lay anywhere: its share of all entries.
        chance_b: the same of `overlap_b`.
        chance_a_by_tensor: the same if each tensor keeps its number of changed entries: what overlap there is beyond it
            lies within the tensors.
        chance_b_by_tensor: the same of `overlap_b`.
        jaccard: `both` over the entries that at least one changed.
        chance_jaccard: the same from the number of common entries that chance gives.
        correlation: Pearson's, of the changes of the stored values over all entries.
        same_sign: of the entries that both changed, the share that both moved in one direction.
    """

    a: str
    b: str
    tensors: list[TensorOverlap]
    only_a: int
    only_b: int
    entries: int
    changed_a: int
    changed_b: int
    both: int
    overlap_a: float | None
    overlap_b: float | None
    chance_a: float | None
    chance_b: float | None
    chance_a_by_tensor: float | None
    chance_b_by_tensor: float | None
    jaccard: float | None
    chance_jaccard: float | None
    correlation: float | None
    same_sign: float | None


@dataclass(frozen=True)
class Comparison:
    """Every pair of the runs; `to_json` is what `onelayer compare --json` prints.

    Attributes:
        base: that all were trained on.
        runs: as they were given.
        pairs: one for each two of them, in order.
    """

    base: str
    runs: list[str]
    pairs: list[Overlap]

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {"format": "onelayer-comparison-1", "kind": "changes", **asdict(self)}


@dataclass
class _Sums:
    """What the pass over two runs' pieces of one tensor adds up."""

    both: int = 0
    same_sign: int = 0
    products: float = 0.0


@dataclass
class _Own:
    """The same of one run."""

    changed: int = 0
    total: float = 0.0
    squares: float = 0.0


class _Row(NamedTuple):
    """One tensor of two runs."""

    name: str
    entries: int
    a: _Own
    b: _Own
    shared: _Sums


def compare_adapters(
    runs: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    revision: str | None = None,
    allow_other_base: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Measure what runs on one base (seeds, data, algorithms) changed in common, tensor by tensor from the files.

    Args:
        runs: two or more adapters, dense or sparse, or checkpoints: folders or Hub ids.
        base: folder or Hub id of the base's checkpoint; default, the one that the adapters record.
        revision: branch, tag or commit of the base on the Hub; default, the commit that the adapters record.
        allow_other_base: measure against a base that an adapter was not trained on, if the shapes fit.
        on_progress: called with the entries measured so far and in all.

    Returns:
        One `Overlap` for each two runs.

    Raises:
        ValueError: in one line: fewer than two runs, no or several bases, damaged files, another base, NaN or Inf.
    """
    names = [str(run) for run in runs]
    if len(names) < 2:
        raise ValueError(f"a comparison needs two runs or more, and {len(names)} was given.")
    opened = [open_other(name) for name in names]
    name = _recorded_base(names, opened) if base is None else str(base)
    check_revision(name, revision)
    checkpoint = open_base(name, recorded_revision(name, opened) if revision is None else revision)
    changes = [open_change(checkpoint, [o], n, allow_other_base) for n, o in zip(names, opened, strict=True)]
    counts: dict[tuple[int, int], list[_Row]] = {pair: [] for pair in itertools.combinations(range(len(names)), 2)}
    tensors = sorted({tensor for change in changes for tensor in change.names})
    done, total = 0, sum(change.entries for change in changes)
    for tensor in tensors:
        present = [i for i, change in enumerate(changes) if tensor in change.names]
        entries, own, sums = _measure(tensor, [changes[i] for i in present])
        for (i, a), (j, b) in itertools.combinations(enumerate(present), 2):
            counts[a, b].append(_Row(tensor, entries, own[i], own[j], sums[i, j]))
        done += entries * len(present)
        on_progress(done, total)
    pairs = [
        _overlap(names[a], names[b], found, *(len(changes[i].names) - len(found) for i in (a, b)))
        for (a, b), found in counts.items()
    ]
    return Comparison(name, names, pairs)


def _recorded_base(names: Sequence[str], opened: Sequence[Checkpoint | AdapterFile]) -> str:
    found = {}
    for name, other in zip(names, opened, strict=True):
        if not isinstance(other, AdapterFile):
            raise ValueError(f"{name} is a checkpoint, which does not say what it was made from: give the base.")
        recorded = other.config.get("base_model_name_or_path")
        if not recorded:
            raise ValueError(f"{name} does not record its base: give the base.")
        found[recorded] = name, other.folder
    if len(found) > 1:
        listed = ", ".join(f"{name} on {base}" for base, (name, _) in found.items())
        raise ValueError(f"the runs record several bases: {listed}. If they are the same, give it as the base.")
    ((base, (_, folder)),) = found.items()
    check_base_of(folder, f"onelayer compare {shlex.join(names)} --base {{base}}")
    return base


def _measure(name: str, changes: Sequence[Change]) -> tuple[int, list[_Own], dict[tuple[int, int], _Sums]]:

    import torch

    pairs = [change.pair(name) for change in changes]
    entries = math.prod(pairs[0].base.shape)
    own = [_Own() for _ in pairs]
    sums = {(i, j): _Sums() for i, j in itertools.combinations(range(len(pairs)), 2)}
    step = max(1, PIECE // len(pairs))
    for start in range(0, entries, step):
        stop = min(start + step, entries)
        moved: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each run: which entries changed, and by how much
        for pair, mine in zip(pairs, own, strict=True):
            base, other = pair.base.read(start, stop), pair.other.read(start, stop)
            change = other.double() - base.double()
            if not math.isfinite(float(change.abs().max())):
                raise ValueError(f"{name} holds NaN or Inf: its change cannot be measured.")
            changed = other.to(base.dtype) != base
            mine.changed += int(torch.count_nonzero(changed))
            mine.total += float(change.sum())
            mine.squares += float(change @ change)
            moved.append((changed, change))
        for (i, j), shared in sums.items():
            both = moved[i][0] & moved[j][0]
            shared.both += int(torch.count_nonzero(both))
            shared.same_sign += int(torch.count_nonzero(both & (moved[i][1].sign() == moved[j][1].sign())))
            shared.products += float(moved[i][1] @ moved[j][1])
    return entries, own, sums


def _overlap(a: str, b: str, found: list[_Row], only_a: int, only_b: int) -> Overlap:
    entries, both = sum(row.entries for row in found), sum(row.shared.both for row in found)
    changed_a, changed_b = sum(row.a.changed for row in found), sum(row.b.changed for row in found)
    by_tensor = math.fsum(row.a.changed * row.b.changed / row.entries for row in found)
    by_chance = changed_a * changed_b / entries if entries else 0.0
    return Overlap(
        a=a,
        b=b,
        tensors=[
            TensorOverlap(r.name, r.entries, r.a.changed, r.b.changed, r.shared.both, _correlation([r])) for r in found
        ],
        only_a=only_a,
        only_b=only_b,
        entries=entries,
        changed_a=changed_a,
        changed_b=changed_b,
        both=both,
        overlap_a=_ratio(both, changed_a),
        overlap_b=_ratio(both, changed_b),
        chance_a=_ratio(by_chance, changed_a),
        chance_b=_ratio(by_chance, changed_b),
        chance_a_by_tensor=_ratio(by_tensor, changed_a),
        chance_b_by_tensor=_ratio(by_tensor, changed_b),
        jaccard=_ratio(both, changed_a + changed_b - both),
        chance_jaccard=_ratio(by_chance, changed_a + changed_b - by_chance),
        correlation=_correlation(found),
        same_sign=_ratio(sum(row.shared.same_sign for row in found), both),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _correlation(rows: Sequence[_Row]) -> float | None:
    """Pearson's correlation of two runs' changes over all entries, from the sums of each tensor."""
    entries = sum(row.entries for row in rows)
    if not entries:
        return None
    mean_a, mean_b = (math.fsum(own.total for own in side) / entries for side in _sides(rows))
    squares_a, squares_b = (math.fsum(own.squares for own in side) for side in _sides(rows))
    spread_a, spread_b = squares_a - entries * mean_a**2, squares_b - entries * mean_b**2
    if spread_a <= ROUNDING * squares_a or spread_b <= ROUNDING * squares_b:
        return None
    product = math.fsum(row.shared.products for row in rows) - entries * mean_a * mean_b
    return min(1.0, max(-1.0, product / math.sqrt(spread_a * spread_b)))


def _sides(rows: Sequence[_Row]) -> tuple[list[_Own], list[_Own]]:
    return [row.a for row in rows], [row.b for row in rows]
