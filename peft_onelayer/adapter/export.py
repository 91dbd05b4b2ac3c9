"""Writes an adapter in other forms: for plain PEFT, as a LoRA, dense, sparse, or as flat indices and values.

What is wrong with the arguments, the adapter or the folders is said before torch is imported; forms.py has the forms.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_onelayer.records.files import WEIGHTS, check_folder, output, staged_directory
from peft_onelayer.records.locate import adapter_folder, hub_identity
from peft_onelayer.sparse.base import Comparison, not_compared

from .checkpoint import Checkpoint
from .merge import as_trained, check_base, check_unquantized, trained_dtype
from .reader import open_adapter

if TYPE_CHECKING:
    import torch

FORMATS = ("peft", "lora", "dense", "sparse", "flat")
FLAT_WEIGHTS = "sparse_weights.safetensors"  # PEFT's own name would promise that PEFT can load it


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of the adapter in its new form.

    Attributes:
        name: in the base model.
        bytes: what it takes; 0 if it is left out.
        changed: for "sparse" and "flat", the number of entries that differ from the base's.
        rank: for "lora"; 0 where nothing changed, None where LoRA has no place for the tensor.
        error: for "lora", the Frobenius norm of what is lost over that of the change; 1 if it is left out.
        change: for "lora", the Frobenius norm of the change.
    """

    name: str
    bytes: int
    changed: int | None = None
    rank: int | None = None
    error: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class Exported:
    """What an export wrote; `to_json` is what `onelayer export --json` prints.

    Attributes:
        folder: the new folder.
        encoding: one of `FORMATS`.
        bytes: size of its weights file.
        tensors: one for each tensor of the adapter, in the order of their names.
        lost: for "lora", the norm of all that is lost over the norm of the whole change; 0 for the other formats.
        left_out: for "lora", the norm of the change of the tensors left out over the norm of the whole change.
    """

    folder: Path
    encoding: str
    bytes: int
    tensors: list[ExportedTensor] = field(default_factory=list)
    lost: float = 0.0
    left_out: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {"format": "onelayer-export-1", **asdict(self), "folder": str(self.folder)}


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    format: str,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    allow_other_base: bool = False,
) -> Exported:
    """Write `adapter` to the new folder `out` in another form.

    - "peft": PEFT's LN_TUNING type, which holds whole copies of modules as this method does. Plain PEFT and
      transformers load it without this package, to the same bits.
    - "lora": each linear layer's change, approximated by its singular vectors. Norms and biases are left out.
    - "dense": every tensor in float32, for this package; what training goes on from.
    - "sparse": what differs from the base, for this package; see SPECIFICATION.md.
    - "flat": the same for other tools: in `sparse_weights.safetensors` by the base's names `{name}.indices` (int32,
      into the flattened tensor) and `{name}.values` (the new values).

    The base and the new values are taken in the dtype that the base was loaded in for training, as far as the adapter
    records it, also where the base is stored in another one.

    Args:
        adapter: a folder or a Hub id.
        out: a folder that does not exist yet, or an empty one.
        base: folder or Hub id of the base's checkpoint, for all but a dense adapter to "peft" or "dense". Default, what
            the adapter was trained on. With it, "peft" stores the dtype of the training in place of float32.
        rank: for "lora", of every tensor.
        energy: for "lora", keep the smallest rank that has this share of the change's squared Frobenius norm; .99 if
            neither is given.
        allow_other_base: take `base` although the adapter was trained on another one of the same shapes. What is
            written names `base` as its base model.

    Raises:
        ValueError: an unknown format, a damaged adapter, a base that is missing or another one, weights for which the
            format has no place, or "lora", "sparse" or "flat" of an adapter of a quantized base.
        TargetError: `out` may not be used, by `check_folder`, or another process writes to it.
        DiskFullError: the disk is full.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not known; expected one of {', '.join(FORMATS)}.")
    if format != "lora" and (rank is not None or energy is not None):
        raise ValueError(f"rank and energy are those of the format lora, not of {format}.")
    if rank is not None and energy is not None:
        raise ValueError("rank and energy exclude each other; give one.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} keeps nothing; give 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy} is no share; give a number above 0 and up to 1.")
    check_folder(Path(out))  # before anything is downloaded
    with output(Path(out)):
        return _export(adapter, Path(out), format, base, rank, energy, allow_other_base)


def _export(
    adapter: str | Path,
    out: Path,
    format: str,
    base: str | Path | None,
    rank: int | None,
    energy: float | None,
    allow_other_base: bool,
) -> Exported:
    file = open_adapter(adapter_folder(adapter))
    checkpoint = None
    if base is not None or file.sparse is not None or format not in ("peft", "dense"):
        instead = f"onelayer export {adapter} {out} --format {format} --base {{base}}"
        checkpoint = Checkpoint(file.base_folder(base, instead))
        unchecked = check_base(file, checkpoint, allow_other_base)
        if format not in ("peft", "dense"):
            check_unquantized(file, allow_other_base)
        if unchecked:
            warnings.warn(not_compared(Comparison({}, unchecked)), stacklevel=2)
        if allow_other_base and base and str(base) != file.config.get("base_model_name_or_path"):
            hub_id, commit = hub_identity(checkpoint.folder)
            named: dict[str, Any] = {"base_model_name_or_path": hub_id or str(checkpoint.folder), "revision": commit}
            if file.trained_on is not None:
                dtypes = {name: trained_dtype(file, name, checkpoint) for name in file.trained_on.block}
                record = checkpoint.record(dtypes, file.config.get("modules_to_save") or [])
                named["trained_on"] = record.to_json()
                file = replace(file, trained_on=record)
            file = replace(file, config=file.config | named)
    from . import forms
    from .write_sparse import write_sparse

    if format == "sparse":
        assert checkpoint is not None
        records = write_sparse(file, out, checkpoint.folder, allow_other_base=allow_other_base).tensors
        written = open_adapter(out)
        sizes = {name: sum(part.bytes for part in written.stored_parts(name).values()) for name in written.names}
        tensors = [ExportedTensor(name, sizes[name], changed=records[name].changed) for name in written.names]
        return Exported(out, format, (out / WEIGHTS).stat().st_size, tensors)

    def changes(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert checkpoint is not None
        return as_trained(file, name, checkpoint, allow_other_base)

    def value_of(name: str) -> torch.Tensor:
        return file.tensor(name) if checkpoint is None else changes(name)[0]

    with staged_directory(out) as staging:
        if format == "peft":
            exported = forms.peft(file, value_of, staging)
        elif format == "dense":
            # the masters of a dense adapter are more than its effective values
            exported = forms.dense(file, value_of if file.sparse is not None else file.tensor, staging)
        elif format == "lora":
            exported = forms.lora(file, changes, checkpoint, rank, energy, staging)
        else:
            exported = forms.flat(file, changes, staging)
        weights = staging / (FLAT_WEIGHTS if format == "flat" else WEIGHTS)
        size = weights.stat().st_size
    tensors, lost, left_out = exported
    return Exported(out, format, size, tensors, lost, left_out)
