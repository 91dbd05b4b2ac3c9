"""Writes an adapter in other forms: for plain PEFT, as a LoRA, dense, sparse, or as flat indices and values."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LNTuningConfig, LoraConfig, PeftConfig
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_onelayer.records.files import CONFIG, WEIGHTS, check_folder, output, staged_directory
from peft_onelayer.records.locate import adapter_folder, base_folder, hub_identity
from peft_onelayer.sparse.base import Comparison, not_compared
from peft_onelayer.sparse.names import TRAINED
from peft_onelayer.sparse.tensor import changed_entries

from .checkpoint import Checkpoint
from .merge import check_base, effective_tensor
from .reader import AdapterFile, open_adapter
from .write_sparse import write_sparse

FORMATS = ("peft", "lora", "dense", "sparse", "flat")
FLAT_WEIGHTS = "sparse_weights.safetensors"  # PEFT's own name would promise that PEFT can load it
PREFIX = "base_model.model."


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
      into the flattened tensor) and `{name}.values` (the new values, in the base's dtype).

    Args:
        adapter: a folder or a Hub id.
        out: a folder that does not exist yet, or an empty one.
        base: folder or Hub id of the base's checkpoint, for all but a dense adapter to "peft" or "dense". Default, what
            the adapter was trained on. With it, "peft" stores the base's dtype in place of float32.
        rank: for "lora", of every tensor.
        energy: for "lora", keep the smallest rank that has this share of the change's squared Frobenius norm; .99 if
            neither is given.
        allow_other_base: take `base` although the adapter was trained on another one of the same shapes. What is
            written names `base` as its base model.

    Raises:
        ValueError: an unknown format, a damaged adapter, a base that is missing or another one, or weights for which
            the format has no place.
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
        recorded = file.config.get("base_model_name_or_path")
        chosen = str(base or recorded or "")
        if not chosen:
            raise ValueError(f"{file.folder} does not name its base model; give it.")
        checkpoint = Checkpoint(base_folder(chosen, file.config.get("revision") if chosen == recorded else None))
        if unchecked := check_base(file, checkpoint, allow_other_base):
            warnings.warn(not_compared(Comparison({}, unchecked)), stacklevel=2)
        if allow_other_base and chosen != recorded:
            hub_id, commit = hub_identity(checkpoint.folder)
            named: dict[str, Any] = {"base_model_name_or_path": hub_id or str(checkpoint.folder), "revision": commit}
            if file.trained_on is not None:
                record = checkpoint.record(file.trained_on.block, file.config.get("modules_to_save") or [])
                named["trained_on"] = record.to_json()
                file = replace(file, trained_on=record)
            file = replace(file, config=file.config | named)
    if format == "sparse":
        assert checkpoint is not None
        records = write_sparse(file, out, checkpoint.folder, allow_other_base=allow_other_base).tensors
        written = open_adapter(out)
        sizes = {name: sum(part.bytes for part in written.stored_parts(name).values()) for name in written.names}
        tensors = [ExportedTensor(name, sizes[name], changed=records[name].changed) for name in written.names]
        return Exported(out, format, (out / WEIGHTS).stat().st_size, tensors)

    def changes(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert checkpoint is not None
        original = checkpoint.read(checkpoint.stored_as[name])
        return effective_tensor(file, name, original, allow_other_base), original

    def value_of(name: str) -> torch.Tensor:
        return file.tensor(name) if checkpoint is None else changes(name)[0]

    with staged_directory(out) as staging:
        if format == "peft":
            exported = _peft(file, value_of, staging)
        elif format == "dense":
            # the masters of a dense adapter are more than its effective values
            exported = _dense(file, value_of if file.sparse is not None else file.tensor, staging)
        elif format == "lora":
            exported = _lora(file, changes, checkpoint, rank, energy, staging)
        else:
            exported = _flat(file, changes, staging)
        weights = staging / (FLAT_WEIGHTS if format == "flat" else WEIGHTS)
        size = weights.stat().st_size
    tensors, lost, left_out = exported
    return Exported(out, format, size, tensors, lost, left_out)


_Result = tuple[list[ExportedTensor], float, float]
_Changes = Callable[[str], tuple[torch.Tensor, torch.Tensor]]  # name -> (trained, base)


def _save(tensors: dict[str, torch.Tensor], config: PeftConfig, file: AdapterFile, folder: Path) -> None:
    """An adapter of one of PEFT's own types."""
    for name in ("base_model_name_or_path", "revision", "task_type"):
        setattr(config, name, file.config.get(name))
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _sizes(names: list[str], tensors: dict[str, torch.Tensor], keys: dict[str, str]) -> list[ExportedTensor]:
    return [ExportedTensor(name, tensors[keys[name]].nbytes) for name in names]


def _peft(file: AdapterFile, value_of: Callable[[str], torch.Tensor], folder: Path) -> _Result:
    tensors, keys = {}, {}
    modules = sorted({name.rpartition(".")[0] for name in file.names})
    for name in file.names:
        module, _, leaf = name.rpartition(".")
        value = value_of(name).contiguous()
        inside = any(other.startswith(f"{module}.") for other in modules)
        if not file.is_trained(name):
            raise ValueError(
                f"{name} is no part of the trained block (modules_to_save), for which LN_TUNING has no place."
            )
        if leaf not in ("weight", "bias") or value.dim() > 2 or inside:
            raise ValueError(
                f"PEFT's LN_TUNING copies linear layers and norms, and {name} of shape {list(value.shape)} belongs to "
                "another kind of module (fused experts, a state-space mixer); use the format dense or sparse, or merge "
                "the adapter into the checkpoint."
            )
        keys[name] = f"{PREFIX}{module}.ln_tuning_layers.{leaf}"
        tensors[keys[name]] = value
    # One regular expression, matched as a whole: a list would also match the ends of other modules' names.
    config = LNTuningConfig(target_modules="|".join(re.escape(module) for module in modules))
    _save(tensors, config, file, folder)
    return _sizes(file.names, tensors, keys), 0.0, 0.0


def _dense(file: AdapterFile, value_of: Callable[[str], torch.Tensor], folder: Path) -> _Result:
    tensors, keys = {}, {}
    for name in file.names:
        module, _, leaf = name.rpartition(".")
        trained = f"{PREFIX}{module}{TRAINED}{leaf}"
        keys[name] = trained if file.is_trained(name) else next(iter(file.keys[name].values()))
        tensors[keys[name]] = value_of(name).float().contiguous()
    with (file.folder / WEIGHTS).open("rb") as stored:
        tensors |= {key: file.stored[key].read(stored) for key in file.masks.values()}
    config = {name: value for name, value in file.config.items() if name != "encoding"}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return _sizes(file.names, tensors, keys), 0.0, 0.0


def _flat(file: AdapterFile, changes: _Changes, folder: Path) -> _Result:
    tensors: dict[str, torch.Tensor] = {}
    exported, shapes = [], {}
    for name in file.names:
        value, base = changes(name)
        if value.numel() > 2**31:
            raise ValueError(
                f"{name} has {value.numel()} entries, more than 32-bit indices reach; use the format sparse."
            )
        indices, values = changed_entries(value, base)
        shapes[name] = list(value.shape)
        tensors |= {f"{name}.indices": indices.to(torch.int32), f"{name}.values": values}
        exported.append(ExportedTensor(name, 4 * indices.numel() + values.nbytes, changed=indices.numel()))
    counts = {"changed": sum(t.changed or 0 for t in exported), "entries": sum(_numel(s) for s in shapes.values())}
    metadata = {"format": "pt", "shapes": json.dumps(shapes), **{name: str(count) for name, count in counts.items()}}
    for name in ("base_model_name_or_path", "revision"):
        if file.config.get(name):
            metadata[name] = file.config[name]
    save_file(tensors, folder / FLAT_WEIGHTS, metadata=metadata)
    return exported, 0.0, 0.0


def _lora(
    file: AdapterFile,
    changes: _Changes,
    checkpoint: Checkpoint | None,
    rank: int | None,
    energy: float | None,
    folder: Path,
) -> _Result:
    if checkpoint is None or checkpoint.model is None:
        raise ValueError("only a base of a model class of transformers tells which weights are linear layers'.")
    tensors: dict[str, torch.Tensor] = {}
    ranks, exported, transposed = {}, [], set()
    for name in file.names:
        module, _, leaf = name.rpartition(".")
        layer = checkpoint.model.get_submodule(module)
        value, base = changes(name)
        delta = value.double() - base.double()
        change = float(delta.norm())
        if leaf != "weight" or not isinstance(layer, (nn.Linear, Conv1D)):
            exported.append(ExportedTensor(name, 0, error=1.0 if change else 0.0, change=change))
            continue
        transposed.add(isinstance(layer, Conv1D))
        if isinstance(layer, Conv1D):
            delta = delta.T
        b, a = low_rank(delta, rank, 0.99 if energy is None else energy)
        if not change:
            exported.append(ExportedTensor(name, 0, rank=0, error=0.0, change=0.0))
            continue
        error = float((delta - b.double() @ a.double()).norm()) / change
        ranks[module] = len(a)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        exported.append(ExportedTensor(name, a.nbytes + b.nbytes, rank=len(a), error=error, change=change))
    if not ranks:
        raise ValueError("no linear layer differs from the base's, so there is nothing that a LoRA could hold.")
    largest = max(ranks.values())
    others = {module: r for module, r in ranks.items() if r != largest}
    # alpha = r throughout: the scale is 1, also for vLLM, which reads r and lora_alpha and no patterns
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=others,
        fan_in_fan_out=transposed == {True},
    )
    _save(tensors, config, file, folder)
    total = sum(t.change**2 for t in exported if t.change)
    lost = sum((t.change * t.error) ** 2 for t in exported if t.change and t.error)
    left_out = sum(t.change**2 for t in exported if t.change and t.rank is None)
    return exported, (lost / total) ** 0.5, (left_out / total) ** 0.5


def low_rank(delta: torch.Tensor, rank: int | None, energy: float = 0.99) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of `delta` of rank r, by Eckart and Young's theorem, as a product.

    The singular vectors of the shorter side are the eigenvectors of its Gram matrix; float64 makes up for squaring.

    Args:
        delta: (m, n), float64.
        rank: r, cut to min(m, n); None for the smallest with a share `energy` of the squared Frobenius norm.

    Returns:
        B of shape (m, r) and A of shape (r, n), float32, with B @ A close to `delta`.

    >>> b, a = low_rank(torch.outer(torch.arange(3.0), torch.ones(4)).double(), rank=None)
    >>> b.shape, a.shape
    (torch.Size([3, 1]), torch.Size([1, 4]))
    """
    if delta.shape[0] > delta.shape[1]:
        a, b = low_rank(delta.T, rank, energy)
        return b.T.contiguous(), a.T.contiguous()
    squares, vectors = torch.linalg.eigh(delta @ delta.T)  # (m,), (m, m), ascending
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    if rank is None:
        kept = squares.cumsum(0)
        rank = int((kept < energy * kept[-1]).sum()) + 1
    b = vectors[:, :rank]
    return b.float().contiguous(), (b.T @ delta).float().contiguous()


def _numel(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
