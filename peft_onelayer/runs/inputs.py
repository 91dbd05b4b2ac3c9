"""What can be told of the files that a command is given before torch, transformers and TRL are imported: a model's
configuration, an adapter, a data set, a mask. What is on the Hub is looked at later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_onelayer.adapter.checkpoint import Checkpoint
from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.adapter.stored import DTYPES, FLOATS, StoredTensor, read_header
from peft_onelayer.layers import Layers, parse_layers, resolve_layers
from peft_onelayer.records.files import CONFIG, WEIGHTS, read_fields
from peft_onelayer.records.locate import adapter_folder, cached_snapshot, check_adapter_folder, is_local
from peft_onelayer.sparse.base import OTHER_WEIGHTS, Sampled, other_base, positions, what_differs
from peft_onelayer.tasks.files import check_named, read_rows

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # as configurations call the number of blocks
LOOKED_AT = 2**26  # bytes of a data set that is read twice: here, and when it is needed


def check_blocks(model: str, layer: Layers) -> list[int] | None:
    """The blocks that a layer specification names, by config.json of a model's folder; None where it does not say.

    Raises:
        ValueError: by `resolve_layers`.
    """
    folder = Path(model).expanduser()
    depth = _depth(folder) if is_local(model) else None
    if depth is None or any(isinstance(part, tuple) and part[0] == "kind" for part in parse_layers(layer)):
        return None
    kinds = _text_fields(folder).get("layer_types")
    return resolve_layers(layer, depth, kinds if isinstance(kinds, list) else None)


def _depth(folder: Path) -> int | None:
    """The number of blocks of the model in a folder; None where its config.json does not say."""
    fields = _text_fields(folder)
    return next((fields[name] for name in DEPTHS if type(fields.get(name)) is int), None)


def _text_fields(folder: Path) -> dict[str, Any]:
    """What config.json says of the one stack of blocks; {} where there are several, or code decides."""
    try:
        config = read_fields(folder / "config.json")
    except ValueError:  # said where the model is loaded
        return {}
    if config.get("is_encoder_decoder") or "auto_map" in config:
        return {}
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def check_weights(model: str) -> None:
    """Raise ValueError for a model's folder without weights."""
    folder = Path(model).expanduser()
    if is_local(model) and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(f"{folder} holds no weights; expected *.safetensors beside its config.json.")


def check_adapter(name: str) -> Path | None:
    """The folder of an adapter on this machine; None for one on the Hub.

    Raises:
        ValueError: it is not there, or holds no adapter or a truncated one.
    """
    if not is_local(name) and "/" in name:
        return None
    folder = adapter_folder(name)
    check_adapter_folder(folder, name)
    read_header(folder / WEIGHTS)
    return folder


def check_fit(
    name: str, model: str, revision: str | None = None, *, allow_other_base: bool = False, way_out: bool = True
) -> None:
    """Raise ValueError for an adapter of this method that was made for another base, as far as the files tell without
    torch; the rest is compared when it is loaded.

    A checkpoint may store a tensor in another form than it has in memory. So a shape counts if its sizes are others in
    any order, and other weights if no matrix has the recorded ones.

    Args:
        name: the adapter, as `check_adapter` takes it.
        model: the base, a folder or a Hub id, which is looked at where it is on this machine; "" for the one that the
            adapter names.
        revision: of the base.
        allow_other_base: take other weights of the same shapes.
        way_out: whether the caller has this option.
    """
    folder = check_adapter(name)
    if folder is None or read_fields(folder / CONFIG).get("peft_type") != "SINGLE_LAYER":
        return
    adapter = open_adapter(folder)
    recorded = adapter.config.get("base_model_name_or_path")
    another = "another base model" + (f" ({recorded})" if recorded else "")
    if not model:
        model, revision = recorded or "", revision or adapter.config.get("revision")
    base = Path(model).expanduser() if is_local(model) else cached_snapshot(model, revision)
    if base is None:
        return
    depth = _depth(base)
    if depth is not None and depth != adapter.config["num_layers"]:
        raise ValueError(
            f"the adapter in {folder} was made for a model of {adapter.config['num_layers']} blocks and {model} has "
            f"{depth}: it belongs to {another}."
        )
    try:
        stored = Checkpoint(base).places
    except ValueError:
        # quantized or pickled weights, a part of them in the Hub's cache, or what is said where the model is loaded
        return
    record = adapter.trained_on
    if record is None:
        return
    for tensor, sample in record.block.items():
        if tensor in stored and _sizes(stored[tensor].shape) != _sizes(sample.shape):
            raise ValueError(
                f"{tensor} has shape {list(sample.shape)} in the adapter in {folder} and "
                f"{list(stored[tensor].shape)} in {model}: the adapter was made for {another}."
            )
    if allow_other_base:
        return
    other = {}
    for tensor, sample in record.tensors.items():
        if tensor in stored and len(sample.shape) > 1 and (digest := _digest(stored[tensor], sample)) is not None:
            if digest == sample.digests[sample.dtype]:
                return
            other[tensor] = OTHER_WEIGHTS
    if other:
        raise other_base(what_differs(other), adapter.recorded_base, {"name": model}, way_out)


def _sizes(shape: Sequence[int]) -> list[int]:
    return sorted(size for size in shape if size > 1)


def _digest(stored: StoredTensor, sample: Sampled) -> str | None:
    """Of the entries that `sample` is of; None where the tensor is stored in another dtype or shape."""
    if stored.shape != sample.shape or DTYPES.get(stored.dtype) != sample.dtype or not stored.entries:
        return None
    width = FLOATS[stored.dtype][0]
    every = np.memmap(stored.path, width, "r", stored.start, (stored.entries,))
    return hashlib.sha256(every[positions(stored.entries)].tobytes()).hexdigest()[:16]


def check_data(source: str, columns: Sequence[str] = ()) -> None:
    """Raise ValueError for a file that is not there, is broken or empty, or lacks a column."""
    check_named(source)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix != ".parquet" and path.stat().st_size <= LOOKED_AT:
        read_rows(path, columns)


def check_mask(file: str) -> None:
    """Raise ValueError for a file that holds no masks, or none with a True entry."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"--mask {file}: no such file; `onelayer analyze BASE OTHER --mask-out` writes one.")
    masks = read_header(path)
    if strange := [name for name, tensor in masks.items() if tensor.dtype != "BOOL"]:
        raise ValueError(
            f"--mask {file} holds {strange[0]}, which is not boolean; `onelayer analyze --mask-out` writes one."
        )
    stored = np.memmap(path, bool, "r")
    if not any(stored[mask.start : mask.end].any() for mask in masks.values()):
        raise ValueError(f"--mask {file} has no True entry: nothing would train.")
