"""Adapters that are to be combined, checked against their base, and their tensors read piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_onelayer.records.locate import hub_identity
from peft_onelayer.sparse.base import BaseRecord

from .checkpoint import Checkpoint
from .merge import check_base, check_unquantized
from .reader import AdapterFile
from .stored import PIECE

if TYPE_CHECKING:
    import torch

    Pieces = Callable[[], Iterator[tuple[torch.Tensor, list[torch.Tensor]]]]


class Parts:
    """The adapters to combine, checked against their base.

    Attributes:
        names: of the tensors that at least one of them trains, sorted.
        dtypes: of the base's tensors in training, as torch calls them, by name.
        expected: entries to be read in all passes over the tensors, for the progress.
    """

    def __init__(
        self,
        files: list[AdapterFile],
        checkpoint: Checkpoint,
        allow_other_base: bool,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.files, self.checkpoint, self.allow_other_base, self.on_progress = (
            files,
            checkpoint,
            allow_other_base,
            on_progress,
        )
        self.names = sorted({name for file in files for name in file.names})
        self.dtypes: dict[str, str] = {}
        for file in files:
            check_base(file, checkpoint, allow_other_base)
            check_unquantized(file, allow_other_base)
            for name in file.names:
                dtype = file.base_dtype(name) or checkpoint.dtype(name)
                if self.dtypes.setdefault(name, dtype) != dtype:
                    raise ValueError(
                        f"{file.folder} was trained on a base in {dtype} and another adapter on one in "
                        f"{self.dtypes[name]}: their values are those of different models."
                    )
        self.layers = sorted({layer for file in files for layer in file.layers})
        self.expected, self.done = self.entries, 0

    def refuse_common_tensors(self) -> None:
        """Raise ValueError if two adapters train one tensor."""
        first: dict[str, AdapterFile] = {}
        for file in self.files:
            for name in file.names:
                if (other := first.setdefault(name, file)) is not file:
                    raise ValueError(
                        f"{other.folder} and {file.folder} both train {name}, so they do not stack; choose --method "
                        "sum, average, slerp, ties, dare or cpi."
                    )

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.places[self.checkpoint.stored_as[name]].shape

    @property
    def entries(self) -> int:
        return sum(math.prod(self.shape(name)) for name in self.names)

    def pieces(self, name: str, which: Sequence[int] | None = None) -> Pieces:
        """A function that reads a tensor piece by piece, anew at each call.

        It gives (n,) float64: the base's entries, and those of each adapter, or of the adapters `which`; an adapter
        that does not train the tensor has the base's. Of dense adapters they are the masters. A sparse adapter's tensor
        is decoded here, and stays in memory in the base's dtype with the function.
        """
        import torch

        chosen = [file for i, file in enumerate(self.files) if which is None or i in which]
        place, dtype = self.checkpoint.places[self.checkpoint.stored_as[name]], getattr(torch, self.dtypes[name])
        decoded = self._decoded(name, [file for file in chosen if file.sparse is not None and name in file.keys])
        for file in chosen:
            stored = file.stored_parts(name)[""] if name in file.keys and file.sparse is None else None
            if stored is not None and stored.shape != place.shape:
                raise ValueError(f"{file.folder} holds {name} in shape {list(stored.shape)}, not {list(place.shape)}.")

        def read() -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
            for start in range(0, place.entries, PIECE):
                stop = min(start + PIECE, place.entries)
                base, values = place.read_entries(start, stop).to(dtype), []
                for file in chosen:
                    if file.folder in decoded:
                        value = decoded[file.folder][start:stop]
                    else:
                        value = file.masters(name, start, stop) if name in file.keys else base
                    values.append(value.double())
                self.done += stop - start
                self.on_progress(min(self.done, self.expected), self.expected)
                yield base.double(), values

        return read

    def _decoded(self, name: str, files: list[AdapterFile]) -> dict[Path, torch.Tensor]:
        """The flat tensors of sparse adapters, in the base's dtype, by the adapters' folders."""
        import torch

        if not files:
            return {}
        base = self.checkpoint.read(self.checkpoint.stored_as[name]).to(getattr(torch, self.dtypes[name]))
        return {file.folder: file.tensor(name, base, self.allow_other_base).flatten() for file in files}

    def config(self) -> dict[str, Any]:
        """adapter_config.json of the result."""
        first = self.files[0].config
        config = {k: v for k, v in first.items() if k not in ("encoding", "mask", "combined", "saved_embeddings")}
        config |= {"layer": self.layers, "layer_indices": self.layers}
        if any(file.config.get("target_modules") or file.config.get("mask") for file in self.files):
            config["target_modules"] = sorted({name.rpartition(".")[0] for name in self.names})
        records = [file.trained_on for file in self.files if file.trained_on is not None]
        if self.allow_other_base or len(records) < len(self.files):
            hub_id, commit = hub_identity(self.checkpoint.folder)
            known = str(self.checkpoint.folder) == first.get("base_model_name_or_path")
            if not known and (commit is None or commit != first.get("revision")):
                config |= {"base_model_name_or_path": hub_id or str(self.checkpoint.folder), "revision": commit}
            return config | {"trained_on": self.checkpoint.record(self.dtypes).to_json()}
        samples = {name: sample for record in records for name, sample in record.tensors.items()}
        block = {name: samples[name] for name in self.names}
        rest = {name: sample for name, sample in samples.items() if name not in block}
        return config | {"trained_on": BaseRecord(block, rest, records[0].stages).to_json()}
