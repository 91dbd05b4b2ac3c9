"""Opens an adapter folder that may come from a stranger, and gives its tensors one at a time.

Only `adapter_config.json` and `adapter_model.safetensors` are read, as plain files of that folder; nothing is
unpickled. It knows nothing of models: the base's tensors are handed in by the caller.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from peft_onelayer.records.text import printable
from peft_onelayer.sparse.encoding import SparseEncoding, base_name
from peft_onelayer.sparse.tensor import split_key

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED = ".single_layer_params."  # in the key of every trained tensor; what lacks it was saved by `modules_to_save`
CONFIG_LIMIT = 16 * 2**20  # bytes of adapter_config.json; a real one has a few hundred for each tensor


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter folder.

    Attributes:
        folder: where it lies.
        config: the fields of adapter_config.json.
        layers: the indices of the trained blocks, ascending.
        names: the stored tensors by their names in the base model ("model.layers.5.mlp.down_proj.weight"), sorted.
        keys: for each of them the keys in the file, by the suffix of a part of the encoding; {"": key} for a plain one.
        sparse: what adapter_config.json records of a sparse adapter; None for a dense one.
    """

    folder: Path
    config: dict[str, Any]
    layers: list[int]
    names: list[str]
    keys: dict[str, dict[str, str]]
    sparse: SparseEncoding | None

    @property
    def encoding(self) -> str:
        """ "dense" or "sparse"."""
        return "dense" if self.sparse is None else "sparse"

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """What the file holds of the tensor `name`, by suffix, as `decode_tensor` takes it.

        Raises:
            ValueError: the file has been damaged since it was opened.
        """
        with _reading(self.folder / WEIGHTS) as file:
            return {suffix: file.get_tensor(key) for suffix, key in self.keys[name].items()}

    def tensor(self, name: str, base: torch.Tensor | None = None, allow_other_base: bool = False) -> torch.Tensor:
        """The effective value of a tensor: what the forward pass uses, in the dtype of `base`.

        Args:
            name: one of `names`.
            base: the base model's tensor, in the dtype it has in training. Without it a dense adapter gives the masters
                as they are stored; a sparse one cannot do without.
            allow_other_base: accept a base of the same shapes that a sparse adapter was not trained on.

        Raises:
            ValueError: damaged, another base, NaN or Inf.
        """
        parts = self.parts(name)
        if self.sparse is not None and name in self.sparse.tensors:
            if base is None:
                raise ValueError(f"{name} is stored as a change of the base: its values need the base model.")
            return self.sparse.restore(name, parts, base, allow_other_base).to(base.dtype)
        value = parts[""]
        if base is not None:
            if value.shape != base.shape:
                raise ValueError(
                    f"{name} has shape {list(value.shape)} in the adapter and {list(base.shape)} in the base: "
                    "the adapter was made for another base model."
                )
            value = value.to(base.dtype)
        if not _is_finite(value):
            raise ValueError(f"the adapter's {name} holds NaN or Inf.")
        return value


def open_adapter(folder: Path | str) -> AdapterFile:
    """Open the adapter in `folder`; no tensor is read yet.

    Raises:
        ValueError: no adapter of this method, a damaged file, or one that is a link to outside the folder.
    """
    folder = Path(folder)
    config = read_config(folder)
    with _reading(folder / WEIGHTS) as file:
        others = list(file.keys())
    keys: dict[str, dict[str, str]] = {}
    sparse = None
    if config.get("encoding") is not None:
        sparse = SparseEncoding.from_json(config["encoding"])
        keys, others = sparse.group(others)
    for key in others:
        if base_name(key) in keys:
            raise ValueError(f"{folder / WEIGHTS} holds {printable(base_name(key))} twice.")
        stem, part = split_key(key)
        if TRAINED in stem and (part or sparse is not None):
            raise ValueError(f"{folder / WEIGHTS} holds {printable(base_name(key))}, which {CONFIG} does not record.")
        keys[base_name(key)] = {"": key}
    if not keys:
        raise ValueError(f"{folder / WEIGHTS} holds no tensors.")
    layers = sorted(config["layer_indices"])
    numbers = {str(layer) for layer in layers}
    for name, group in keys.items():
        if not name.isprintable():
            raise ValueError(
                f"{folder / WEIGHTS} holds a tensor with control characters in its name: {printable(name)}."
            )
        if any(TRAINED in key for key in group.values()) and numbers.isdisjoint(name.split(".")):
            raise ValueError(
                f"{folder} holds {printable(name)}, which is in none of its layers {printable(str(layers))}."
            )
    return AdapterFile(folder, config, layers, sorted(keys), keys, sparse)


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json.

    Raises:
        ValueError: not there, not a JSON object, or not of this method.
    """
    path = folder / CONFIG
    check_plain_file(path)
    if path.stat().st_size > CONFIG_LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a configuration has less than {CONFIG_LIMIT}.")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {_one_line(error)}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "SINGLE_LAYER":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{path} describes no single-layer adapter: its peft_type is {printable(kind, 40)!r}.")
    layers, depth = config.get("layer_indices"), config.get("num_layers")
    if type(depth) is not int or depth >= 2**31 or not isinstance(layers, list) or not layers:
        raise ValueError(f"{path} lacks layer_indices or num_layers; it was not saved from a trained model.")
    if any(type(index) is not int or not 0 <= index < depth for index in layers) or len(set(layers)) < len(layers):
        raise ValueError(f"{path} has layer_indices that are not distinct numbers from 0 to {depth - 1}.")
    return config


def check_plain_file(path: Path) -> None:
    """Raise ValueError unless `path` is a regular file that lies in its own folder.

    A link is followed within the folder, and where the Hub's cache puts one: from snapshots/COMMIT/ to blobs/.
    """
    folder = path.parent.resolve()
    inside = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    try:
        target = path.resolve(strict=True)
        regular = stat.S_ISREG(target.stat().st_mode)
    except (OSError, RuntimeError) as error:
        reason = _one_line(error)
        raise ValueError(f"{path.parent} holds no readable {path.name}, so it is no adapter: {reason}") from None
    if not regular or target.parent not in inside:
        raise ValueError(f"{path} is not a plain file of its folder; links and devices are not followed.")


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The open safetensors file; whatever is wrong with it is a ValueError in one line."""
    check_plain_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {_one_line(error)}") from None


def _is_finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return bool(torch.isfinite(value).all())
    low, high = value.aminmax()  # NaN passes through; one pass, where `isfinite` takes several and as much memory
    return math.isfinite(low) and math.isfinite(high)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
