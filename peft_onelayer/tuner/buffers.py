"""Buffers of the trained blocks: an adapter holds parameters, so training must not change them."""

from __future__ import annotations

import torch
from torch import nn

from .layer import SingleLayerLayer


def running_statistics(block: nn.Module) -> str | None:
    """The name of a module in `block` that keeps statistics of what it is given in training (batch norms do)."""
    for name, module in block.named_modules():
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None:
            return name.replace(".base_layer", "")
    return None


class Buffers:
    """The buffers of a model's trained blocks at one moment.

    A change of one that is not saved with the model counts only where it is made in place: caches of rotary embeddings
    and masks are replaced as they grow.
    """

    def __init__(self, model: nn.Module, stack_name: str) -> None:
        self.stack_name = stack_name
        self.before = {name: (id(b), b._version, b.detach().clone()) for name, b in self._find(model).items()}

    def refuse_changes(self, model: nn.Module) -> None:
        """Raise RuntimeError if a buffer holds other values than it did."""
        for name, buffer in self._find(model).items() if self.before else ():
            if name not in self.before:
                continue
            identity, version, before = self.before[name]
            if (id(buffer), buffer._version) == (identity, version):
                continue
            owner, _, own_name = name.rpartition(".")
            is_cache = id(buffer) != identity and own_name in model.get_submodule(owner)._non_persistent_buffers_set
            same = before.shape == buffer.shape and torch.equal(before.to(buffer.device, buffer.dtype), buffer)
            if not is_cache and not same:
                raise RuntimeError(
                    f"training has changed the buffer {name.replace('.base_layer', '')} of a trained block. An adapter "
                    "holds parameters only, so the buffer would neither be saved with it nor come back with "
                    "disable_adapter(); keep the buffer as it is, or train a block without one."
                )
            self.before[name] = (id(buffer), buffer._version, before)

    def _find(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {
            f"{self.stack_name}.{index}.{name}": buffer
            for index, block in model.get_submodule(self.stack_name).named_children()
            if any(isinstance(module, SingleLayerLayer) for module in block.modules())
            for name, buffer in block.named_buffers()
            if "single_layer_params" not in name
        }
