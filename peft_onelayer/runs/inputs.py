"""What can be told of the files that a command is given before torch, transformers and TRL are imported: a model's
configuration, an adapter, a data set, a mask. What is on the Hub is looked at later.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peft_onelayer.adapter.stored import read_header
from peft_onelayer.layers import Layers, parse_layers, resolve_layers
from peft_onelayer.records.files import WEIGHTS, read_fields
from peft_onelayer.records.locate import adapter_folder, check_adapter_folder, is_local
from peft_onelayer.tasks.files import check_named, read_rows

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # as configurations call the number of blocks
LOOKED_AT = 2**26  # bytes of a data set that is read twice: here, and when it is needed


def check_blocks(model: str, layer: Layers) -> list[int] | None:
    """The blocks that a layer specification names, by config.json of a model's folder; None where it does not say.

    Raises:
        ValueError: by `resolve_layers`.
    """
    file = Path(model).expanduser() / "config.json"
    if not is_local(model) or not file.is_file():
        return None
    try:
        config = read_fields(file)
    except ValueError:  # said where the model is loaded
        return None
    if config.get("is_encoder_decoder") or "auto_map" in config:  # several stacks, or code that decides
        return None
    text = config.get("text_config")
    fields = text if isinstance(text, dict) else config
    depth = next((fields[name] for name in DEPTHS if type(fields.get(name)) is int), None)
    kinds = fields.get("layer_types")
    if depth is None or any(isinstance(part, tuple) and part[0] == "kind" for part in parse_layers(layer)):
        return None
    return resolve_layers(layer, depth, kinds if isinstance(kinds, list) else None)


def check_weights(model: str) -> None:
    """Raise ValueError for a model's folder without weights."""
    folder = Path(model).expanduser()
    if is_local(model) and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ValueError(f"{folder} holds no weights; expected *.safetensors beside its config.json.")


def check_adapter(name: str) -> None:
    """Raise ValueError for the name of a folder that is not there, or holds no adapter or a truncated one."""
    if is_local(name) or "/" not in name:
        folder = adapter_folder(name)
        check_adapter_folder(folder, name)
        read_header(folder / WEIGHTS)


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
