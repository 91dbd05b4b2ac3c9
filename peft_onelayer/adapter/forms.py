"""The forms in which an adapter is exported, each by a function that writes it into a folder and says what it wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LNTuningConfig, LoraConfig, PeftConfig
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_onelayer.records.files import CONFIG, WEIGHTS
from peft_onelayer.sparse.names import TRAINED
from peft_onelayer.sparse.tensor import changed_entries

from .checkpoint import Checkpoint
from .export import FLAT_WEIGHTS, ExportedTensor
from .reader import AdapterFile

PREFIX = "base_model.model."

Result = tuple[list[ExportedTensor], float, float]
Changes = Callable[[str], tuple[torch.Tensor, torch.Tensor]]  # name -> (trained, base)


def _save(tensors: dict[str, torch.Tensor], config: PeftConfig, file: AdapterFile, folder: Path) -> None:
    """An adapter of one of PEFT's own types."""
    for name in ("base_model_name_or_path", "revision", "task_type"):
        setattr(config, name, file.config.get(name))
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _sizes(names: list[str], tensors: dict[str, torch.Tensor], keys: dict[str, str]) -> list[ExportedTensor]:
    return [ExportedTensor(name, tensors[keys[name]].nbytes) for name in names]


def peft(file: AdapterFile, value_of: Callable[[str], torch.Tensor], folder: Path) -> Result:
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


def dense(file: AdapterFile, value_of: Callable[[str], torch.Tensor], folder: Path) -> Result:
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


def flat(file: AdapterFile, changes: Changes, folder: Path) -> Result:
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


def lora(
    file: AdapterFile,
    changes: Changes,
    checkpoint: Checkpoint | None,
    rank: int | None,
    energy: float | None,
    folder: Path,
) -> Result:
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
