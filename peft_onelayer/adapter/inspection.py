"""What is in an adapter's folder: blocks, tensors, encoding, sizes, what changed, and where it comes from.

Without the base only files' headers are read, and torch is not imported; with the base the change is measured too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from peft_onelayer.records.fields import Record
from peft_onelayer.records.files import CONFIG, PROFILE, RUN, WEIGHTS, read_fields
from peft_onelayer.records.locate import adapter_folder, base_folder, check_revision
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.run import RunRecord
from peft_onelayer.records.text import printable
from peft_onelayer.sparse.base import name_stages
from peft_onelayer.sparse.names import base_name, block_of

from .checkpoint import Checkpoint
from .merge import as_trained, check_base, check_unquantized
from .reader import AdapterFile, check_plain_file, open_adapter
from .stored import DTYPES, read_header

SomeRecord = TypeVar("SomeRecord", bound=Record)


@dataclass(frozen=True)
class InspectedTensor:
    """One tensor of an adapter.

    Attributes:
        name: in the base model.
        shape: of the tensor.
        dtype: of its stored values.
        encoding: what the file holds of it: "dense", or the parts of the sparse encoding, such as "gaps + values".
        bytes: what these take.
        base_digest: `tensor_digest` of the base's tensor that a sparse adapter was trained on; None for a dense one.
        changed: number of entries that differ from the base's, both in the dtype that the base was loaded in for
            training; None where not known.
        density: the share of them.
        change: Frobenius norm of the change; None without the base.
        relative: the same over the norm of the base's tensor.
    """

    name: str
    shape: list[int]
    dtype: str
    encoding: str
    bytes: int
    base_digest: str | None = None
    changed: int | None = None
    density: float | None = None
    change: float | None = None
    relative: float | None = None


@dataclass(frozen=True)
class Inspection:
    """An adapter's folder; `to_json` is what `onelayer inspect --json` prints.

    Attributes:
        folder: where it lies.
        layers: the trained blocks, counted from 0.
        num_layers: of the base; None for an adapter of PEFT's own, which does not say it.
        target_modules: the parts of the block that were trained; None for all.
        encoding: "dense" or "sparse"; of an adapter of PEFT's own, such as an export for plain PEFT, its type.
        bytes: size of adapter_model.safetensors.
        tensors: sorted by name.
        density: the share of all entries that differ from the base's; None where not known.
        change: Frobenius norm of the whole change; None without the base.
        base: name, Hub commit and, of a sparse adapter, `config_digest` of the base as the adapter records them.
        provenance: what adapter_config.json, run.json and layer_profile.json say of its making; what they do not say
            is missing.
        beside: names of the tensors that the file holds beside the block's: those of `modules_to_save`, and embeddings.
        stages: which blocks of which base were trained and merged before; "" where none were or nothing is recorded.
        unchecked: of the base given, the tensors that could not be compared with the record, by name, with the reason.
        quantized: names of the trained tensors that were quantized in the base when the adapter was trained.
    """

    folder: Path
    layers: list[int]
    num_layers: int | None
    target_modules: Any
    encoding: str
    bytes: int
    tensors: list[InspectedTensor]
    density: float | None
    change: float | None
    base: dict[str, Any]
    provenance: dict[str, Any]
    beside: list[str] = field(default_factory=list)
    stages: str = ""
    unchecked: dict[str, str] = field(default_factory=dict)
    quantized: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"format": "onelayer-inspect-1", **asdict(self), "folder": str(self.folder)}


def inspect_adapter(
    adapter: str | Path, base: str | Path | None = None, *, revision: str | None = None, allow_other_base: bool = False
) -> Inspection:
    """Read the adapter in a folder or on the Hub, where the base is not downloaded.

    The change is measured in the dtype that the base was loaded in for training, as far as that is recorded.
    Of an adapter of PEFT's own, such as an export for plain PEFT, the tensors, their blocks and the base are told.

    Args:
        adapter: a folder or a Hub id.
        base: folder or Hub id of the base's checkpoint, to measure the change against.
        revision: branch, tag or commit of an adapter on the Hub.
        allow_other_base: measure against a base that the adapter was not trained on.

    Raises:
        ValueError: no adapter, or with `base` none of this method; damaged, beside a record with a wrong field, or made
            for another base than `base` or a quantized one.
    """
    check_revision(adapter, revision)
    folder = adapter_folder(adapter, revision)
    if base is None and (found := _of_peft(folder)):
        return found
    file = open_adapter(folder)
    checkpoint, unchecked = None, {}
    if base is not None:
        recorded = file.config.get("base_model_name_or_path")
        checkpoint = Checkpoint(base_folder(base, file.config.get("revision") if str(base) == recorded else None))
        unchecked = check_base(file, checkpoint, allow_other_base)
        check_unquantized(file, allow_other_base)
    tensors = [_tensor(file, name, checkpoint, allow_other_base) for name in file.names]
    entries = sum(math.prod(t.shape) for t in tensors)
    counts, norms = [t.changed for t in tensors], [t.change for t in tensors]
    return Inspection(
        folder=file.folder,
        layers=file.layers,
        num_layers=file.config["num_layers"],
        target_modules=file.config.get("target_modules"),
        encoding=file.encoding,
        bytes=(file.folder / WEIGHTS).stat().st_size,
        tensors=tensors,
        density=None if None in counts or not entries else sum(c for c in counts if c is not None) / entries,
        change=None if None in norms else sum(n**2 for n in norms if n is not None) ** 0.5,
        base={
            **file.recorded_base,
            "config": None if file.sparse is None else file.sparse.base.get("config"),
        },
        provenance=_provenance(file),
        beside=[name for name in file.names if not file.is_trained(name)],
        stages="" if file.trained_on is None else name_stages(file.trained_on.stages),
        unchecked=unchecked,
        quantized=file.quantized,
    )


def _of_peft(folder: Path) -> Inspection | None:
    """What can be said of an adapter of one of PEFT's own types; None for one of this method, or none at all."""
    check_plain_file(folder / CONFIG)
    config = read_fields(folder / CONFIG)
    kind, base, revision = (config.get(name) for name in ("peft_type", "base_model_name_or_path", "revision"))
    if kind == "SINGLE_LAYER" or not isinstance(kind, str):
        return None
    check_plain_file(folder / WEIGHTS)
    stored = read_header(folder / WEIGHTS)
    names = {key: base_name(key).replace(".ln_tuning_layers.", ".") for key in sorted(stored)}
    return Inspection(
        folder=folder,
        layers=sorted({index for name in names.values() if (index := block_of(name)[1]) is not None}),
        num_layers=None,
        target_modules=config.get("target_modules"),
        encoding=f"PEFT's {printable(kind, 40)}",
        bytes=(folder / WEIGHTS).stat().st_size,
        tensors=[
            InspectedTensor(name, list(of.shape), DTYPES.get(of.dtype, of.dtype), "dense", of.bytes)
            for of, name in ((stored[key], name) for key, name in names.items())
        ],
        density=None,
        change=None,
        base={
            "name": base if isinstance(base, str) else None,
            "revision": revision if isinstance(revision, str) else None,
            "config": None,
        },
        provenance={},
    )


def _tensor(file: AdapterFile, name: str, checkpoint: Checkpoint | None, allow_other_base: bool) -> InspectedTensor:
    parts = file.stored_parts(name)
    record = None if file.sparse is None else file.sparse.tensors.get(name)
    values = parts["" if record is None else "values"]
    shape = list(values.shape if record is None else record.shape)
    changed = None if record is None else record.changed
    change = relative = None
    if checkpoint is not None:
        from peft_onelayer.sparse.tensor import count_changed

        value, original = as_trained(file, name, checkpoint, allow_other_base)
        changed = count_changed(value, original)
        change = float((value.double() - original.double()).norm())
        relative = change / norm if (norm := float(original.double().norm())) else None
    count = math.prod(shape)
    return InspectedTensor(
        name=name,
        shape=shape,
        dtype=DTYPES[values.dtype],
        encoding="dense" if set(parts) in ({""}, {"values"}) else " + ".join(sorted(parts)),
        bytes=sum(part.bytes for part in parts.values()),
        base_digest=None if record is None else record.base,
        changed=changed,
        density=None if changed is None or not count else changed / count,
        change=change,
        relative=relative,
    )


def _provenance(file: AdapterFile) -> dict[str, Any]:
    run, profile = _record(RunRecord, file.folder / RUN), _record(LayerRanking, file.folder / PROFILE)
    found: dict[str, Any] = {"peft_version": file.config.get("peft_version")}
    if run is not None:
        found |= {
            "algorithm": run.settings.algorithm,
            "task": run.settings.source.name,
            "model": asdict(run.settings.model),
            "status": run.status,
            "seed": run.settings.seed,
            "command": run.command,
            "machine": run.machine,
            "moved": run.results.movement.summary() if run.results and run.results.movement else None,
        }
    if profile is not None:
        found["layer_profile"] = {"method": profile.method, "pick": profile.pick}
    return {name: value for name, value in found.items() if value is not None}


def _record(kind: type[SomeRecord], path: Path) -> SomeRecord | None:
    """What was written beside the adapter; None if nothing was."""
    if not path.exists():
        return None
    check_plain_file(path)
    return kind.from_file(path)
