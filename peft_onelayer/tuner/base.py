"""The base that an adapter is trained on or loaded on: samples its tensors in memory and compares them with the record.

The record is made when a model is wrapped, so that it costs nothing at a checkpoint and is whole although the model may
be sharded later.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from peft_onelayer.records.locate import cached_commit, cached_snapshots, weight_files
from peft_onelayer.sparse.base import (
    QUANTIZED,
    WIDTHS,
    BaseRecord,
    Comparison,
    Entries,
    Sampled,
    Stage,
    compare,
    name_stages,
    not_compared,
    other_base,
    positions,
    what_differs,
)
from peft_onelayer.sparse.digest import dtype_name
from peft_onelayer.sparse.encoding import SparseEncoding, describe_base
from peft_onelayer.sparse.names import base_name

from .config import SingleLayerConfig
from .mask import shape_of
from .quantized import is_quantized
from .sharding import gathered
from .weights import AdapterWeights

STAGES = "_onelayer_stages"  # attribute of a base in memory: the `Stage`s that were merged into it
# What wrappers put into the names of a base's tensors.
_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|original_module)(?=\.)")


def identify_base(
    model: nn.Module, config: SingleLayerConfig, trained: Collection[str], parameters: Collection[str] | None = None
) -> None:
    """Compare `model` with what `config` records of its base, if it came from a file, and record what is at hand.

    Args:
        model: the base, perhaps wrapped by other adapters already.
        config: the model's own; its field `trained_on` becomes the new record.
        trained: the names in the unwrapped model of the modules to train.
        parameters: the same of those of their own parameters that train; default, all.

    Raises:
        ValueError: another base, unless `config.allow_other_base`.

    Warns:
        UserWarning: tensors that could not be compared, by name; another base, if it is a plain module without a
            configuration of transformers.
    """
    found, unavailable = base_entries(model, config.modules_to_save or [])
    old = None if config.trained_on is None or config.base_is_recorded else BaseRecord.from_json(config.trained_on)
    shapes = {name: entries.shape for name, entries in found.items()}
    shapes |= {name: old.block[name].shape for name in unavailable if old is not None and name in old.block}
    if old is not None and not config.allow_other_base and old.fits(shapes):
        _check_base(model, config, old, compare(old.tensors, found, unavailable, embedding_names(model)))
    known = {
        name: Sampled(QUANTIZED, shape_of(tensor), {})
        for name, tensor in _base_tensors(model, config.modules_to_save or [])
        if is_quantized(tensor)
    }
    known |= {name: entries.sampled for name, entries in found.items()}
    if old is not None and not config.allow_other_base:  # what cannot be read here stays as it was recorded
        known |= {name: s for name, s in old.tensors.items() if name in unavailable}
    block = {
        name: sample
        for name, sample in known.items()
        if name.rpartition(".")[0] in trained and (parameters is None or name in parameters)
    }
    rest = {name: sample for name, sample in known.items() if name not in block}
    record = BaseRecord(block, rest, vars(model).get(STAGES, []))
    config.trained_on, config.base_is_recorded = (record.to_json() if block else None), True
    if config.revision is None and not unavailable and not is_renamed(model) and commit_hash(model) is None:
        note_commit(model, record)


def _check_base(model: Any, config: SingleLayerConfig, old: BaseRecord, comparison: Comparison) -> None:
    recorded: dict[str, Any] = {"name": config.base_model_name_or_path, "revision": config.revision}
    comparison = comparison.without(config.saved_embeddings or [])  # the file holds them itself
    if config.encoding is not None:  # its own digests, of every entry, say more of the block
        comparison, recorded = comparison.without(old.block), SparseEncoding.from_json(config.encoding).base
    if comparison.other:
        problem = what_differs(comparison.other)
        if old.stages:
            problem += f"; it was trained after {name_stages(old.stages)}"
        found = describe_model(model)
        if found["config"] is not None:
            raise other_base(problem, recorded, found)
        # a plain module, which has no checkpoint that it could be loaded from again
        warnings.warn(str(other_base(problem, recorded, found, way_out=False)), stacklevel=2)
    if message := not_compared(comparison):
        warnings.warn(message, stacklevel=2)


def describe_model(model: Any) -> dict[str, Any]:
    """What is known of a base in memory, as `describe_base` says it."""
    config = getattr(model, "config", None)
    known = config if hasattr(config, "to_diff_dict") else None
    return describe_base(known, getattr(config, "_name_or_path", None), commit_hash(model), 0)


def commit_hash(model: Any) -> str | None:
    """The Hub commit that a transformers model was loaded from, where it is known; None for a local folder or a plain
    module.

    transformers before 5.23 notes it, and from there our own loaders and `note_commit` do.
    """
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def note_commit(model: Any, record: BaseRecord) -> None:
    """Find the commit of a model that transformers from 5.23 has loaded from the Hub, by its weights, which lie in the
    Hub's cache, and note it on the model.

    It stays unknown where the weights in memory are those of no commit there, or of several with different files; where
    a tensor of `record` is quantized; and where the checkpoint has no safetensors, or other names for the block's.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or any(sample.dtype == QUANTIZED for sample in record.tensors.values()):
        return
    files = {folder.name: weight_files(folder) for folder in cached_snapshots(name)}
    embeddings = embedding_names(model)
    found = {
        commit: tuple(path.resolve() for path in paths)
        for commit, paths in files.items()
        if paths and _are_of(paths, record, embeddings)
    }
    if len(set(found.values())) == 1:
        main = cached_commit(name)
        model.config._commit_hash = main if main in found else min(found)


def _are_of(files: Iterable[Path], record: BaseRecord, embeddings: Collection[str]) -> bool:
    """Whether `record` is of the tensors in these files."""
    found = {}
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                for name in record.tensors.keys() & set(file.keys()):
                    tensor = file.get_tensor(name)
                    if dtype_name(tensor) in WIDTHS:
                        found[name] = Entries(_sample(tensor), tuple(tensor.shape))
    except (OSError, SafetensorError):  # damaged
        return False
    comparison = compare(record.tensors, found, {}, embeddings)
    return not comparison.other and not record.block.keys() <= comparison.unchecked.keys()


def base_entries(model: nn.Module, left_out: Iterable[str] = ()) -> tuple[dict[str, Entries], dict[str, str]]:
    """The sampled entries of a base's parameters and persistent floating-point buffers by their names in the unwrapped
    model, without an adapter's effect; and, of those that cannot be read, the reason.

    Tied parameters stand under each of their names. Parameters that DeepSpeed ZeRO-3 has partitioned are gathered one
    at a time, a collective.

    Args:
        left_out: names of modules whose tensors are not wanted, as `modules_to_save` names them.
    """
    unmerged = {
        id(parameter): module._unmerged[name]
        for module in model.modules()
        if isinstance(module, AdapterWeights) and module._unmerged
        for name, parameter in module._own()
    }
    sampled: dict[int, torch.Tensor] = {}
    names: dict[str, tuple[int, tuple[int, ...]]] = {}
    unavailable: dict[str, str] = {}
    for name, tensor in _base_tensors(model, left_out):
        tensor = unmerged.get(id(tensor), tensor)
        with gathered([tensor]):
            if reason := _unreadable(tensor):
                unavailable[name] = reason
                continue
            if id(tensor) not in sampled:
                sampled[id(tensor)] = _sample(tensor.detach())
            names[name] = id(tensor), tuple(tensor.shape)
    here = _to_cpu(sampled)
    return {name: Entries(here[key], shape) for name, (key, shape) in names.items()}, unavailable


def embedding_names(model: Any) -> set[str]:
    """The names of the tensors of the input and the output embeddings, which `resize_token_embeddings` changes."""
    getters = [getattr(model, f"get_{kind}_embeddings", None) for kind in ("input", "output")]
    found: list[nn.Module] = []
    for getter in filter(None, getters):
        try:
            found.append(getter())
        except NotImplementedError:  # transformers' answer for a model without
            continue
    return {
        _WRAPPERS.sub("", base_name(f"{path}.{name}")).removeprefix(".")
        for path, module in model.named_modules()
        if any(module is embedding for embedding in found)
        for name, _ in (
            module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        ).named_parameters()
    }


def record_stage(model: nn.Module, blocks: Iterable[int]) -> None:
    """Note on `model` that trained blocks were merged into it in memory, so that its name is no longer what it was."""
    name = getattr(model, "name_or_path", None) or None
    stage = Stage(name, commit_hash(model), sorted(set(blocks)))
    vars(model)[STAGES] = [*vars(model).get(STAGES, []), stage]


def is_renamed(model: nn.Module) -> bool:
    """Whether the name of `model` is that of a base into which blocks were merged since, and so names another model."""
    return bool(vars(model).get(STAGES))


def _base_tensors(model: nn.Module, left_out: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    parts = tuple(f".{name}." for name in left_out)
    tensors = [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ".single_layer_params." not in name and ".modules_to_save." not in name
    ]
    tensors += [
        (f"{path}.{name}", buffer)
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point() and name not in module._non_persistent_buffers_set
    ]
    for full_name, tensor in tensors:
        name = _WRAPPERS.sub("", base_name(full_name)).removeprefix(".")
        if not any(part in f".{name}" for part in parts):
            yield name, tensor


def _unreadable(tensor: torch.Tensor) -> str | None:
    """Why the entries of a base's tensor cannot be compared, in words."""
    if tensor.is_meta:
        return "on the meta device or offloaded"
    if isinstance(tensor, DTensor):
        return "sharded"
    if is_quantized(tensor) or dtype_name(tensor) not in WIDTHS:
        return f"quantized: {dtype_name(tensor)}"
    return None


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    chosen = _chosen(tensor.numel()).to(tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1)[chosen]
    return tensor[torch.unravel_index(chosen, tensor.shape)]


@functools.lru_cache(maxsize=64)  # a model has few sizes
def _chosen(entries: int) -> torch.Tensor:
    return torch.tensor(positions(entries), dtype=torch.long, device="cpu")


def _to_cpu(tensors: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Move many small tensors with one transfer for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for key, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(key)
    moved: dict[int, torch.Tensor] = {}
    for keys in groups.values():
        together = torch.cat([tensors[key] for key in keys]).cpu()
        moved |= dict(zip(keys, together.split([tensors[key].numel() for key in keys]), strict=True))
    return moved
