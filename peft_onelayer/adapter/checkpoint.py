"""Reads a base model's checkpoint folder: which tensor lies where in which safetensors file, and one tensor at a time.

Names are also given as transformers changes them when it loads the model. Opening a folder imports neither torch nor
transformers, so that a damaged one is refused at once.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE

from peft_onelayer.records.files import CONFIG, read_fields
from peft_onelayer.records.locate import OTHER_FORMATS
from peft_onelayer.records.text import one_line
from peft_onelayer.seams import check
from peft_onelayer.sparse.base import BaseRecord, Comparison, Entries, compare, positions

from .stored import DTYPES, StoredTensor, read_header

if TYPE_CHECKING:
    import torch
    from torch import nn

MODEL_CONFIG = "config.json"


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
        if (folder / CONFIG).exists():
            raise ValueError(f"{folder} is an adapter and not a base model.")
        self.config = self._fields(MODEL_CONFIG)
        if "quantization_config" in self.config:
            raise ValueError(
                f"the model in {folder} is quantized, and merging would round the trained weights to its grid; "
                "give the checkpoint in bfloat16, float16 or float32 that it was made from."
            )
        index = None if (folder / SAFETENSORS_SINGLE_FILE).exists() else folder / SAFETENSORS_INDEX_FILE
        if index is not None and not index.exists():
            pickles = [path.name for path in folder.glob("*.bin")]
            raise ValueError(
                f"{folder} holds neither {SAFETENSORS_SINGLE_FILE} nor {index.name}"
                f"{', but pickled weights, which are not opened here' if pickles else ''}; load the model with "
                "transformers and save_pretrained it to have its weights as safetensors."
            )
        weight_map = {} if index is None else self._fields(index.name).get("weight_map")
        if not isinstance(weight_map, dict) or any(
            not isinstance(file, str) or Path(file).name != file for file in weight_map.values()
        ):
            raise ValueError(f"{folder / SAFETENSORS_INDEX_FILE} has no weight_map from tensors to files beside it.")
        self.shards = [SAFETENSORS_SINGLE_FILE] if index is None else sorted(set(weight_map.values()))
        self.places: dict[str, StoredTensor] = {}
        for shard in self.shards:
            if not (folder / shard).is_file():
                raise ValueError(f"{folder} is incomplete: {shard} is not there.")
            for name, place in read_header(folder / shard).items():
                if index is None or weight_map.get(name) == shard:
                    self.places[name] = place
        if missing := sorted(weight_map.keys() - self.places.keys()):
            raise ValueError(
                f"{folder} is incomplete: {weight_map[missing[0]]} lacks {missing[0]}, which the index puts there."
            )

    def other_files(self) -> tuple[list[str], list[str]]:
        """The paths of the folder's files that hold no tensor of the model, and of those that are left out of a copy
        with changed weights: the unchanged weights in another format. Relative, sorted; neither has what was
        measured of the unchanged model (.eval_results)."""
        keep: list[str] = []
        leave: list[str] = []
        index = [] if self.shards == [SAFETENSORS_SINGLE_FILE] else [SAFETENSORS_INDEX_FILE]
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() or name.startswith((".git/", ".cache/", ".eval_results/")) or name in self.shards:
                continue
            weights = "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
            stale = name not in index if weights else any(fnmatch(name, pattern) for pattern in OTHER_FORMATS)
            (leave if stale else keep).append(name)
        return keep, leave

    def dtype(self, name: str) -> str:
        """The dtype, as torch calls it, in which the tensor `name` of the loaded model is stored."""
        return DTYPES[self.places[self.stored_as[name]].dtype]

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` (its name in the files), in its dtype there.

        Raises:
            ValueError: not of floating point: quantized or packed.
        """
        place = self.places[name]
        if not place.is_floating_point:
            raise ValueError(f"{name} is stored as {place.dtype} in {self.folder}, which is no floating-point weight.")
        with place.path.open("rb") as file:
            return place.read(file)

    @functools.cached_property
    def entries(self) -> dict[str, Entries]:
        """The sampled entries of the floating-point tensors, by their names in the loaded model; of tied ones under
        each of their names."""
        found = {
            name: Entries(place.entries_at(positions(place.entries)), place.shape)
            for name, place in ((name, self.places[stored]) for name, stored in self.stored_as.items())
            if place.is_floating_point
        }
        if self.model is not None:
            tied: dict[str, str] = self.model.all_tied_weights_keys  # type: ignore[assignment]
            found |= {name: found[source] for name, source in tied.items() if source in found and name not in found}
        return found

    def record(self, trained: Mapping[str, str], modules_to_save: Collection[str] = ()) -> BaseRecord:
        """What an adapter records of this base.

        Args:
            trained: the dtypes that its tensors are loaded in, as torch calls them, by their names.
            modules_to_save: as the adapter's configuration has them.
        """
        import torch

        parts = [f".{module}." for module in modules_to_save]
        known = {
            name: entries.sampled
            for name, entries in self.entries.items()
            if not any(part in f".{name}" for part in parts)
        }
        block = {
            name: Entries(self.entries[name].values.to(getattr(torch, dtype)), self.entries[name].shape).sampled
            for name, dtype in trained.items()
        }
        rest = {name: sample for name, sample in known.items() if name not in block}
        return BaseRecord(block, rest)

    def compare(self, record: BaseRecord, changed: Mapping[str, Entries] | None = None) -> Comparison:
        """Compare the checkpoint with what is recorded of a base; `changed` has the entries of tensors that adapters
        have changed before."""
        from peft_onelayer.tuner.base import embedding_names

        model = self.model
        unavailable: dict[str, str] = {}
        embeddings: set[str] = set()
        if model is not None:
            embeddings = embedding_names(model)
            names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
            converted = "stored in a form that transformers converts"
            unavailable = {name: converted for name in record.tensors if name in names}
        found = self.entries | dict(changed or {})
        unavailable = {name: why for name, why in unavailable.items() if name not in found}
        comparison = compare(record.tensors, found, unavailable, embeddings)
        new = "not in the base of the training"  # what a checkpoint holds beside: heads that were not loaded, buffers
        return Comparison(comparison.other, {name: why for name, why in comparison.unchecked.items() if why != new})

    @functools.cached_property
    def model(self) -> nn.Module | None:
        """The model without weights (on the meta device), or None if it is not one of transformers' own classes."""
        check(__name__)
        import torch
        import transformers
        from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

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
            raise ValueError(f"{self.folder / MODEL_CONFIG} describes no {architecture}: {one_line(error)}") from error

    @functools.cached_property
    def stored_as(self) -> dict[str, str]:
        """Name in the files, by name in the loaded model; without the tensors that transformers makes from several
        stored ones or by rearranging one (fused experts, transposed weights)."""
        check(__name__)
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

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

    def _fields(self, name: str) -> dict[str, Any]:
        if not (self.folder / name).is_file():
            raise ValueError(f"{self.folder} holds no readable {name}, so it is not a model's folder.")
        return read_fields(self.folder / name)
