"""The tensors of a changed model beside those of its base, read from files piece by piece.

A changed model is a checkpoint, an adapter of this method, or several adapters of different tensors. Tensors go by
their names in the loaded base model; those that transformers makes from several stored ones keep their names in the
files. Opening reads headers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_onelayer.adapter.checkpoint import Checkpoint
from peft_onelayer.adapter.merge import as_trained, check_base, check_unquantized, trained_dtype
from peft_onelayer.adapter.reader import AdapterFile, open_adapter
from peft_onelayer.adapter.stored import DTYPES, StoredTensor
from peft_onelayer.records.files import CONFIG
from peft_onelayer.records.locate import ADAPTER_FILES, adapter_folder, base_folder, find_folder, is_local

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Values:
    """A tensor whose entries are read piece by piece.

    Attributes:
        dtype: of the entries, as torch calls it.
        shape: of the tensor.
        read: gives the flat entries [start, stop) in that dtype, (stop - start,).
        columns: gives the columns [start, stop) of a matrix, (rows, stop - start).
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]
    columns: Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """A tensor of the base and the same tensor of the changed model, of one shape."""

    name: str
    base: Values
    other: Values


class CheckpointChange:
    """A checkpoint beside its base.

    Attributes:
        label: what the user called it.
        names: the tensors that both hold in one shape and in floating point, sorted.
        skipped: the others, by name, with the reason.
    """

    kind = "checkpoint"

    def __init__(self, label: str, checkpoint: Checkpoint, base: Checkpoint) -> None:
        self.label, self.base, self.checkpoint = label, base, checkpoint
        self._here = names_in_files(base)
        same = checkpoint.places.keys() == base.places.keys()
        self._there = self._here if same else names_in_files(checkpoint)
        self.skipped: dict[str, str] = {}
        for name in self._here.keys() | self._there.keys():
            if reason := self._why_not(name):
                self.skipped[name] = reason
        self.names = sorted(self._here.keys() - self.skipped.keys())
        if not self.names:
            raise ValueError(
                f"{checkpoint.folder} and {base.folder} have no tensor in common that could be compared: "
                "they are checkpoints of different models."
            )

    def _why_not(self, name: str) -> str | None:
        if name not in self._there:
            return "only in the base"
        if name not in self._here:
            return "not in the base"
        here, there = self.base.places[self._here[name]], self.checkpoint.places[self._there[name]]
        if here.shape != there.shape:
            return f"shape {list(here.shape)} in the base, {list(there.shape)} in the other"
        for place in (here, there):
            if not place.is_floating_point:
                return f"stored as {place.dtype}, no floating-point numbers of 16 to 64 bits"
        return None if here.entries else "holds no entries"

    @property
    def entries(self) -> int:
        """Of all `names`."""
        return sum(self.base.places[self._here[name]].entries for name in self.names)

    def pair(self, name: str) -> Pair:
        """The two tensors called `name`."""
        here, there = self.base.places[self._here[name]], self.checkpoint.places[self._there[name]]
        return Pair(name, stored_values(here), stored_values(there))


class AdapterChange:
    """One or several adapters beside their base.

    Attributes:
        label: what the user called them.
        names: the trained tensors that hold entries, sorted.
        skipped: the others, by name, with the reason.
    """

    kind = "adapter"

    def __init__(self, label: str, files: Sequence[AdapterFile], base: Checkpoint, allow_other_base: bool) -> None:
        self.label, self.base, self.allow_other_base = label, base, allow_other_base
        self._files: dict[str, AdapterFile] = {}
        for file in files:
            check_base(file, base, allow_other_base)
            check_unquantized(file, allow_other_base)
            for name in file.names:
                if name in self._files:
                    raise ValueError(
                        f"{self._files[name].folder} and {file.folder} both train {name}: analyze one at a time, or "
                        "give adapters of different blocks; `onelayer compare` shows what they have in common."
                    )
                self._files[name] = file
        empty = {name for name in self._files if not base.places[base.stored_as[name]].entries}
        self.skipped = dict.fromkeys(empty, "holds no entries")
        self.names = sorted(self._files.keys() - empty)

    @property
    def entries(self) -> int:
        """Of all `names`."""
        return sum(self.base.places[self.base.stored_as[name]].entries for name in self.names)

    def pair(self, name: str) -> Pair:
        """The two tensors called `name`: of a dense adapter the stored masters, of a sparse one the decoded values, for
        which both tensors are read whole. The base's are in the dtype that they were loaded in for training, as far as
        that is recorded: the masters are copies of these."""
        file, place = self._files[name], self.base.places[self.base.stored_as[name]]
        parts = file.stored_parts(name)
        if file.sparse is None:
            stored = parts[""]
            if stored.shape != place.shape:
                raise ValueError(
                    f"{name} has shape {list(stored.shape)} in {file.folder} and {list(place.shape)} in the base: "
                    "the adapter was made for another base model."
                )
            if not stored.is_floating_point:
                raise ValueError(f"{file.folder} stores {name} as {stored.dtype}, which is no floating-point weight.")
            here = cast(stored_values(place), trained_dtype(file, name, self.base))
            return Pair(name, here, stored_values(stored))
        value, base = as_trained(file, name, self.base, self.allow_other_base)
        return Pair(name, held_values(base), held_values(value))


Change = CheckpointChange | AdapterChange


def open_base(base: str | Path, revision: str | None = None) -> Checkpoint:
    """The base's checkpoint, in a folder or from the Hub.

    Raises:
        ValueError: as `base_folder` and `Checkpoint`.
    """
    return Checkpoint(base_folder(base, revision))


def open_other(name: str | Path, revision: str | None = None) -> Checkpoint | AdapterFile:
    """What `name` stands for, a checkpoint or an adapter; of a Hub repository an adapter's files are fetched first.

    Raises:
        ValueError: neither, in one line.
    """
    text = str(name)
    if is_local(text):
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise ValueError(f"no folder at {folder}; give a checkpoint or an adapter, a folder or an id on the Hub.")
        if (folder / CONFIG).exists() or (folder / "adapter" / CONFIG).exists():
            return open_adapter(adapter_folder(name))
        return Checkpoint(folder)
    if "/" in text:
        folder = find_folder(text, revision, "a model", allow=ADAPTER_FILES)
        if (folder / CONFIG).exists():
            return open_adapter(folder)
    return Checkpoint(base_folder(text, revision))


def open_change(
    base: Checkpoint, others: Sequence[Checkpoint | AdapterFile], label: str, allow_other_base: bool = False
) -> Change:
    """What was opened, beside the base; several must all be adapters.

    Raises:
        ValueError: several of which one is a checkpoint, tensors that do not fit the base, or another base.
    """
    adapters = [other for other in others if isinstance(other, AdapterFile)]
    if len(adapters) == len(others):
        return AdapterChange(label, adapters, base, allow_other_base)
    if len(others) > 1:
        raise ValueError("several can be analyzed together where all are adapters; give one checkpoint alone.")
    (other,) = others
    assert isinstance(other, Checkpoint)
    return CheckpointChange(label, other, base)


def names_in_files(checkpoint: Checkpoint) -> dict[str, str]:
    """The name of each tensor in the files, by its name in the loaded model where it has one, else by itself."""
    loaded = {stored: name for name, stored in checkpoint.stored_as.items()}
    return {loaded.get(stored, stored): stored for stored in checkpoint.places}


def held_values(tensor: torch.Tensor) -> Values:
    """The entries of a tensor in memory, on whatever device."""
    tensor = tensor.detach()
    flat = tensor.flatten()
    return Values(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        read=lambda start, stop: flat[start:stop].cpu(),
        columns=lambda start, stop: tensor[:, start:stop].cpu(),
    )


def stored_values(place: StoredTensor) -> Values:
    """The entries of a tensor in a safetensors file."""

    size = place.bytes // place.entries

    def gather(pieces: range, count: int) -> torch.Tensor:
        """`count` entries from each of these on."""
        import torch

        data = memoryview(bytearray(size * count * len(pieces)))
        with place.path.open("rb", buffering=0) as file:
            for i, first in enumerate(pieces):
                file.seek(place.start + size * first)
                piece = data[size * count * i : size * count * (i + 1)]
                while piece:  # one call reads at most 2 GB
                    if not (got := file.readinto(piece)):
                        raise ValueError(f"{place.path} is truncated.")
                    piece = piece[got:]
        return torch.frombuffer(data, dtype=getattr(torch, DTYPES[place.dtype]))

    def columns(start: int, stop: int) -> torch.Tensor:
        height, width = place.shape
        return gather(range(start, height * width, width), stop - start).view(height, -1)

    return Values(
        dtype=DTYPES[place.dtype],
        shape=place.shape,
        read=lambda start, stop: gather(range(start, start + 1), stop - start),
        columns=columns,
    )


def cast(values: Values, dtype: str) -> Values:
    """The same entries in the dtype that torch calls `dtype`."""
    import torch

    kind = getattr(torch, dtype)
    return Values(
        dtype=dtype,
        shape=values.shape,
        read=lambda start, stop: values.read(start, stop).to(kind),
        columns=lambda start, stop: values.columns(start, stop).to(kind),
    )
