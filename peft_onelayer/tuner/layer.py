"""The tuner layer: one module of the trained block, with a full trainable copy of its own parameters per adapter.

A module's *own* parameters are those registered on it directly; its children are wrapped separately, so a norm, a
linear layer, fused experts and a composite module that has parameters beside its children are all the same case.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import Cache

from . import mixed_batch
from .config import SingleLayerConfig
from .quantized import dense, is_bitsandbytes, is_quantized
from .sharding import (
    gathered,
    is_fully_sharded,
    is_partitioned,
    refuse_new_adapter,
    refuse_silent_wrap,
    refuse_unmerging_in_forward,
    to_shards,
)


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
            if not isinstance(parameter, DTensor) and is_fully_sharded(self):
                continue  # what FSDP2's MixedPrecisionPolicy gathered; its shards are the masters
            data, grad = sources[name] if sources else (parameter.data, parameter.grad)
            if data.is_meta:
                data = parameter.data
            parameter.data = data.to(parameter.device, dtype)
            if grad is not None:
                parameter.grad = grad.to(parameter.device, dtype)


def _put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Exchange the tensor behind `parameter`.

    Not a copy in place: vLLM's `pack_tensors` still reads the merged tensors that TRL handed it after TRL has unmerged
    the model, because it copies a buffer of up to 1 GiB at a time and the last one when TRL's generator has ended
    (`VLLMGeneration._iter_named_params`). FSDP2 does keep the storage to itself, so there it is written.
    """
    if isinstance(parameter, DTensor):
        parameter.copy_(value)
    else:
        parameter.data = value.to(parameter.device, parameter.dtype)


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
        self.row_adapters: list[str] | None = None  # the adapter of each row of a mixed batch
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SingleLayerConfig) -> None:
        """Add the adapter `adapter_name`: a copy of the base's own parameters in the master dtype."""
        refuse_new_adapter(self.base_layer)
        master_dtype = torch.float32 if config.master_dtype == "float32" else None
        masters = {}
        with gathered(p for _, p in self._own()):
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

    def _base_weights(self) -> dict[str, torch.Tensor]:
        """W_0: the base's own parameters, dequantized, also while an adapter is merged into them."""
        return {n: self._unmerged[n] if n in self._unmerged else dense(self.base_layer, p) for n, p in self._own()}

    def _whole(self, write: bool = False) -> AbstractContextManager[None]:
        """The module's weights and masters ready to be read (`write`: changed) outside a forward pass."""
        modules = [self.base_layer, *self.single_layer_params.values()]
        to_shards(modules)
        return gathered([p for module in modules for p in module.parameters(recurse=False)], write)

    def _own(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.base_layer.named_parameters(recurse=False))

    def _weights_of(self, adapters: list[str]) -> dict[str, torch.Tensor]:
        """The weights with `adapters` in effect, in the base's dtypes; empty if none of them is on this layer.

        Those of a bitsandbytes layer stay in the master dtype: it computes in that of its input.
        """
        masters = [self.single_layer_params[name] for name in adapters if name in self.single_layer_params]
        if not masters:
            return {}
        weights = {}
        origins = self._base_weights() if len(masters) > 1 else {}
        for name, base in self._own():
            weight = masters[0][name]
            if origins:
                origin = origins[name].to(weight.dtype)
                weight = origin + sum(master[name] - origin for master in masters)
            weights[name] = weight.to(base.dtype) if base.is_floating_point() else weight
        return weights

    def _active_names(self) -> set[str]:
        """The names that `_active_weights` replaces, without rounding any weight."""
        return {name for name, _ in self._own()} if self._in_effect() else set()

    def _in_effect(self) -> bool:
        on_layer = any(name in self.single_layer_params for name in self._adapters_in_effect())
        return on_layer and not self.disable_adapters and not self.merged

    def _adapters_in_effect(self) -> list[str]:
        """The active adapters, or in a mixed batch the one that all of the module's rows take."""
        if self.row_adapters is None:
            return self.active_adapters
        names = list(self._rows_by_adapter())
        if len(names) > 1:
            raise RuntimeError(
                f"this model reads a weight of {type(self.base_layer).__name__} without calling it, so the rows of one "
                "batch cannot take different adapters; run them as one batch for each adapter."
            )
        return names

    def _active_weights(self) -> dict[str, torch.Tensor]:
        """What the forward pass replaces: nothing while disabled or merged."""
        return self._weights_of(self._adapters_in_effect()) if self._in_effect() else {}

    def _rows_by_adapter(self) -> dict[str, list[int]]:
        """Which entries of `row_adapters` take each adapter; those whose adapter is elsewhere take the base."""
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(self.row_adapters or []):
            rows.setdefault(name if name in self.single_layer_params else mixed_batch.BASE, []).append(row)
        return rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", *args, **kwargs)

    def _run(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the base layer with the weights in effect."""
        if self.row_adapters is not None and len(self._rows_by_adapter()) > 1:
            return self._run_mixed(method, args, kwargs)
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

    def _run_mixed(self, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a method of the base layer once for the rows of each adapter; wrapped modules inside it see the same."""
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        cache = mixed_batch.CacheRows(caches[0], self.base_layer.layer_idx) if caches else None
        names = self.row_adapters or []
        total = mixed_batch.leading_dimension([*args, *kwargs.values()])
        repeats, rest = divmod(total, len(names))
        if rest:
            raise ValueError(f"adapter_names has {len(names)} names for a batch of {total} rows; give one name a row.")
        inside = [module for module in self.modules() if isinstance(module, SingleLayerLayer)]
        results, rows = [], []
        try:
            for entries in self._rows_by_adapter().values():
                rows.append(index := mixed_batch.row_numbers(entries, repeats))
                for module in inside:
                    module.row_adapters = [names[entry] for entry in entries]
                if cache is not None:
                    cache.take(index)
                some = mixed_batch.take_rows([list(args), list(kwargs.values())], index, total)
                results.append(self._run(method, *some[0], **dict(zip(kwargs, some[1], strict=True))))
        finally:
            for module in inside:
                module.row_adapters = names
            if cache is not None:
                cache.restore()
        if cache is not None:
            cache.join(rows)
        return mixed_batch.join_rows(results, rows)

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
        with self._whole():
            finite = [bool(torch.isfinite(weight).all()) for weight in self._weights_of(adapter_names).values()]
        if not all(finite):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken"
            )

    def refuse_merging(self) -> None:
        """Raise ValueError if the base's weights are quantized: rounding to their grid would undo the training."""
        if any(is_quantized(parameter) for _, parameter in self._own()):
            raise ValueError(
                f"the base's {type(self.base_layer).__name__} is quantized, and merging would round the trained "
                "weights to its grid; save the adapter, load it on the base in bfloat16 and merge there."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the base's parameters the adapters' weights, keeping W_0 so that `unmerge` restores it bit for bit.

        What is already merged is brought up to date with its masters.

        Args:
            safe_merge: refuse to write NaN or Inf.
            adapter_names: default, the active adapters; those not on this layer are passed over.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if not isinstance(names, str):  # which PEFT's check refuses
            names = [name for name in names if name in self.single_layer_params]
        names = check_adapters_to_merge(self, names) if names else []
        together = self.merged_adapters + names
        if not together:
            return
        self.refuse_merging()
        if safe_merge:
            self.check_mergeable(together)
        refuse_silent_wrap(self.base_layer, self.single_layer_params.values())
        with torch.no_grad(), self._whole(write=True):
            weights, own = self._weights_of(together), dict(self.base_layer.named_parameters(recurse=False))
            if not self.merged:
                self._unmerged = {n: p.detach().clone() if isinstance(p, DTensor) else p.data for n, p in own.items()}
            for name, parameter in own.items():
                _put(parameter, torch.empty_like(parameter).copy_(weights[name]))
        self.merged_adapters = together

    def unmerge(self) -> None:
        """Restore the base's weights bit for bit; does nothing if nothing is merged."""
        if not self._unmerged:  # filled before the first write, so that an interrupted merge is undone too
            return
        with torch.no_grad(), self._whole(write=True):
            for name, parameter in self.base_layer.named_parameters(recurse=False):
                if name in self._unmerged:
                    _put(parameter, self._unmerged[name])
        self._unmerged = {}
        self.merged_adapters = []

    def combine(self, weights: dict[str, float], into: str) -> None:
        """Set the adapter `into` to W_0 + sum_i weights_i * (W_i - W_0), in float64. One that is elsewhere adds 0."""
        with torch.no_grad(), self._whole(write=True):
            for name, base in self._base_weights().items():
                origin = base.double()
                total = origin.clone()
                for adapter, weight in weights.items():
                    if adapter in self.single_layer_params:
                        total += weight * (self.single_layer_params[adapter][name].double() - origin)
                self.single_layer_params[into][name].copy_(total)

    def equals_base(self, adapter_name: str) -> bool:
        """Whether the adapter's weights are the base's once rounded to its dtype; False where a process has but a part
        of them, because to ask the others could wait for ever."""
        for name, base in self._base_weights().items():
            master = self.single_layer_params[adapter_name][name]
            if isinstance(master, DTensor) or master.is_meta or base.is_meta or not master.numel():
                return False
            if not torch.equal(master.to(base.device, base.dtype), base):
                return False
        return True

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
        for name, base in self._own():
            master = self.single_layer_params[adapter_name][name]
            if not master.is_meta:
                master.data = master.data.to(device or base.device)

    def __repr__(self) -> str:
        return "single_layer." + super().__repr__()
