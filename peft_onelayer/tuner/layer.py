"""The tuner layer: wraps one module of the trained block and runs it with an adapter's weights in place of its own.

There is one wrapper per module, not one per block. transformers checkpoints a block's `forward`, so a wrapper around
the block would put the trained weights in place outside of the checkpointed region, and the backward pass would
recompute the block without them: the reentrant kind then gives the trained weights no gradient, without a word, and the
other kind raises CheckpointError, because frozen weights save fewer tensors.

A module's *own* parameters are those registered on it directly; its children are wrapped separately, so a norm, a
linear layer, fused experts and a composite module that has parameters beside its children are all the same case.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from . import mixed_batch
from .config import SingleLayerConfig
from .merging import MergeableWeights
from .quantized import is_bitsandbytes
from .sharding import is_partitioned, refuse_silent_wrap, refuse_unmerging_in_forward


class SingleLayerLayer(MergeableWeights):
    """Runs `base_layer` with the weights of the active adapters in place of its own.

    Weights are rounded to the base's dtype in the forward pass, so gradients reach the masters exactly as they would
    reach the base's weights (those of a weight used several times per pass are summed in the master dtype).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SingleLayerConfig) -> None:
        super().__init__(base_layer, adapter_name, config)
        self.row_adapters: list[str] | None = None  # the adapter of each row of a mixed batch
        self._frozen_while_disabled: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """What is not the wrapper's is the base layer's (`in_features`, `eps`, a composite's children, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names stay private: accelerate keeps its hooks under them and deletes them from where it finds
            # them. Without base_layer this is a copy or an unpickling under way.
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        value = getattr(self.base_layer, name)
        if inspect.ismethod(value) and value.__self__ is self.base_layer:  # e.g. Gemma 3n calls `altup.predict(...)`
            return functools.partial(self._run, name)
        return self._active_weights()[name] if name in self._active_names() else value

    def __setattr__(self, name: str, value: Any) -> None:
        """What model code keeps on a module (RecurrentGemma sets `rg_lru.recurrent_states`) is the base layer's."""
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if base is not None and name in base.__dict__ and name not in self.__dict__ and not name.startswith("_"):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    # Some model code reads `module.weight` instead of calling the module: it must see the weights in effect.
    @property
    def weight(self) -> torch.Tensor:
        return self._active_weights().get("weight", self.base_layer.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        return self._active_weights().get("bias", self.base_layer.bias)

    def _active_names(self) -> set[str]:
        """The names that `_active_weights` replaces, without rounding any weight."""
        return {name for name, _ in self._own()} if self._in_effect() else set()

    def _in_effect(self) -> bool:
        on_module = any(name in self.single_layer_params for name in self._adapters_in_effect())
        return on_module and not self.disable_adapters and not self.merged

    def _adapters_in_effect(self) -> list[str]:
        """The active adapters, or in a mixed batch the one that all of the module's rows take."""
        return self.active_adapters if self.row_adapters is None else mixed_batch.adapter_of_all_rows(self)

    def _active_weights(self) -> dict[str, torch.Tensor]:
        """What the forward pass replaces: nothing while disabled or merged."""
        return self._weights_of(self._adapters_in_effect()) if self._in_effect() else {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", *args, **kwargs)

    def _run(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the base layer with the weights in effect."""
        if self.row_adapters is not None and len(mixed_batch.rows_by_adapter(self)) > 1:
            return mixed_batch.run_by_adapter(self, method, args, kwargs)
        if self.disable_adapters and self.merged:
            refuse_unmerging_in_forward(self.base_layer)
            self.unmerge()
        if self._in_effect():
            refuse_silent_wrap(self.base_layer, self.single_layer_params.values())
        for masters in self.single_layer_params.values():
            masters.widen()  # TRL assigns bfloat16 to the `.data` of what trains when other parts are quantized
        weights = self._active_weights()
        if not weights:
            return getattr(self.base_layer, method)(*args, **kwargs)
        if any(p.is_meta for p in self.base_layer.parameters(recurse=False)):
            raise RuntimeError(
                "the trained block's base weights are on the meta device (offloaded to CPU or disk, or never loaded): "
                "its adapter would have no effect; keep that block on the device with device_map, or load the weights."
            )
        if is_bitsandbytes(self.base_layer):
            return self._dense_linear(weights, *args)
        if method == "__call__" and any(is_partitioned(parameter) for _, parameter in self._own()):
            # DeepSpeed plans ahead from the modules called and takes it for an error if the same modules want other
            # parameters, as they would with the adapter off (TRL's reference): leave the base layer's hook out.
            method = "forward"
        if method == "__call__":
            return functional_call(self.base_layer, weights, args, kwargs)
        weights = {f"module.{name}": weight for name, weight in weights.items()}
        return functional_call(_Method(self.base_layer, method), weights, args, kwargs)

    def _dense_linear(self, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `x`."""
        bias = weights.get("bias")
        return nn.functional.linear(x, weights["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """See `BaseTunerLayer.set_adapter`; it decides anew what trains, also while the adapters are switched off."""
        super().set_adapter(adapter_names, inference_mode)
        self._frozen_while_disabled = []

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off. PEFT's own lets a frozen active adapter train once it is on again."""
        frozen = self._frozen_while_disabled
        if not enabled and not self.disable_adapters:
            frozen = [n for n in self.active_adapters if not self.trains(n)]
        super().enable_adapters(enabled)
        if enabled:
            self.set_requires_grad(frozen, False)
        self._frozen_while_disabled = [] if enabled else frozen

    def trains(self, adapter_name: str) -> bool:
        """Whether the adapter is on this module and has parameters that require gradients."""
        return adapter_name in self.single_layer_params and any(
            parameter.requires_grad for parameter in self.single_layer_params[adapter_name].parameters()
        )

    def __repr__(self) -> str:
        return "single_layer." + super().__repr__()


class _Method(nn.Module):
    """Makes a method of `module` callable through `functional_call`, which calls `forward` only."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.name)(*args, **kwargs)
