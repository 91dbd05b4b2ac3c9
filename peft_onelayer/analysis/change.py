"""What training changed between a base and a checkpoint or adapters made from it, for each tensor, block and kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_onelayer.adapter.checkpoint import Checkpoint
from peft_onelayer.adapter.reader import AdapterFile
from peft_onelayer.records.fields import without_missing_parts
from peft_onelayer.records.locate import check_revision
from peft_onelayer.records.movement import Movement
from peft_onelayer.sparse.names import block_of

from .sources import open_base, open_change, open_other

if TYPE_CHECKING:
    from .measure import TensorChange

MEANS = ("unchanged", "unchanged_official")


@dataclass(frozen=True)
class GroupChange:
    """What changed in a group of tensors: a block, a kind of tensor over all blocks, or all.

    Attributes:
        name: of the group, such as "model.layers.5" or "model.layers.*.mlp.down_proj.weight".
        layer: the block's index; None but of a block.
        tensors: their number.
        entries: of all of them.
        unchanged: by tolerance, the share of all entries, as `TensorChange.unchanged`.
        unchanged_official: likewise.
        mean_unchanged: the unweighted mean of the tensors' shares, which is a layer's figure in the official code of
            arXiv 2505.11711.
        mean_unchanged_official: likewise.
        changed: entries with another value in the base's dtype.
        norm: Frobenius norm of the change.
        relative: the same over the norm of the base's tensors; None where that is 0.
        rank_share: mean over the matrices of the rank over the largest possible; None where no rank was measured.
        rank_share_official: likewise, of the official code's difference.
        effective_rank_share: likewise, of the effective rank.
        never_moved: tensors of which no entry has another value in the base's dtype.
    """

    name: str
    layer: int | None
    tensors: int
    entries: int
    unchanged: dict[str, float]
    unchanged_official: dict[str, float]
    mean_unchanged: dict[str, float]
    mean_unchanged_official: dict[str, float]
    changed: int
    norm: float
    relative: float | None
    rank_share: float | None
    rank_share_official: float | None
    effective_rank_share: float | None
    never_moved: list[str]


@dataclass(frozen=True)
class Analysis:
    """What changed; `to_json` is what `onelayer analyze --json` prints.

    Attributes:
        base: as it was given.
        other: as it was given; several adapters in one text.
        kind: "checkpoint" or "adapter". Of an adapter its trained tensors are measured; the others are the base's.
        tensors: those of both, sorted by name.
        layers: of each block with a tensor among them, in order.
        kinds: of each kind of tensor.
        total: of all tensors.
        skipped: tensors that were not compared, by name, with the reason.
    """

    base: str
    other: str
    kind: str
    tensors: list[TensorChange]
    layers: list[GroupChange]
    kinds: list[GroupChange]
    total: GroupChange
    skipped: dict[str, str]

    @property
    def movement(self) -> Movement:
        """What run.json holds of it."""
        return Movement([tensor.movement for tensor in self.tensors])

    @property
    def dtypes(self) -> str:
        """The dtypes in words: of the base's weights and of what was compared with them."""
        base, other = ({getattr(t, name) for t in self.tensors} for name in ("dtype", "other_dtype"))
        kept = "the adapter's stored values" if self.kind == "adapter" else "the other's weights"
        return f"the base's weights are {' and '.join(sorted(base))}, {kept} {' and '.join(sorted(other))}"

    def summary(self) -> str:
        """One line: how much changed, and which tensors never moved. In blocks that did not move at all tensors are not
        named one by one."""
        moved = {layer.name for layer in self.layers if len(layer.never_moved) < layer.tensors}
        whole = [layer for layer in self.layers if layer.name not in moved]
        if not whole or not moved:
            return self.movement.summary()
        rest = Movement([t.movement for t in self.tensors if block_of(t.name)[0] in {*moved, None}])
        blocks = f"{len(whole)} of {len(self.layers)} blocks did not change at all"
        return f"{rest.summary()}; {blocks} (shares and counts are of the other tensors)"

    def to_json(self) -> dict[str, Any]:
        """The JSON object, without the fields that do not apply."""
        summary = {"summary": self.summary(), "notes": self.movement.notes(), "dtypes": self.dtypes}
        own = {field.name: without_missing_parts(getattr(self, field.name)) for field in fields(self)}
        own["tensors"] = [_with_share(tensor) for tensor in self.tensors]
        return {"format": "onelayer-analysis-1", **own, **summary}


def analyze_change(
    base: str | Path,
    other: str | Path | Sequence[str | Path],
    *,
    revision: str | None = None,
    other_revision: str | None = None,
    allow_other_base: bool = False,
    spectrum: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """Measure what training changed, tensor by tensor from the files, with a bounded part of them in memory.

    A checkpoint and a dense adapter are read in pieces. Of a sparse adapter one whole tensor and the base's are in
    memory at a time. Ranks come from singular values in float64; of a matrix with more than 4096 rows and columns from
    4096 of the shorter side, evenly spaced, which gives lower bounds.

    Args:
        base: folder or Hub id of the base's checkpoint.
        other: a checkpoint, or one or several adapters of this method, dense or sparse: folders or Hub ids. Several
            adapters are taken together, as merged, and must not train the same tensors.
        revision: branch, tag or commit of `base` on the Hub; default, for an adapter of it the commit that it records.
        other_revision: the same of `other`.
        allow_other_base: measure against a base that the adapter was not trained on, if the shapes fit.
        spectrum: whether ranks and singular values are wanted, which cost most of the time.
        on_progress: called with the entries measured so far and in all.

    Returns:
        What changed.

    Raises:
        ValueError: in one line: not there, damaged, quantized, another base, no tensor in common, NaN or Inf.
    """
    names = [other] if isinstance(other, (str, Path)) else list(other)
    if not names:
        raise ValueError("nothing was given to compare the base with.")
    check_revision(base, revision)
    for name in names:
        check_revision(name, other_revision, "other_revision")
    others = [open_other(name, other_revision) for name in names]
    if revision is None:
        revision = recorded_revision(base, others)
    label = ", ".join(map(str, names))
    change = open_change(open_base(base, revision), others, label, allow_other_base)
    from .measure import measure

    done, tensors = 0, []
    for name in change.names:
        tensors.append(measure(change.pair(name), spectrum))
        done += tensors[-1].entries
        on_progress(done, change.entries)
    return summarize(str(base), label, change.kind, tensors, change.skipped)


def summarize(base: str, other: str, kind: str, tensors: list[TensorChange], skipped: dict[str, str]) -> Analysis:
    """The analysis of measured tensors: in groups by block and by kind."""
    blocks: dict[str, list[TensorChange]] = {}
    kinds: dict[str, list[TensorChange]] = {}
    for tensor in tensors:
        block, _, kind_of_tensor = block_of(tensor.name)
        kinds.setdefault(kind_of_tensor, []).append(tensor)
        if block is not None:
            blocks.setdefault(block, []).append(tensor)
    layers = [_group(name, members, block_of(members[0].name)[1]) for name, members in blocks.items()]
    return Analysis(
        base=base,
        other=other,
        kind=kind,
        tensors=tensors,
        layers=sorted(layers, key=lambda group: (group.name.rpartition(".")[0], group.layer)),
        kinds=[_group(name, members) for name, members in sorted(kinds.items())],
        total=_group("all", tensors),
        skipped=dict(sorted(skipped.items())),
    )


def recorded_revision(base: str | Path, others: Iterable[Checkpoint | AdapterFile]) -> str | None:
    """The commit of `base` that the first adapter among `others` was trained on, where it records this base."""
    configs = [other.config for other in others if isinstance(other, AdapterFile)]
    return next((c.get("revision") for c in configs if c.get("base_model_name_or_path") == str(base)), None)


def _group(name: str, tensors: Sequence[TensorChange], layer: int | None = None) -> GroupChange:
    entries = sum(tensor.entries for tensor in tensors)
    shares: dict[str, dict[str, float]] = {}
    for field in MEANS:
        found = [getattr(tensor, field) for tensor in tensors]
        shares[field] = {
            key: sum(round(share[key] * t.entries) for share, t in zip(found, tensors, strict=True)) / entries
            for key in found[0]
        }
        shares[f"mean_{field}"] = {key: math.fsum(share[key] for share in found) / len(found) for key in found[0]}
    norm = math.sqrt(math.fsum(tensor.norm**2 for tensor in tensors))
    base = math.sqrt(math.fsum(tensor.base_norm**2 for tensor in tensors))

    def mean_rank(field: str) -> float | None:
        ranks = [getattr(t, field) / t.largest_rank for t in tensors if t.largest_rank]
        return math.fsum(ranks) / len(ranks) if ranks else None

    return GroupChange(
        name=name,
        layer=layer,
        tensors=len(tensors),
        entries=entries,
        changed=sum(tensor.changed for tensor in tensors),
        norm=norm,
        relative=norm / base if base else None,
        rank_share=mean_rank("rank"),
        rank_share_official=mean_rank("rank_official"),
        effective_rank_share=mean_rank("effective_rank"),
        never_moved=[tensor.name for tensor in tensors if not tensor.changed],
        **shares,
    )


def _with_share(tensor: TensorChange) -> dict[str, Any]:
    """A tensor as JSON values, with what is derived from its counts."""
    return {
        **without_missing_parts(tensor),
        "relative": tensor.relative,
        "entries": tensor.entries,
        "moved": tensor.moved,
    }
