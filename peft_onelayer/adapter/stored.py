"""The tensors of a safetensors file as they lie there: dtype, shape, bytes, and whether all values are finite.

No tensor library is loaded for this: torch takes seconds to import, where a header is read in milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from peft_onelayer.records.text import one_line

if TYPE_CHECKING:
    import torch

# torch's names of the dtypes that an adapter may have, by safetensors' names
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"}
DTYPES |= {"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"}
# Of floating-point numbers: integers of the same width, and the bits that are all set in NaN and Inf and in no other.
FLOATS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}  # bytes, of what is written here
PIECE = 2**20  # entries looked at in one go


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        path: the file.
        dtype: as safetensors calls it, such as "BF16".
        shape: of the tensor.
        start: its first byte in the file.
        end: one beyond its last byte.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.end - self.start

    @property
    def entries(self) -> int:
        """Its number of entries."""
        return math.prod(self.shape)

    @property
    def is_floating_point(self) -> bool:
        """Whether it holds floating-point numbers of 16 to 64 bits."""
        return self.dtype in FLOATS

    def read(self, file: BinaryIO) -> torch.Tensor:
        """The tensor, in its own dtype, from `path` opened for reading.

        Raises:
            ValueError: a file that has become shorter since its header was read.
        """
        import torch

        file.seek(self.start)
        data = bytearray(self.bytes)
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise ValueError(f"{self.path} is truncated.")
        dtype = getattr(torch, DTYPES[self.dtype])
        if not data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(self.shape)

    def read_entries(self, start: int, stop: int) -> torch.Tensor:
        """Its entries [start, stop), counted row by row, (stop - start,) in its own dtype.

        Raises:
            ValueError: a file that has become shorter since its header was read.
        """
        width = self.bytes // self.entries
        part = StoredTensor(
            self.path, self.dtype, (stop - start,), self.start + width * start, self.start + width * stop
        )
        with self.path.open("rb") as file:
            return part.read(file)

    def entries_at(self, positions: Sequence[int]) -> torch.Tensor:
        """Some of its floating-point entries, counted row by row, in its own dtype, without reading the others."""
        import torch

        width = FLOATS[self.dtype][0]
        every = np.memmap(self.path, width, "r", self.start, (self.entries,)) if self.entries else np.empty(0, width)
        dtype = getattr(torch, DTYPES[self.dtype])
        return torch.from_numpy(every[list(positions)].view("<i" + width[2:])).view(dtype)

    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor Inf.

        Raises:
            ValueError: a file that has become shorter since its header was read.
        """
        if not self.is_floating_point:
            return True
        kind, exponent = FLOATS[self.dtype]
        with self.path.open("rb") as file:
            file.seek(self.start)
            for first in range(0, self.entries, PIECE):
                count = min(PIECE, self.entries - first)
                bits = np.fromfile(file, kind, count)
                if bits.size < count:
                    raise ValueError(f"{self.path} is truncated.")
                if ((bits & exponent) == exponent).any():
                    return False
        return True


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by their names.

    Raises:
        ValueError: damaged, incomplete, or no such file.
    """
    try:
        with safe_open(path, framework="np"):  # checks the header, and that the file is as long as it says
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, incomplete or no safetensors file: {one_line(error, 150)}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    if not all(isinstance(entry, dict) for entry in header.values()):  # safetensors takes ["U8", [4], [0, 4]] too
        raise ValueError(f"{path} is damaged or no safetensors file: its header describes a tensor by a list.")
    return {
        name: StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), *(8 + length + o for o in entry["data_offsets"])
        )
        for name, entry in header.items()
    }


def header(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> bytes:
    """The head of a safetensors file, behind which the tensors' bytes stand in this order.

    Args:
        tensors: of each, by name, its dtype as safetensors calls it and its shape.
    """
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * WIDTHS[dtype]
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
