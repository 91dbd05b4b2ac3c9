"""adapter_config.json: the types and limits of its fields, whoever wrote it. Imports neither torch nor PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from .fields import read
from .text import check_limits


@dataclass(frozen=True)
class MaskRecord:
    """The entries that train under a mask.

    Attributes:
        trained: how many they are.
        entries: of the tensors that they are in.
        sha256: of the names and shapes of these tensors and the bits of their masks.
    """

    trained: int
    entries: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """An adapter that another was made of.

    Attributes:
        name: its id on the Hub, or the name of its folder.
        sha256: of its weights' file.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class CombinedRecord:
    """How an adapter was made of others.

    Attributes:
        method: of `combine_adapters`.
        parts: the adapters, in their order.
        stage_four: the tasks that the result was trained on afterwards; None for none.
    """

    method: str
    parts: list[Part]
    stage_four: str | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """The fields that mean something here; others are PEFT's and are not looked at.

    `SingleLayerConfig` says what each of them is.
    """

    peft_type: Literal["SINGLE_LAYER"] = "SINGLE_LAYER"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    peft_version: str | None = None
    auto_mapping: dict[str, Any] | None = None
    inference_mode: bool = False
    layer: int | str | list[int] | None = None
    target_modules: str | list[str] | None = None
    layers_pattern: str | None = None
    init_weights: bool = True
    master_dtype: Literal["float32", "base"] = "float32"
    modules_to_save: list[str] | None = None
    saved_embeddings: list[str] | None = None
    mask: MaskRecord | None = None
    combined: CombinedRecord | None = None
    layer_indices: list[int] | None = None
    num_layers: int | None = None
    encoding: dict[str, Any] | None = None
    trained_on: dict[str, Any] | None = None


NAMES = {field.name for field in fields(AdapterConfig)}


def check_adapter_config(config: Mapping[str, Any], where: str) -> None:
    """Raise ValueError, naming the field, for a field of another type than `AdapterConfig` says, or text that is too
    long to be what it should be; and for what is beyond the limits of `check_limits`, which PEFT has not."""
    check_limits(dict(config), where)
    read(AdapterConfig, {name: value for name, value in config.items() if name in NAMES}, where)
    for name, value in config.items():
        limit = LIMITS.get(name)
        for text in value if isinstance(value, list) else [value]:
            if limit and isinstance(text, str) and len(text) > limit:
                raise ValueError(f"{where}: {name} has {len(text):,} characters, expected at most {limit:,}")


LIMITS = dict.fromkeys(("target_modules", "layer", "layers_pattern", "modules_to_save", "saved_embeddings"), 1000)
LIMITS |= {"base_model_name_or_path": 4096, "revision": 200, "task_type": 100, "peft_version": 200}
