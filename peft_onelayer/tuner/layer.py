"""The tuner layer: one module of the trained block, with a full trainable copy of its own parameters per adapter.

A module's *own* parameters are those registered on it directly; its children are wrapped separately, so a norm, a
linear layer, fused experts and a composite module that has parameters beside its children are all the same case.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.func import functional_call

from .config import SingleLayerConfig


class MasterParameters(nn.ParameterDict):
    """The trained copy of a module's own parameters, kept in at least `master_dtype` (None: whatever the base has).

    `model.to(torch.bfloat16)` and its like move the masters but never narrow them.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], master_dtype: torch.dtype | None) -> None:
        super().__init__(parameters)
        self.master_dtype = master_dtype

    def _apply(self, fn, recurse=True):  # the seam under nn.Module.to, .half, .cuda, .to_empty, ...
        before = {n: (p.data, None if p.grad is None else p.grad.data) for n, p in self.items()}
        super()._apply(fn, recurse)
        self.widen(before)
        return self

    def widen(self, sources: dict[str, tuple[torch.Tensor, torch.Tensor | None]] | None = None) -> None:
        """Bring parameters that were narrowed back to the master dtype, with the values of `sources` where given."""
        if self.master_dtype is None:
            return
        for name, parameter in self.items():
            dtype = torch.promote_types(parameter.dtype, self.master_dtype)
            if dtype == parameter.dtype:
                continue
            data, grad = sources[name] if sources else (parameter.data, parameter.grad)
            if data.is_meta:
                data = parameter.data
            parameter.data = data.to(parameter.device, dtype)
            if grad is not None:
                parameter.grad = grad.to(parameter.device, dtype)


class _Method(nn.Module):
    """Makes a method of `module` callable through `functional_call`, which calls `forward` only."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.name)(*args, **kwargs)


class SingleLayerLayer(nn.Module, BaseTunerLayer):
    """Wraps `base_layer` and runs it with the active adapter's parameters in place of its own.

    With one active adapter the weights are W_i; with several, W_0 + sum_i (W_i - W_0), summed in the master dtype.
    Both are rounded to the base's dtype in the forward pass, so gradients reach the masters exactly as they would
    reach the base's weights (those of a weight used several times per pass are summed in the master dtype).
    """

    adapter_layer_names = ("single_layer_params",)
    base_layer: Any  # an nn.Module
    single_layer_params: Any  # an nn.ModuleDict of MasterParameters by adapter name

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SingleLayerConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.single_layer_params = nn.ModuleDict({})
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, torch.Tensor] = {}  # W_0 while merged, to restore it bit for bit
        self._frozen_while_disabled: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SingleLayerConfig) -> None:
        """Add the adapter `adapter_name`: a copy of the base's own parameters in the master dtype."""
        master_dtype = torch.float32 if config.master_dtype == "float32" else None
        masters = {}
        for name, weight in self._base_weights().items():
            dtype = weight.dtype if master_dtype is None else torch.promote_types(weight.dtype, master_dtype)
            master = weight.detach().to(dtype, copy=True)
            if not config.init_weights and not master.is_meta:
                master += 0.1 * torch.randn_like(master)
            masters[name] = nn.Parameter(master)
        self.single_layer_params[adapter_name] = MasterParameters(masters, master_dtype)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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

    # Some model code reads `module.weight` instead of calling the module: it must see the weights in effect.
    @property
    def weight(self) -> torch.Tensor:
        return self._active_weights().get("weight", self.base_layer.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        return self._active_weights().get("bias", self.base_layer.bias)

    def _base_weights(self) -> dict[str, torch.Tensor]:
        """W_0: the base's own parameters, also while an adapter is merged into them."""
        own: dict[str, torch.Tensor] = dict(self.base_layer.named_parameters(recurse=False))
        return {name: self._unmerged.get(name, parameter) for name, parameter in own.items()}

    def _weights_of(self, adapters: list[str]) -> dict[str, torch.Tensor]:
        """The weights with `adapters` in effect, in the base's dtypes; empty if none of them is on this layer."""
        masters = [self.single_layer_params[name] for name in adapters if name in self.single_layer_params]
        if not masters:
            return {}
        weights = {}
        for name, base in self._base_weights().items():
            weight = masters[0][name]
            if len(masters) > 1:
                origin = base.to(weight.dtype)
                weight = origin + sum(master[name] - origin for master in masters)
            weights[name] = weight.to(base.dtype)
        return weights

    def _active_names(self) -> set[str]:
        """The names that `_active_weights` replaces, without rounding any weight."""
        on_layer = any(name in self.single_layer_params for name in self.active_adapters)
        in_effect = on_layer and not self.disable_adapters and not self.merged
        return {name for name, _ in self.base_layer.named_parameters(recurse=False)} if in_effect else set()

    def _active_weights(self) -> dict[str, torch.Tensor]:
        """What the forward pass replaces: nothing while disabled or merged."""
        return {} if self.disable_adapters or self.merged else self._weights_of(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", *args, **kwargs)

    def _run(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the base layer with the weights in effect."""
        if self.disable_adapters and self.merged:
            self.unmerge()
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
        if method == "__call__":
            return functional_call(self.base_layer, weights, args, kwargs)
        weights = {f"module.{name}": weight for name, weight in weights.items()}
        return functional_call(_Method(self.base_layer, method), weights, args, kwargs)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """See `BaseTunerLayer.set_adapter`; it decides anew what trains, also while the adapters are switched off."""
        super().set_adapter(adapter_names, inference_mode)
        self._frozen_while_disabled = []

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off. PEFT's own lets a frozen active adapter train once it is on again."""
        frozen = self._frozen_while_disabled
        if not enabled and not self.disable_adapters:
            frozen = [n for n in self.active_adapters if not self._trains(n)]
        super().enable_adapters(enabled)
        if enabled:
            self.set_requires_grad(frozen, False)
        self._frozen_while_disabled = [] if enabled else frozen

    def _trains(self, adapter_name: str) -> bool:
        return adapter_name in self.single_layer_params and any(
            parameter.requires_grad for parameter in self.single_layer_params[adapter_name].parameters()
        )

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raise PEFT's own ValueError if merging `adapter_names` would write NaN or Inf into the base."""
        for weight in self._weights_of(adapter_names).values():
            if not torch.isfinite(weight).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken"
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Copy the adapters' weights into the base in place, keeping W_0 so that `unmerge` restores it bit for bit.

        Args:
            safe_merge: refuse to write NaN or Inf.
            adapter_names: default, the active adapters; those not on this layer are passed over.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if not isinstance(names, str):  # which PEFT's check refuses
            names = [name for name in names if name in self.single_layer_params]
        names = check_adapters_to_merge(self, names) if names else []
        if not names:
            return
        together = self.merged_adapters + names
        if safe_merge:
            self.check_mergeable(together)
        with torch.no_grad():
            weights, own = self._weights_of(together), dict(self.base_layer.named_parameters(recurse=False))
            if not self.merged:
                self._unmerged = {name: parameter.detach().clone() for name, parameter in own.items()}
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        self.merged_adapters = together

    def unmerge(self) -> None:
        """Restore the base's weights bit for bit; does nothing if nothing is merged."""
        with torch.no_grad():
            for name, parameter in self.base_layer.named_parameters(recurse=False):
                if name in self._unmerged:
                    parameter.copy_(self._unmerged[name])
        self._unmerged = {}
        self.merged_adapters = []

    def to_base_dtype(self, adapter_name: str) -> None:
        """Give up the adapter's master precision: keep it in the base's dtype from now on."""
        masters = self.single_layer_params[adapter_name]
        masters.master_dtype = None
        for name, base in self._base_weights().items():
            masters[name].data = masters[name].data.to(base.dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version also casts to the base's dtype, which would narrow the masters.
        if adapter_name not in self.single_layer_params:
            return
        for name, base in self._base_weights().items():
            master = self.single_layer_params[adapter_name][name]
            if not master.is_meta:
                master.data = master.data.to(device or base.device)

    def __repr__(self) -> str:
        return "single_layer." + super().__repr__()
