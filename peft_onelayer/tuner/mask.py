"""Which entries of a base's tensors train: read from a safetensors file of boolean tensors, checked against a model.

What trains of a tensor is one flat parameter with the entries where its mask is True, row by row. Every other entry is
the base's own, so no optimizer, weight decay or clipping can reach it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from peft_onelayer.records.text import name_blocks, one_line, printable
from peft_onelayer.sparse.names import MASK, base_name


class Mask:
    """Boolean tensors by the names of the base's parameters, with at least one True entry each. It is not copied with
    the configuration that holds it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = {name: tensor for name, tensor in sorted(tensors.items()) if bool(tensor.any())}

    @classmethod
    def read(cls, path: str | Path) -> Mask:
        """Read a file of masks.

        Raises:
            ValueError: no safetensors file, a tensor that is not boolean, or no True entry.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"mask={str(path)!r}: no such file; `onelayer analyze BASE OTHER --mask-out` writes one.")
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"mask={str(path)!r} is no readable safetensors file: {one_line(error, 150)}") from None
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bool:
                raise ValueError(
                    f"mask={str(path)!r} holds {printable(name)} as {tensor.dtype}, expected torch.bool: True where an "
                    "entry trains."
                )
        mask = cls(tensors)
        if not mask.tensors:
            raise ValueError(f"mask={str(path)!r} has no True entry: nothing would train.")
        return mask

    def __deepcopy__(self, memo: Any) -> Mask:
        return self

    @property
    def trained(self) -> int:
        """The number of True entries."""
        return sum(int(tensor.count_nonzero()) for tensor in self.tensors.values())

    def record(self) -> dict[str, Any]:
        """What adapter_config.json says of it: "trained" of "entries" of its tensors, and the "sha256" of their names,
        shapes and bits."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            digest.update(f"{name} {list(tensor.shape)}\n".encode())
            digest.update(pack(tensor).numpy().tobytes())
        entries = sum(tensor.numel() for tensor in self.tensors.values())
        return {"trained": self.trained, "entries": entries, "sha256": digest.hexdigest()}

    def of_module(self, name: str) -> dict[str, torch.Tensor]:
        """For the module of this name in the base the flat positions of the entries that train, (n,) int64, by
        parameter; a parameter without any is left out."""
        own = {
            key.removeprefix(f"{name}."): tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}.")
        }
        return {key: positions(tensor) for key, tensor in own.items() if "." not in key}

    def inside(self, model: nn.Module, stack: str, blocks: Collection[int], modules: Collection[str]) -> Mask:
        """The part of the mask that lies in the blocks and modules to train.

        Args:
            model: the base, perhaps wrapped by other adapters already.
            stack: name of the ModuleList that holds the blocks.
            blocks: indices of those that train.
            modules: names in the unwrapped model of the modules that train.

        Raises:
            ValueError: a name that the base has not, another shape than the base's, or no True entry in these modules.
        """
        shapes = {
            base_name(name): shape_of(parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if "single_layer_params" not in name
        }
        for name, tensor in self.tensors.items():
            if name not in shapes:
                raise ValueError(
                    f"the mask names {printable(name)}, which is no parameter of the base; masks go by the names of "
                    f"model.named_parameters(), such as {next(iter(shapes))}."
                )
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(
                    f"the mask of {printable(name)} has shape {list(tensor.shape)}, and the base's tensor "
                    f"{list(shapes[name])}."
                )
        chosen = {name: mask for name, mask in self.tensors.items() if name.rpartition(".")[0] in modules}
        if not chosen:
            raise ValueError(
                f"the mask has no True entry in {name_blocks(sorted(blocks))} or the chosen parts of it: nothing would "
                f"train. Its first tensor is {printable(next(iter(self.tensors)))}; the blocks are those of {stack}."
            )
        return Mask(chosen)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask is True, counted row by row: (n,) int64, ascending."""
    return mask.flatten().nonzero().squeeze(1)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bits, the first entry lowest: (ceil(entries / 8),) uint8."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy(), bitorder="little"))


def unpack(name: str, bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The mask of `shape` that `pack` made `bits` of.

    Raises:
        ValueError: bits of another number.
    """
    entries = shape.numel()
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-entries // 8),):
        raise ValueError(f"the adapter's {printable(name)} holds no bits of a mask of shape {list(shape)}.")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=entries, bitorder="little").astype(bool)).view(shape)


def split_masks(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An adapter file's tensors, and the packed masks among them by the key of their tensor."""
    masks = {
        key.removesuffix(MASK): tensor
        for key, tensor in state.items()
        if key.endswith(MASK) and key.removesuffix(MASK) in state and tensor.dtype == torch.uint8
    }
    return {key: tensor for key, tensor in state.items() if key.removesuffix(MASK) not in masks or key in masks}, masks


def scatter(base: torch.Tensor, where: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A copy of `base` with `values` at the flat positions `where`; a gradient reaches `values` alone."""
    return base.detach().flatten().index_copy(0, where, values).view(base.shape)


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a base's parameter, also of one that bitsandbytes has packed or ZeRO-3 partitioned."""
    state = getattr(parameter, "quant_state", None)
    return tuple(getattr(parameter, "ds_shape", parameter.shape) if state is None else state.shape)
