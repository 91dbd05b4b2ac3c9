"""One tensor in the sparse encoding of SPECIFICATION.md: what differs from the base, in its smallest form.

Pure functions on tensors in memory, vectorized with NumPy on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .digest import dtype_name
from .names import PARTS, POSITIONS

# Integers of the same width, in which a tensor's bits are compared; tensors of other dtypes stay dense.
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}  # all of it set: NaN or Inf
HEADER = 64  # bytes that one more tensor takes in a safetensors header, beside its name
PIECE = 2**16  # entries worked on at a time where several passes are made, so that they stay in the processor's cache


def encode_tensor(name: str, values: torch.Tensor, base: torch.Tensor) -> dict[str, torch.Tensor]:
    """Encode `values` as what differs from `base` bit by bit; both of one shape and dtype.

    Returns:
        The tensors to store by their keys, all 1-d: at most one of `{name}.indices`, `{name}.gaps` and
        `{name}.bitmap`, perhaps `{name}.ulps`, and always `{name}.values`.

    Raises:
        ValueError: another shape or dtype.

    >>> base = torch.zeros(1000)
    >>> new = base.clone()
    >>> new[[300, 301]] = 1.0
    >>> {key: part.tolist() for key, part in encode_tensor("w", new, base).items()}
    {'w.gaps': [255, 45, 0], 'w.values': [1.0, 1.0]}
    """
    if values.shape != base.shape or values.dtype != base.dtype:
        raise ValueError(f"{name}: {_form(values)} cannot be encoded against a base of {_form(base)}.")
    values = values.detach().cpu().contiguous()
    candidates = [{"values": values.flatten()}]
    if values.dtype in BITS:
        new, old = _bits(values), _bits(base)
        changed = new != old
        unchanged, one_more = new.size - int(np.count_nonzero(changed)), HEADER + len(name)
        positions_size = 0
        if unchanged * new.itemsize > one_more:  # else to leave them out saves less than to list the others takes
            indices = np.flatnonzero(changed)  # faster than to select by the mask, at any density
            positions = _smallest(_positions(changed, indices))
            positions_size = sum(part.nbytes for part in positions.values())
            candidates += [positions | payload for payload in _payloads(new[indices], old[indices], values.dtype)]
        if unchanged <= positions_size + one_more:  # a difference of 0 for each of the others may take less
            candidates += [payload for payload in _payloads(new, old, values.dtype) if "ulps" in payload]
    best = _smallest(candidates, len(name))
    return {f"{name}.{part}": tensor for part, tensor in best.items()}


def decode_tensor(name: str, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """Restore a tensor from its parts: a new tensor of the shape and dtype of `base`, on the CPU.

    Args:
        name: for error messages.
        parts: as stored, by their suffixes.
        base: the tensor it was encoded against.

    Raises:
        ValueError: the parts contradict each other, `base` or the specification, or hold NaN or Inf.

    >>> parts = {"indices": torch.tensor([1, 2], dtype=torch.int32), "values": torch.tensor([5.0, 6.0])}
    >>> decode_tensor("w", parts, torch.zeros(4))
    tensor([0., 5., 6., 0.])
    """
    _check_form(name, parts, base)
    if set(parts) == {"values"}:
        _check_finite(name, parts["values"])
        return parts["values"].detach().cpu().reshape(base.shape).clone()
    result = base.detach().cpu().contiguous().clone()
    out = _bits(result)
    chosen, count = _read_positions(name, parts, out.size)
    values = _bits(parts["values"])
    if "ulps" not in parts:
        entries = values
    else:
        ulps = _numpy(parts["ulps"])
        if ulps.size != count:
            raise ValueError(f"{name} has {ulps.size} differences for {count} positions.")
        escaped = ulps == np.iinfo(ulps.dtype).min
        entries = _ordered(_ordered(out[chosen]) + ulps)
        if np.count_nonzero(escaped) != values.size:
            raise ValueError(f"{name} has {values.size} values for {np.count_nonzero(escaped)} entries without one.")
        entries[escaped] = values
    if entries.size != count:
        raise ValueError(f"{name} has {entries.size} values for {count} positions.")
    _check_finite(name, torch.from_numpy(entries).view(base.dtype))
    out[chosen] = entries
    return result


def changed_entries(values: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries of `values` whose bits differ from `base`: flat indices, int64 ascending, and their values."""
    new = values.detach().cpu().contiguous()
    indices = torch.from_numpy(np.flatnonzero(_bits(new) != _bits(base)))
    return indices, new.flatten()[indices]


def count_changed(values: torch.Tensor, base: torch.Tensor) -> int:
    """How many entries differ bit by bit; both of one shape and dtype."""
    if values.dtype not in BITS:
        return int((values != base).sum())
    return int(np.count_nonzero(_bits(values) != _bits(base)))


def _positions(changed: np.ndarray, indices: np.ndarray) -> list[dict[str, torch.Tensor]]:
    """Every way to say which of the flat entries are True; `indices` are theirs."""
    ways = [{"bitmap": torch.from_numpy(np.packbits(changed, bitorder="little"))}]
    if indices.size < math.ceil(changed.size / 8):  # else a bit for each entry is smaller than a byte for each change
        gaps = np.diff(indices, prepend=-1) - 1
        ways += [{"gaps": torch.from_numpy(_gap_codes(gaps, dtype))} for dtype in (np.uint8, np.uint16)]
        if changed.size <= 2**31:
            ways.append({"indices": torch.from_numpy(indices.astype(np.int32))})
    return ways


def _gap_codes(gaps: np.ndarray, dtype: type) -> np.ndarray:
    """Gaps as integers of `dtype`, whose largest number says: skip as many entries, and none is listed here."""
    escape = int(np.iinfo(dtype).max)
    if gaps.max(initial=0) < escape:
        return gaps.astype(dtype)
    skips, rest = np.divmod(gaps, escape)
    ends = np.cumsum(skips + 1) - 1
    codes = np.full(ends[-1] + 1, escape, dtype)
    codes[ends] = rest
    return codes


def _read_positions(name: str, parts: Mapping[str, torch.Tensor], size: int) -> tuple[Any, int]:
    """What selects the listed ones of `size` flat entries, indices or a slice, and how many they are."""
    if "indices" in parts:
        indices = _numpy(parts["indices"]).astype(np.int64)
        if indices.size and (indices[0] < 0 or indices[-1] >= size or (np.diff(indices) <= 0).any()):
            raise ValueError(f"{name} has indices that are not ascending numbers from 0 to {size - 1}.")
        return indices, indices.size
    if "gaps" in parts:
        codes = _numpy(parts["gaps"])
        listed = codes != np.iinfo(codes.dtype).max
        count = int(np.count_nonzero(listed))
        # the position after the last one: no sum of the codes so far can exceed it
        if (codes.size and not listed[-1]) or int(codes.sum(dtype=np.int64)) + count > size:
            raise ValueError(f"{name} has gaps that lead beyond its {size} entries.")
        indices = np.cumsum(codes, dtype=np.int64)
        indices = indices if count == codes.size else indices[listed]
        indices += np.arange(count)
        return indices, count
    if "bitmap" in parts:
        bitmap = _numpy(parts["bitmap"])
        if bitmap.size != math.ceil(size / 8) or (size % 8 and bitmap[-1] >> (size % 8)):
            raise ValueError(f"{name} has a bitmap of {bitmap.size} bytes that does not fit {size} entries.")
        indices = np.flatnonzero(np.unpackbits(bitmap, count=size, bitorder="little"))
        return indices, indices.size
    return slice(None), size


def _payloads(new: np.ndarray, old: np.ndarray, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Every way to give the bits `new`, knowing `old`."""
    ways = [{"values": torch.from_numpy(new).view(dtype)}]
    wide = np.int32 if new.itemsize == 2 else np.int64
    for narrow in (np.int8, np.int16)[: new.itemsize // 2]:
        ulps = np.empty(new.size, narrow)
        for start in range(0, new.size, PIECE):
            piece = slice(start, start + PIECE)
            differences = _ordered(new[piece]).astype(wide) - _ordered(old[piece])
            fits = np.abs(differences) <= np.iinfo(narrow).max
            ulps[piece] = np.where(fits, differences, np.iinfo(narrow).min)
        escaped = ulps == np.iinfo(narrow).min
        ways.append({"ulps": torch.from_numpy(ulps), "values": torch.from_numpy(new[escaped]).view(dtype)})
    return ways


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Floats' bits, as signed integers, in the order of the floats: neighbours differ by 1. It is its own inverse."""
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max)


def _check_form(name: str, parts: Mapping[str, torch.Tensor], base: torch.Tensor) -> None:
    """Raise ValueError unless the parts are of one of the forms of the specification, before any is read."""
    dtypes = {
        "indices": (torch.int32,),
        "gaps": (torch.uint8, torch.uint16),
        "bitmap": (torch.uint8,),
        "values": (base.dtype,),
        "ulps": (torch.int8, torch.int16)[: base.itemsize // 2],
    }
    where = [part for part in POSITIONS if part in parts]
    whole = set(parts) == {"values"}
    if "values" not in parts or not set(parts) <= set(PARTS) or len(where) > 1 or not (whole or base.dtype in BITS):
        raise ValueError(f"{name} is stored as {', '.join(sorted(parts))}, which is no form of the sparse encoding.")
    if whole and parts["values"].numel() != base.numel():
        raise ValueError(f"{name} has {parts['values'].numel()} values and no positions for a base of {_form(base)}.")
    for part, tensor in parts.items():
        if tensor.dtype not in dtypes[part] or tensor.dim() != 1 or tensor.numel() > base.numel():
            raise ValueError(f"{name}.{part} is {_form(tensor)}, which does not fit a base of {_form(base)}.")


def _check_finite(name: str, values: torch.Tensor) -> None:
    if values.dtype in BITS:
        exponent, bits = EXPONENT[values.dtype], _bits(values)
        finite = not ((bits & exponent) == exponent).any()
    else:
        finite = bool(torch.isfinite(values).all())
    if not finite:
        raise ValueError(f"{name} holds NaN or Inf.")


def _smallest(candidates: list[dict[str, torch.Tensor]], name_length: int = 0) -> dict[str, torch.Tensor]:
    return min(candidates, key=lambda parts: sum(part.nbytes + HEADER + name_length for part in parts.values()))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().flatten().numpy()


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a tensor as a flat array of signed integers, sharing its memory if it lies contiguous on the CPU."""
    return _numpy(tensor.detach().view(BITS[tensor.dtype]))


def _form(tensor: torch.Tensor) -> str:
    return f"{dtype_name(tensor)} {list(tensor.shape)}"
