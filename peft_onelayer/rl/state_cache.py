"""Hidden states on disk: what leaves the frozen blocks for rows that come back in a later epoch, or a later run.

A file for each row, named by the row's content, in a folder for each base: named by a digest of all that the states
depend on beside the row. Files are written whole and mapped into memory, so that several processes may share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from peft_onelayer.records.files import whole_file
from peft_onelayer.records.text import one_line
from peft_onelayer.sparse.digest import config_digest, tensor_digest
from peft_onelayer.tuner.pass_inputs import MADE_FROM, PassInputs
from peft_onelayer.tuner.prefix import HiddenStates

VALUES, BY_BLOCK = "hidden_states", "returns_tuple"
GIGABYTE = 10**9  # bytes


class StateCache:
    """Hidden states that enter a block, by row.

    A row is known by its tokens with their positions, padding left out, and what each attends to where rows are packed:
    so it is found in a batch that is padded otherwise, where its own pass would differ by rounding alone.

    Attributes:
        found, kept: rows that were read, and that were written.
        full: whether a row was left out because of the bound, or of the disk.
    """

    def __init__(self, folder: str | Path, most_bytes: int) -> None:
        """
        Args:
            folder: made if it is not there.
            most_bytes: of all files in it; nothing is added beyond, and nothing is taken away.
        """
        self.folder, self.most_bytes = Path(folder), most_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.size = sum(file.stat().st_size for file in self.folder.glob("*/*.safetensors"))
        self.found = self.kept = 0
        self.full = False
        self._base: tuple[tuple, str] | None = None  # what tells the weights apart here, and their digest

    def read(self, inputs: PassInputs, blocks: nn.ModuleList, folder: Path) -> HiddenStates | None:
        """The states of all rows of a pass, zero where there is padding; None where one of them is not there.

        Args:
            folder: of `folder_of`.
        """
        rows = _rows(inputs)
        if rows is None or not all((folder / name).exists() for name, _ in rows):
            return None
        device, values, returns_tuple, damaged = inputs.given["input_ids"].device, None, (), False
        for i, (name, real) in enumerate(rows):
            try:
                with safe_open(folder / name, "pt") as file:
                    own, said = file.get_tensor(VALUES), (file.metadata() or {})[BY_BLOCK]
                if own.dim() != 2 or len(own) != int(real.sum()):
                    raise KeyError(VALUES)
            except (SafetensorError, KeyError, OSError):
                warnings.warn(f"{folder / name} holds no hidden states; it is written again.", stacklevel=2)
                with contextlib.suppress(FileNotFoundError):
                    self.size -= (folder / name).stat().st_size
                    (folder / name).unlink()
                damaged = True
                continue
            returns_tuple = tuple(flag == "1" for flag in said)
            if values is None:
                values = torch.zeros((len(rows), len(real), own.size(-1)), dtype=own.dtype, device=device)
            values[i, real.to(device)] = own.to(device)
        if damaged or values is None:
            return None
        self.found += len(rows)
        return HiddenStates(blocks, len(returns_tuple), values, returns_tuple)

    def write(self, inputs: PassInputs, states: HiddenStates, folder: Path) -> None:
        """Keep the states of the rows that are not there, as long as there is room."""
        flags = "".join("01"[flag] for flag in states.returns_tuple)
        for (name, real), values in zip(_rows(inputs) or (), states.values, strict=False):
            if (folder / name).exists():
                continue
            own = values[real.to(values.device)].cpu().contiguous()
            content = save({VALUES: own}, metadata={BY_BLOCK: flags})
            if self.size + len(content) > self.most_bytes:
                self._no_more(f"the bound is {self.most_bytes:,} bytes")
                return
            try:
                folder.mkdir(exist_ok=True)
                with whole_file(folder / name) as partial:
                    partial.write_bytes(content)
            except OSError as error:  # a full disk; training needs no cache
                self._no_more(one_line(error))
                return
            self.size += len(content)
            self.kept += 1

    def _no_more(self, why: str) -> None:
        if not self.full:
            said = f"{self.folder} holds {self.size / GIGABYTE:.2g} GB of hidden states, and no more are kept"
            warnings.warn(f"{said} ({why}).", stacklevel=3)
        self.full = True

    def folder_of(
        self, decoder: PreTrainedModel, weights: Sequence[nn.Parameter], versions: tuple, inputs: PassInputs
    ) -> Path:
        """The folder of what a decoder computes with the weights below the trained block.

        Args:
            weights: those of the decoder that are not of the trained block and above.
            versions: what tells in this process whether one of them changed.
        """
        if self._base is None or self._base[0] != versions:
            digest = hashlib.sha256(config_digest(decoder.config).encode())
            for tensor in (*weights, *decoder.buffers()):
                digest.update(tensor_digest(tensor).encode())
            self._base = versions, digest.hexdigest()
        device = inputs.given["input_ids"].device.type
        plain = [(k, v) for k, v in sorted(inputs.given.items()) if not isinstance(v, torch.Tensor | dict)]
        how: list[Any] = [self._base[1], len(weights), torch.__version__, transformers.__version__, device, plain]
        how += [decoder.config._attn_implementation, decoder.training]
        how += [torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)]
        return self.folder / hashlib.sha256(repr(how).encode()).hexdigest()[:32]


def _rows(inputs: PassInputs) -> list[tuple[str, torch.Tensor]] | None:
    """The name of each row's file, and which of its columns hold tokens, (T,) bool; None where a row depends on more
    than its tokens and a mask of padding."""
    given = inputs.given
    ids, masks = given["input_ids"].cpu(), given.get("attention_mask")
    masks = list(masks.values()) if isinstance(masks, dict) else [masks]
    slots = getattr(masks[0], MADE_FROM, None)
    if {k for k, v in given.items() if isinstance(v, torch.Tensor | dict)} - {
        "input_ids",
        "attention_mask",
        "position_ids",
    }:
        return None
    if slots is None:
        if masks[0] is not None and (len(masks) > 1 or masks[0].shape != ids.shape):
            return None
        slots = torch.zeros_like(ids) if masks[0] is None else (masks[0] != 0).long() - 1
    positions = given.get("position_ids")
    positions = torch.arange(ids.size(1)) if positions is None else positions
    what = torch.stack([ids, positions.cpu().expand_as(ids), slots.cpu()], dim=-1)  # (B, T, 3) int64
    rows = []
    for row in what:
        real = row[:, 2] >= 0
        rows.append((f"{hashlib.sha256(row[real].numpy().tobytes()).hexdigest()[:32]}.safetensors", real))
    return rows
