"""Reads a base model's checkpoint folder: which tensor lies where in which safetensors file, and one tensor at a time.

Knows how transformers renames tensors when it loads them, and nothing of adapters. It writes nothing.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from peft_onelayer.records.locate import OTHER_FORMATS

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: the bytes [start, end) of `file`, in the dtype that safetensors calls `dtype`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """A checkpoint folder of transformers, whole or in shards; opening it reads the files' headers alone.

    Args:
        folder: the folder with config.json and the safetensors files.

    Attributes:
        config: the fields of config.json.
        shards: the names of the files with the model's tensors, sorted.
        places: where each tensor lies, by its name in the files.

    Raises:
        ValueError: not a model's folder, quantized, without safetensors, incomplete or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / "adapter_config.json").exists():
            raise ValueError(f"{folder} is an adapter and not a base model.")
        self.config = self._json("config.json")
        if "quantization_config" in self.config:
            raise ValueError(
                f"the model in {folder} is quantized, and merging would round the trained weights to its grid; "
                "give the checkpoint in bfloat16, float16 or float32 that it was made from."
            )
        index = None if (folder / SAFE_WEIGHTS_NAME).exists() else folder / SAFE_WEIGHTS_INDEX_NAME
        if index is not None and not index.exists():
            pickles = [path.name for path in folder.glob("*.bin")]
            raise ValueError(
                f"{folder} holds neither {SAFE_WEIGHTS_NAME} nor {index.name}"
                f"{', but pickled weights, which are not opened here' if pickles else ''}; load the model with "
                "transformers and save_pretrained it to have its weights as safetensors."
            )
        weight_map = {} if index is None else self._json(index.name).get("weight_map")
        if not isinstance(weight_map, dict) or any(
            not isinstance(file, str) or Path(file).name != file for file in weight_map.values()
        ):
            raise ValueError(f"{folder / SAFE_WEIGHTS_INDEX_NAME} has no weight_map from tensors to files beside it.")
        self.shards = [SAFE_WEIGHTS_NAME] if index is None else sorted(set(weight_map.values()))
        self.places: dict[str, Place] = {}
        for shard in self.shards:
            for name, place in self._header(shard).items():
                if index is None or weight_map.get(name) == shard:
                    self.places[name] = place
        if missing := sorted(weight_map.keys() - self.places.keys()):
            raise ValueError(
                f"{folder} is incomplete: {weight_map[missing[0]]} lacks {missing[0]}, which the index puts there."
            )

    def other_files(self) -> tuple[list[str], list[str]]:
        """The paths of the folder's files that hold no tensor of the model, and of those that are left out of a copy
        with changed weights: the unchanged weights in another format. Relative, sorted."""
        keep: list[str] = []
        leave: list[str] = []
        index = [] if self.shards == [SAFE_WEIGHTS_NAME] else [SAFE_WEIGHTS_INDEX_NAME]
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() or name.startswith((".git/", ".cache/")) or name in self.shards:
                continue
            weights = "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
            stale = name not in index if weights else any(fnmatch(name, pattern) for pattern in OTHER_FORMATS)
            (leave if stale else keep).append(name)
        return keep, leave

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` (its name in the files), in its dtype there.

        Raises:
            ValueError: not of floating point: quantized or packed.
        """
        place = self.places[name]
        if place.dtype not in DTYPES:
            raise ValueError(f"{name} is stored as {place.dtype} in {self.folder}, which is no floating-point weight.")
        with (self.folder / place.file).open("rb") as file:
            file.seek(place.start)
            data = bytearray(place.end - place.start)
            if file.readinto(data) != len(data):
                raise ValueError(f"{self.folder / place.file} is truncated.")
        dtype = DTYPES[place.dtype]
        return (
            torch.frombuffer(data, dtype=dtype).reshape(place.shape) if data else torch.empty(place.shape, dtype=dtype)
        )

    @functools.cached_property
    def model(self) -> nn.Module | None:
        """The model without weights (on the meta device), or None if it is not one of transformers' own classes."""
        if self.config.get("model_type") not in transformers.CONFIG_MAPPING:
            return None
        architecture = (self.config.get("architectures") or [""])[0]
        model_class: Any = getattr(transformers, architecture, None)
        if model_class is None:
            return None
        try:
            with torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops():
                return model_class(transformers.AutoConfig.from_pretrained(self.folder))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.folder / 'config.json'} describes no {architecture}: {error}") from error

    @functools.cached_property
    def stored_as(self) -> dict[str, str]:
        """Name in the files, by name in the loaded model; without the tensors that transformers makes from several
        stored ones or by rearranging one (fused experts, transposed weights)."""
        if self.model is None:
            return {name: name for name in self.places}
        state: dict[str, Any] = self.model.state_dict()
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        prefix: str = self.model.base_model_prefix  # type: ignore[assignment]
        names = {}
        for name in self.places:  # as transformers' convert_and_load_state_dict_in_model does
            renamed, converted = rename_source_key(name, renamings, converters, prefix, state)
            if renamed not in state and name in state:
                renamed, converted = name, None
            if converted is None and renamed in state:
                names[renamed] = name
        return names

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            data = json.loads(path.read_bytes())
        except OSError:
            raise ValueError(f"{self.folder} holds no readable {name}, so it is not a model's folder.") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"{path} holds no fields.")
        return data

    def _header(self, shard: str) -> dict[str, Place]:
        path = self.folder / shard
        if not path.is_file():
            raise ValueError(f"{self.folder} is incomplete: {shard} is not there.")
        try:
            with safe_open(path, framework="pt"):  # checks the header and that the file is as long as it says
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or incomplete: {error}") from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: Place(shard, entry["dtype"], tuple(entry["shape"]), *(8 + length + o for o in entry["data_offsets"]))
            for name, entry in header.items()
        }
