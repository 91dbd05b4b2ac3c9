"""Opens an adapter folder that may come from a stranger, and gives its tensors one at a time.

Only `adapter_config.json` and `adapter_model.safetensors` are read, as plain files of that folder; nothing is
unpickled. Opening imports no torch; the base's tensors are handed in by the caller.
"""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_onelayer.records.adapter_config import check_adapter_config
from peft_onelayer.records.files import CONFIG, WEIGHTS, read_fields
from peft_onelayer.records.locate import base_folder, check_base_of
from peft_onelayer.records.text import one_line, printable
from peft_onelayer.sparse.base import QUANTIZED, BaseRecord
from peft_onelayer.sparse.encoding import SparseEncoding, TensorRecord
from peft_onelayer.sparse.names import MASK, TRAINED, base_name, split_key

from .stored import DTYPES, StoredTensor, read_header

if TYPE_CHECKING:
    import torch

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
        stored: where each of these keys' tensors lies in the file.
        sparse: what adapter_config.json records of a sparse adapter; None for a dense one.
        trained_on: what it records of the base; None for an adapter of before this was recorded.
    """

    folder: Path
    config: dict[str, Any]
    layers: list[int]
    names: list[str]
    keys: dict[str, dict[str, str]]
    stored: dict[str, StoredTensor]
    sparse: SparseEncoding | None
    trained_on: BaseRecord | None

    @property
    def masks(self) -> dict[str, str]:
        """Of a dense adapter that was trained under a mask: the keys of the masks' bits, by the key of their tensor."""
        found = {key: f"{key}{MASK}" for group in self.keys.values() for key in group.values()}
        return {key: mask for key, mask in found.items() if mask in self.stored and _is_mask(mask, self.stored)}

    @property
    def encoding(self) -> str:
        """ "dense" or "sparse"."""
        return "dense" if self.sparse is None else "sparse"

    def base_folder(self, base: str | Path | None, instead: str, revision: str | None = None) -> Path:
        """The folder of `base`, by default of the base that the adapter names.

        Args:
            instead: what to type where that was a folder that is not here, with {base} in the place of the base.
            revision: by default the one that the adapter names, for the base that it names.

        Raises:
            ValueError: neither a folder here nor found on the Hub.
        """
        recorded = self.config.get("base_model_name_or_path")
        chosen = str(base or recorded or "")
        if not chosen:
            raise ValueError(f"{self.folder} does not name its base model; give it with --base.")
        if base is None:
            check_base_of(self.folder, instead)
        return base_folder(chosen, revision or (self.config.get("revision") if chosen == recorded else None))

    @property
    def recorded_base(self) -> dict[str, Any]:
        """The name and the revision of the base that the adapter was trained on, as `other_base` takes them."""
        return {"name": self.config.get("base_model_name_or_path"), "revision": self.config.get("revision")}

    @property
    def quantized(self) -> list[str]:
        """The trained tensors that were quantized in the base when the adapter was trained, sorted."""
        block = {} if self.trained_on is None else self.trained_on.block
        return sorted(name for name, sample in block.items() if sample.dtype == QUANTIZED)

    def base_dtype(self, name: str) -> str | None:
        """The dtype, as torch calls it, that the base's tensor `name` was loaded in for training; None where that is
        not recorded, and for a quantized one."""
        if self.sparse is not None and name in self.sparse.tensors:
            return self.sparse.tensors[name].dtype
        sample = None if self.trained_on is None else self.trained_on.block.get(name)
        return None if sample is None or sample.dtype == QUANTIZED else sample.dtype

    def is_trained(self, name: str) -> bool:
        """Whether a tensor is one of the block's; the others were saved by `modules_to_save`."""
        return all(TRAINED in key for key in self.keys[name].values())

    def stored_parts(self, name: str) -> dict[str, StoredTensor]:
        """Where the parts of the tensor `name` lie, by suffix."""
        return {suffix: self.stored[key] for suffix, key in self.keys[name].items()}

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """What the file holds of the tensor `name`, by suffix, as `decode_tensor` takes it.

        Raises:
            ValueError: the file has been damaged since it was opened.
        """
        path = self.folder / WEIGHTS
        check_plain_file(path)
        try:
            with path.open("rb") as file:
                return {suffix: self.stored[key].read(file) for suffix, key in self.keys[name].items()}
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} has been damaged since it was opened: {one_line(error)}") from None

    def masters(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Of a dense adapter, the entries [start, stop) of a tensor as they are stored, (stop - start,).

        Raises:
            ValueError: damaged, NaN or Inf.
        """
        path = self.folder / WEIGHTS
        check_plain_file(path)
        try:
            value = self.stored_parts(name)[""].read_entries(start, stop)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} has been damaged since it was opened: {one_line(error)}") from None
        if not _is_finite(value):
            raise ValueError(f"the adapter's {name} holds NaN or Inf.")
        return value

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
    check_plain_file(folder / WEIGHTS)
    stored = read_header(folder / WEIGHTS)
    masks = {key for key in stored if _is_mask(key, stored)}
    for key in masks:
        entries = stored[key.removesuffix(MASK)].entries
        if config.get("mask") is None or stored[key].shape != (-(-entries // 8),):
            raise ValueError(f"{folder / WEIGHTS} holds {printable(key)}, which is no mask that {CONFIG} records.")
    others = [key for key in stored if key not in masks]
    if strange := sorted(key for key in others if stored[key].dtype not in DTYPES):
        raise ValueError(
            f"{folder / WEIGHTS} holds {printable(strange[0])} as {stored[strange[0]].dtype}, which no adapter has."
        )
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
    trained_on = None if config.get("trained_on") is None else BaseRecord.from_json(config["trained_on"])
    layers = sorted(config["layer_indices"])
    numbers = {str(layer) for layer in layers}
    for name, group in keys.items():
        if not name.isprintable():
            raise ValueError(
                f"{folder / WEIGHTS} holds a tensor with control characters in its name: {printable(name)}."
            )
        if any(TRAINED in key for key in group.values()) and numbers.isdisjoint(name.split(".")):
            raise ValueError(
                f"{folder} holds {printable(name)}, which is in none of its blocks {printable(str(layers))}."
            )
    file = AdapterFile(folder, config, layers, sorted(keys), keys, stored, sparse, trained_on)
    _check_contents(file)
    return file


def _is_mask(key: str, stored: dict[str, StoredTensor]) -> bool:
    return key.endswith(MASK) and key.removesuffix(MASK) in stored and stored[key].dtype == "U8"


def _check_contents(file: AdapterFile) -> None:
    """Raise ValueError unless the file holds what the configuration says, as far as that goes without the base: the
    recorded tensors of the block in their shapes, those of `modules_to_save`, and `saved_embeddings`."""
    where = file.folder / WEIGHTS
    whole = [f".{module}." for module in file.config.get("modules_to_save") or []]
    embeddings = set(file.config.get("saved_embeddings") or [])
    trained = {name for name in file.names if file.is_trained(name)}
    for name in set(file.names) - trained - embeddings:
        if not any(part in f".{name}" for part in whole):
            raise ValueError(
                f"{where} holds {printable(name)}, which is no part of the trained block and which {CONFIG} does not "
                "name, neither in modules_to_save nor in saved_embeddings."
            )
    missing = embeddings - set(file.names)
    if file.trained_on is not None:
        missing |= file.trained_on.block.keys() - trained
        if extra := sorted(trained - file.trained_on.block.keys()):
            raise ValueError(
                f"{where} holds {printable(extra[0])}, which {CONFIG} does not record as trained; if an older version "
                "saved it from a quantized base, load it on this with PeftModel.from_pretrained and save it again."
            )
    if missing:
        raise ValueError(f"{where} lacks {printable(min(missing))}, which {CONFIG} says it holds: it is incomplete.")
    for name in trained:
        record = file.sparse.tensors[name] if file.sparse is not None else None
        if record is not None:
            _check_parts(where, name, file.stored_parts(name), record)
        values = file.stored_parts(name)["" if record is None else "values"]
        if not values.is_floating_point and "ulps" not in file.keys[name]:
            raise ValueError(f"{where} holds {printable(name)} as {values.dtype}, which is no floating-point weight.")
        shape = list(values.shape if record is None else record.shape)
        if file.trained_on is not None and shape != list(file.trained_on.block[name].shape):
            raise ValueError(
                f"{where} holds {printable(name)} in shape {shape}, and {CONFIG} records "
                f"{list(file.trained_on.block[name].shape)}."
            )


def _check_parts(where: Path, name: str, parts: dict[str, StoredTensor], record: TensorRecord) -> None:
    """Raise ValueError for parts of the sparse encoding whose headers do not fit the record of the tensor."""
    for suffix, part in parts.items():
        fits = len(part.shape) == 1 and part.entries <= max(math.prod(record.shape), 1)
        if not fits or (suffix == "values" and DTYPES[part.dtype] != record.dtype):
            raise ValueError(
                f"{where} is damaged: {printable(name)}.{suffix} is {DTYPES[part.dtype]} {list(part.shape)}, which "
                f"does not fit a base of {record.dtype} {list(record.shape)}."
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json.

    Raises:
        ValueError: not there, not a JSON object, or not of this method.
    """
    path = folder / CONFIG
    check_plain_file(path)
    if path.stat().st_size > CONFIG_LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a configuration has less than {CONFIG_LIMIT}.")
    config = read_fields(path)
    if config.get("peft_type") != "SINGLE_LAYER":
        kind = printable(config.get("peft_type"), 40)
        raise ValueError(f"{path} describes no single-layer adapter: its peft_type is {kind!r}.")
    check_adapter_config(config, str(path))
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
    except FileNotFoundError:
        what = "it is a model and no adapter" if (path.parent / "config.json").is_file() else "it is no adapter"
        raise ValueError(f"{path.parent} holds no {path.name}, so {what}.") from None
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"{path.parent} holds no readable {path.name}, so it is no adapter: {reason}.") from None
    if not regular or target.parent not in inside:
        raise ValueError(f"{path} is not a plain file of its folder; links and devices are not followed.")


def _is_finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return True
    low, high = value.aminmax()  # NaN passes through; one pass, where `isfinite` takes several and as much memory
    return math.isfinite(low) and math.isfinite(high)
