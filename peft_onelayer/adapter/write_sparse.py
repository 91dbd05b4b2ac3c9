"""Writes an adapter in the sparse encoding of SPECIFICATION.md: of each trained tensor what differs from the base."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from peft_onelayer.records.files import CONFIG, WEIGHTS, staged_directory
from peft_onelayer.records.locate import ADAPTER_FILES, hub_identity
from peft_onelayer.sparse.base import BaseRecord, Comparison, compare, not_compared, other_base, what_differs
from peft_onelayer.sparse.digest import dtype_name
from peft_onelayer.sparse.encoding import DTYPES, SparseEncoding, describe_base, encode
from peft_onelayer.sparse.names import TRAINED, base_name
from peft_onelayer.tuner.base import base_entries, embedding_names
from peft_onelayer.tuner.quantized import is_quantized

from .checkpoint import Checkpoint
from .merge import check_unquantized, trained_dtype
from .reader import AdapterFile, open_adapter


def write_sparse(
    adapter: AdapterFile | Path | str,
    out: Path | str,
    base: nn.Module | Path | str,
    *,
    allow_other_base: bool = False,
) -> SparseEncoding:
    """Write an adapter, dense or sparse, to the new folder `out` in the sparse encoding.

    What is kept of a trained tensor is its effective value, the master rounded to the dtype of the base; that value is
    restored bit for bit on loading. `out` appears complete or not at all. The other files of an adapter (run.json,
    layer_profile.json, README.md) are copied.

    Args:
        adapter: a folder.
        out: a folder that does not exist yet, or an empty one.
        base: the base: a loaded model, wrapped by PEFT or not, in the dtype it was trained in, or a checkpoint folder,
            which is taken in the recorded dtype.
        allow_other_base: take a base of the same shapes that a sparse adapter was not trained on.

    Returns:
        What was recorded.

    Raises:
        ValueError: a damaged adapter, one made for another base or a quantized one, or a base that is merged.
        TargetError: `out` may not be used, by `check_folder`.
    """
    file = adapter if isinstance(adapter, AdapterFile) else open_adapter(adapter)
    tensor_of, identity = _open_base(base, file)
    record = file.trained_on
    if record is not None:
        comparison, here = _compare(file, record, base)
        if allow_other_base:
            record = here
        elif comparison.other:
            raise other_base(what_differs(comparison.other), file.recorded_base)
        check_unquantized(file, allow_other_base)
        if not allow_other_base and (message := not_compared(comparison)):
            warnings.warn(message, stacklevel=2)
    # A head or embeddings beside the block stay as they are.
    beside = {
        key: file.tensor(name) for name in file.names if not file.is_trained(name) for key in file.keys[name].values()
    }

    def trained() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for name in filter(file.is_trained, file.names):
            original = tensor_of(name)
            suffix, key = next(iter(file.keys[name].items()))
            value = file.tensor(name, original, allow_other_base)
            yield key.removesuffix(f".{suffix}") if suffix else key, value, original

    state, encoding = encode(trained(), identity)
    with staged_directory(Path(out)) as staging:
        save_file(beside | state, staging / WEIGHTS, metadata={"format": "pt"})
        config = {**file.config, "encoding": encoding.to_json()}
        if record is not None:
            config["trained_on"] = record.to_json()
        (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        for extra in ADAPTER_FILES:
            source = file.folder / extra
            if extra not in (CONFIG, WEIGHTS) and source.is_file() and not source.is_symlink():
                shutil.copyfile(source, staging / extra)
    return encoding


def _compare(file: AdapterFile, record: BaseRecord, base: Any) -> tuple[Comparison, BaseRecord]:
    """How `base` compares with the record of an adapter, and the adapter's record if it had been trained on `base`.
    What a sparse adapter's own digests guard is left out of the comparison."""
    whole = file.config.get("modules_to_save") or []
    if isinstance(base, nn.Module):
        found, unavailable = base_entries(base, whole)
        comparison = compare(record.tensors, found, unavailable, embedding_names(base))
        known = {name: entries.sampled for name, entries in found.items()}
        block = {name: known.get(name, sample) for name, sample in record.block.items()}
        rest = {name: sample for name, sample in known.items() if name not in block}
        here = BaseRecord(block, rest, record.stages)
        shapes = {name: entries.shape for name, entries in found.items()}
    else:
        checkpoint = Checkpoint(Path(base))
        comparison = checkpoint.compare(record)
        shapes = {name: entries.shape for name, entries in checkpoint.entries.items()}
        common = record.block.keys() & checkpoint.entries.keys()
        here = checkpoint.record({name: trained_dtype(file, name, checkpoint) for name in sorted(common)}, whole)
    if not record.fits(shapes):  # said when the tensors are read
        return Comparison({}, {}), here
    comparison = comparison.without(file.config.get("saved_embeddings") or [])  # the adapter holds them itself
    return comparison if file.sparse is None else comparison.without(record.block), here


def _open_base(base: Any, file: AdapterFile) -> tuple[Callable[[str], torch.Tensor], dict[str, Any]]:
    """How to get a tensor of the base by name, and what is to be recorded of the base."""
    config = file.config
    given_name, revision, depth = config.get("base_model_name_or_path"), config.get("revision"), config["num_layers"]
    if isinstance(base, nn.Module):
        if any(isinstance(module, BaseTunerLayer) and module.merged for module in base.modules()):
            raise ValueError("an adapter is merged into the base; call unmerge_adapter() first.")
        weights = {base_name(name): p for name, p in base.named_parameters() if TRAINED not in name}
        model_config = getattr(base, "config", None)
        source: Callable[[str], torch.Tensor] = weights.__getitem__
        names = set(weights)
    else:
        checkpoint = Checkpoint(Path(base))
        model_config = None if checkpoint.model is None else checkpoint.model.config
        named = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
        dtype = getattr(torch, named) if named in DTYPES else None
        names = set(checkpoint.stored_as)
        revision = revision or hub_identity(Path(base))[1]

        def source(name: str) -> torch.Tensor:
            tensor = checkpoint.read(checkpoint.stored_as[name])
            if file.base_dtype(name) is None:
                return tensor.to(dtype=dtype)
            return tensor.to(getattr(torch, trained_dtype(file, name, checkpoint)))

    def tensor_of(name: str) -> torch.Tensor:
        if name not in names:
            raise ValueError(
                f"the base has no tensor {name}: the adapter was made for another one, or transformers makes it from "
                "several tensors of the checkpoint, and the base must be given as a loaded model."
            )
        tensor = source(name)
        if is_quantized(tensor) or dtype_name(tensor) not in DTYPES:
            raise ValueError(f"the base's {name} is {tensor.dtype}, quantized; give the base in floating point.")
        return tensor

    return tensor_of, describe_base(model_config, given_name, revision, depth)
