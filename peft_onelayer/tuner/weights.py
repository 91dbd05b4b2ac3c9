"""The weights of one module of the trained block: the base's own (W_0), and a full trainable copy (W_i) per adapter."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

from . import rounded
from .config import SingleLayerConfig
from .instance import PATCHED, own_parameters, rebound
from .quantized import dequantized, is_bitsandbytes
from .sharding import gathered, is_fully_sharded, is_partitioned, refuse_new_adapter, to_shards

INITIALIZED = "_is_hf_initialized"  # transformers: `PreTrainedModel._init_weights` leaves such a tensor alone


def stand_in(base_layer: nn.Module, masters: dict[str, nn.Parameter]) -> nn.Module:
    """A module of the base layer's own class and settings that owns `masters`, with no children, buffers or hooks.

    It is never called. It is there for whoever decides by a parameter's owner: transformers' Trainer decays no weight
    of an `nn.LayerNorm`, GaLore projects those of an `nn.Linear`. In place of a bitsandbytes module it is an
    `nn.Linear`.
    """
    kind = nn.Linear if is_bitsandbytes(base_layer) else type(base_layer)
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    own = vars(module)
    for name, value in vars(base_layer).items():
        if name not in own and name not in PATCHED and rebound(value, base_layer, module) is value:
            own[name] = value
    for name, parameter in base_layer._parameters.items():
        module.register_parameter(name, masters.get(name))  # which low_cpu_mem_usage=True replaces
        if getattr(parameter, INITIALIZED, False):
            setattr(module._parameters[name], INITIALIZED, True)
    return module.train(base_layer.training)


# All masters there are, by their identities: an optimizer may hold some that no model has any more.
adapter_parameters: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()


class AdapterWeights(nn.Module, BaseTunerLayer):
    """Keeps `base_layer` and the adapters' copies of its own parameters; says which weights a choice of adapters gives.

    One adapter gives the weights W_i; several give W_0 + sum_i (W_i - W_0), summed in the master dtype.
    `model.to(torch.bfloat16)` and its like move the masters but never narrow them.
    """

    adapter_layer_names = ("single_layer_params",)
    other_param_names = ("master_dtypes",)
    base_layer: Any  # an nn.Module
    single_layer_params: Any  # an nn.ModuleDict of stand-ins by adapter name
    made: ClassVar[int] = 0  # how many there have been: it tells when to look for them anew
    active_adapters: Any  # BaseTunerLayer's list of names
    set_adapter: Any  # BaseTunerLayer's method

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SingleLayerConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.single_layer_params = nn.ModuleDict({})
        if next(base_layer.children(), None) is not None:
            # As in the plain model, what the module has itself comes before its children: gradients are clipped by a
            # sum over all parameters, whose last bit depends on their order.
            self._modules["base_layer"] = self._modules.pop("base_layer")
        self.master_dtypes: dict[str, torch.dtype | None] = {}  # the least that an adapter has; None: the base's
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, torch.Tensor] = {}  # W_0 while merged, to restore it bit for bit
        self.switches: dict[int, int] = {}  # how often each thread has switched adapters on or off, or chosen others
        self._active_adapter = adapter_name
        AdapterWeights.made += 1
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
        self.master_dtypes[adapter_name] = master_dtype
        self.single_layer_params[adapter_name] = stand_in(self.base_layer, masters)
        adapter_parameters.update({id(p): p for p in self.masters(adapter_name).values()})
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _own(self) -> list[tuple[str, nn.Parameter]]:
        """The base layer's own parameters, as they are: quantized, partitioned or merged."""
        return list(own_parameters(self.base_layer).items())

    def masters(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters on this module."""
        return own_parameters(self.single_layer_params[adapter_name])

    def _apply(self, fn, recurse=True):  # the seam under nn.Module.to, .half, .cuda, .to_empty, ...
        before = {
            adapter: {n: (p.data, None if p.grad is None else p.grad.data) for n, p in self.masters(adapter).items()}
            for adapter in self.single_layer_params
        }
        super()._apply(fn, recurse)
        self.widen(before)
        return self

    def widen(self, sources: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor | None]]] | None = None) -> None:
        """Bring masters that were narrowed back to the master dtype, with the values of `sources` where given."""
        narrow = [(adapter, least) for adapter, least in list(self.master_dtypes.items()) if least is not None]
        for adapter, least in narrow:
            for name, parameter in self.masters(adapter).items():
                dtype = torch.promote_types(parameter.dtype, least)
                if dtype == parameter.dtype:
                    continue
                if not isinstance(parameter, DTensor) and is_fully_sharded(self.single_layer_params[adapter]):
                    continue  # what FSDP2's MixedPrecisionPolicy gathered; its shards are the masters
                data, grad = sources[adapter][name] if sources else (parameter.data, parameter.grad)
                if data.is_meta:
                    data = parameter.data
                parameter.data = data.to(parameter.device, dtype)
                if grad is not None:
                    parameter.grad = grad.to(parameter.device, dtype)

    def _base_weights(self) -> dict[str, torch.Tensor]:
        """W_0: the base's own parameters, dequantized, also while an adapter is merged into them."""
        return {
            n: self._unmerged[n] if n in self._unmerged else dequantized(self.base_layer, p) for n, p in self._own()
        }

    def _gathered(self, write: bool = False) -> AbstractContextManager[None]:
        """The base's own parameters and the masters ready to be read (`write`: changed) outside a forward pass."""
        modules = [self.base_layer, *self.single_layer_params.values()]
        to_shards(modules)
        return gathered([p for module in modules for p in module.parameters(recurse=False)], write)

    def _weights_of(self, adapters: list[str]) -> dict[str, torch.Tensor]:
        """The weights with `adapters` in effect, in the base's dtypes; empty if none of them is on this module.

        Those of a bitsandbytes module stay in the master dtype: it computes in that of its input.
        """
        masters: list[dict[str, Any]] = [self.masters(name) for name in adapters if name in self.single_layer_params]
        if not masters:
            return {}
        if torch.compiler.is_compiling() or not rounded.keeps() or self._is_shared_out():
            return self._rounded(masters)
        sources = [p for part in (*masters, own_parameters(self.base_layer)) for p in part.values()]
        key = id(self), tuple(adapters)
        weights = rounded.find(key, sources)
        if weights is None:
            weights = self._rounded(masters)
            if any(weights[name] is not master for name, master in masters[0].items()):
                rounded.keep(key, sources, weights)
        return dict(weights)

    def _is_shared_out(self) -> bool:
        """Whether several processes hold the parts of this module's parameters, which are whole for one pass only."""
        return is_fully_sharded(self.base_layer) or any(is_partitioned(p) for _, p in self._own())

    def _rounded(self, masters: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        weights = {}
        origins = self._base_weights() if len(masters) > 1 else {}
        for name, base in self._own():
            weight = masters[0][name]
            if origins:
                origin = origins[name].to(weight.dtype)
                weight = origin + sum(master[name] - origin for master in masters)
            weights[name] = weight.to(base.dtype) if base.is_floating_point() else weight
        return weights

    def combine(self, weights: dict[str, float], into: str) -> None:
        """Set the adapter `into` to W_0 + sum_i weights_i * (W_i - W_0), in float64. One that is elsewhere adds 0."""
        with torch.no_grad(), self._gathered(write=True):
            for name, base in self._base_weights().items():
                origin = base.double()
                total = origin.clone()
                for adapter, weight in weights.items():
                    if adapter in self.single_layer_params:
                        total += weight * (self.masters(adapter)[name].double() - origin)
                self.masters(into)[name].copy_(total)

    def equals_base(self, adapter_name: str) -> bool:
        """Whether the adapter's weights are the base's once rounded to its dtype; False where a process has but a part
        of them, because to ask the others could wait for ever."""
        for name, base in self._base_weights().items():
            master = self.masters(adapter_name)[name]
            if isinstance(master, DTensor) or master.is_meta or base.is_meta or not master.numel():
                return False
            if not torch.equal(master.to(base.device, base.dtype), base):
                return False
        return True

    def to_base_dtype(self, adapter_name: str) -> None:
        """Give up the adapter's master precision: keep it in the base's dtype from now on."""
        self.master_dtypes[adapter_name] = None
        masters = self.masters(adapter_name)
        for name, base in self._base_weights().items():
            masters[name].data = masters[name].data.to(base.dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version also casts to the base's dtype, which would narrow the masters.
        if adapter_name not in self.single_layer_params:
            return
        for name, base in self._own():
            master = self.masters(adapter_name)[name]
            if not master.is_meta:
                master.data = master.data.to(device or base.device)
