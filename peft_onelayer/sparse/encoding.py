"""A sparse adapter: what adapter_config.json records of it, and its tensors encoded against a base and restored on one.

The checks that refuse a wrong base or a damaged tensor are here; tensor.py has one tensor's form. What is recorded is
read and checked without importing torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_onelayer.records.text import printable

from .base import OtherBaseError, other_base
from .digest import config_digest, dtype_name, tensor_digest
from .names import base_name, split_key

if TYPE_CHECKING:
    import torch

FORMAT = "onelayer-sparse-1"
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class TensorRecord:
    """What is recorded of one trained tensor.

    Attributes:
        dtype: of the base's tensor when the adapter was trained on it, one of `DTYPES`; the encoded values have it too.
        shape: of both.
        changed: number of entries that differ bit by bit.
        base: `tensor_digest` of the base's tensor.
        result: `tensor_digest` of the trained tensor, rounded to `dtype`.
    """

    dtype: str
    shape: tuple[int, ...]
    changed: int
    base: str
    result: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class SparseEncoding:
    """The field `encoding` of adapter_config.json.

    Attributes:
        base: what is known of the base: "name", "revision", "config" (`config_digest`), "num_layers".
        tensors: a record of each trained tensor, by its name in the base model.
    """

    base: dict[str, Any]
    tensors: dict[str, TensorRecord]

    @classmethod
    def from_json(cls, fields: Any) -> SparseEncoding:
        """Check and take the field `encoding` of adapter_config.json.

        Raises:
            ValueError: another format, or fields that are missing or no such thing.
        """
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            found = fields.get("format") if isinstance(fields, dict) else fields
            raise ValueError(
                f"the adapter's encoding is {printable(found, 40)!r} and this version reads {FORMAT!r}: "
                "update peft-onelayer, or ask for the dense adapter."
            )
        base, tensors = fields.get("base"), fields.get("tensors")
        if not isinstance(base, dict) or not isinstance(tensors, dict) or not tensors:
            raise ValueError("the adapter's encoding lacks its base or its tensors.")
        return cls(base, {name: _record(name, entry) for name, entry in tensors.items()})

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "base": self.base,
            "tensors": {name: record.to_json() for name, record in self.tensors.items()},
        }

    def group(self, keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
        """Sort an adapter file's keys: by trained tensor and suffix (as `decode_tensor` takes them), and the others.

        Raises:
            ValueError: a recorded tensor or its values are missing, or one is there twice.
        """
        groups: dict[str, dict[str, str]] = {name: {} for name in self.tensors}
        others = []
        for key in keys:
            stem, suffix = split_key(key)
            group = groups.get(base_name(stem)) if suffix else None
            if group is None:
                others.append(key)
            elif suffix in group:
                raise ValueError(f"the adapter holds {printable(base_name(key))} twice.")
            else:
                group[suffix] = key
        if missing := [name for name, group in groups.items() if not group]:
            raise ValueError(
                f"the adapter lacks {len(missing)} tensor(s), for example {printable(min(missing))}: it is incomplete."
            )
        if partial := [name for name, group in groups.items() if "values" not in group]:
            raise ValueError(f"the adapter lacks the values of {printable(min(partial))}: it is damaged.")
        return groups, others

    def decode(
        self,
        state: Mapping[str, torch.Tensor],
        shapes: Mapping[str, Iterable[int]],
        base_tensor: Callable[[str], AbstractContextManager[torch.Tensor]],
        allow_other_base: bool = False,
        found: Mapping[str, Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Exchange an adapter file's encoded tensors for dense ones in the recorded dtypes; others stay as they are.

        Args:
            state: the file's tensors by their keys.
            shapes: of the block's tensors in the model at hand, by their names in the base model.
            base_tensor: gives one of them as long as its context lasts.
            allow_other_base: as `restore` takes it.
            found: as `restore` takes it.

        Raises:
            ValueError: another base, or a damaged adapter; `restore` lists the checks of a tensor.
        """
        if different := shapes.keys() ^ self.tensors.keys():
            raise ValueError(
                f"the adapter's encoding and the model's block differ in {len(different)} tensor(s), for example "
                f"{printable(min(different))}: it was made for another base model or is damaged."
            )
        groups, others = self.group(state)
        for name, shape in shapes.items():  # before any digest: the plainest difference is named first
            self.check_shape(name, shape, found)
        decoded = {key: state[key] for key in others}
        for name, group in groups.items():
            parts = {suffix: state[key] for suffix, key in group.items()}
            with base_tensor(name) as base:
                value = self.restore(name, parts, base, allow_other_base, found)
            decoded[group["values"].removesuffix(".values")] = value
        return decoded

    def restore(
        self,
        name: str,
        parts: Mapping[str, torch.Tensor],
        base: torch.Tensor,
        allow_other_base: bool = False,
        found: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Decode a trained tensor, in the recorded dtype, and check that it is the one that was encoded.

        Args:
            name: one of `tensors`.
            parts: what the file holds of it, by suffix.
            base: the base's tensor.
            allow_other_base: apply the change to whatever `base` is, rounded to the recorded dtype, if it has the
                shape. What it gives is checked only where `base` turns out to be the recorded one.
            found: what is known of the base at hand, as `describe_base` says it, for the message.

        Raises:
            ValueError: another base, or a damaged adapter.
        """
        import torch

        from .tensor import count_changed, decode_tensor

        record = self.tensors[name]
        self.check_shape(name, base.shape, found)
        here, there = dtype_name(base), record.dtype
        if here != there and not allow_other_base:
            quantized = "" if base.is_floating_point() else " (quantized)"
            raise self.other_base(
                f"its {name} is {here}{quantized} and was {there} in training; load it with dtype={there!r}", found
            )
        base = base.detach().cpu().to(getattr(torch, record.dtype))
        known = tensor_digest(base) == record.base
        if not known and not allow_other_base:
            raise self.other_base(f"its {name} holds other weights", found)
        value = decode_tensor(name, parts, base)
        if known and (tensor_digest(value) != record.result or count_changed(value, base) != record.changed):
            raise ValueError(f"the adapter's {name} is damaged: it does not decode to the tensor that was published.")
        return value

    def check_shape(self, name: str, shape: Iterable[int], found: Mapping[str, Any] | None = None) -> None:
        """Raise ValueError if the base's tensor is not of the recorded shape; no option allows that."""
        here, there = list(shape), list(self.tensors[name].shape)
        if here != there:
            raise self.other_base(f"its {name} has shape {here}, not {there}", found, way_out=False)

    def other_config(self, found: Mapping[str, Any]) -> str | None:
        """What to warn of if the configuration of the base at hand is not the recorded one.

        No error: a longer context or added tokens are set on the right base too, and versions of transformers differ
        in how they write the same configuration.
        """
        there, here = self.base.get("config"), found.get("config")
        if not there or not here or there == here:
            return None
        return (
            "the base's trained tensors are those that the adapter was trained on, but its configuration is another "
            f"({printable(there, 12)} there and {printable(here, 12)} here): its output may differ from the published."
        )

    def other_base(self, problem: str, found: Mapping[str, Any] | None = None, way_out: bool = True) -> OtherBaseError:
        """The error for a base that is not the one the adapter was trained on; names all that is known to differ."""
        return other_base(problem, self.base, found, way_out)


def describe_base(config: Any, name: str | None, revision: str | None, num_layers: int) -> dict[str, Any]:
    """What is recorded of a base; `config` is its transformers configuration, or None for a plain module."""
    digest = None if config is None else config_digest(config)
    return {"name": name, "revision": revision, "config": digest, "num_layers": num_layers}


def encode(
    tensors: Iterable[tuple[str, torch.Tensor, torch.Tensor]], base: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], SparseEncoding]:
    """Encode trained tensors as what differs from the base's.

    Args:
        tensors: of each the key that it has in a dense adapter's file, its effective value, and the base's tensor, both
            of one shape and dtype, one of `DTYPES`.
        base: what is to be recorded of the base, as `describe_base` says it.

    Returns:
        The tensors to store, by their keys, and what adapter_config.json has to record of them.

    Raises:
        ValueError: another shape or dtype.
    """
    from .tensor import count_changed, encode_tensor

    state: dict[str, torch.Tensor] = {}
    records = {}
    for key, value, original in tensors:
        state |= encode_tensor(key, value, original)
        changed, digests = count_changed(value, original), (tensor_digest(original), tensor_digest(value))
        records[base_name(key)] = TensorRecord(dtype_name(original), tuple(original.shape), changed, *digests)
    return state, SparseEncoding(base, records)


def _record(name: str, entry: Any) -> TensorRecord:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, changed = fields.get("dtype"), fields.get("shape"), fields.get("changed")
    base, result = fields.get("base"), fields.get("result")
    if (
        not isinstance(dtype, str)
        or dtype not in DTYPES
        or not isinstance(shape, list)
        or len(shape) > 8
        or any(type(size) is not int or not 0 <= size < 2**40 for size in shape)
        or type(changed) is not int
        or not 0 <= changed <= math.prod(shape)
        or not isinstance(base, str)
        or not isinstance(result, str)
        or not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (base, result))
    ):
        raise ValueError(
            f"the adapter's encoding says no dtype, shape, count of changes and digests of {printable(name)!r}."
        )
    return TensorRecord(dtype, tuple(shape), changed, base, result)
