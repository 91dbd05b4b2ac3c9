"""The weights of one module of the trained block: the base's own (W_0), and a trainable copy (W_i) per adapter.

The copy is whole, or under a mask one flat parameter with the entries that train; a buffer of positions beside it says
which they are.
"""

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
from .mask import scatter
from .quantized import dequantized, is_bitsandbytes
from .sharding import gathered, is_fully_sharded, is_partitioned, refuse_new_adapter, to_shards

POSITIONS = "_positions"  # ends the name of the buffer of a flat master's positions
INITIALIZED = "_is_hf_initialized"  # transformers: `PreTrainedModel._init_weights` leaves such a tensor alone


def stand_in(base_layer: nn.Module, masters: dict[str, nn.Parameter], positions: dict[str, torch.Tensor]) -> nn.Module:
    """A module of the base layer's own class and settings that owns `masters`, with no children or hooks, and no
    buffers but the `positions` of flat masters.

    It is never called. It is there for whoever decides by a parameter's owner: transformers' Trainer decays no weight
    of an `nn.LayerNorm`, GaLore projects those of an `nn.Linear`. In place of a bitsandbytes module it is an
    `nn.Linear`.
    """
    kind = nn.Linear if is_bitsandbytes(own_parameters(base_layer).values()) else type(base_layer)
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
    for name, where in positions.items():
        module.register_buffer(name + POSITIONS, where, persistent=False)
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

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SingleLayerConfig,
        trained: dict[str, torch.Tensor | None] | None = None,
    ) -> None:
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
        self.update_layer(adapter_name, config, trained)

    def update_layer(
        self, adapter_name: str, config: SingleLayerConfig, trained: dict[str, torch.Tensor | None] | None = None
    ) -> None:
        """Add the adapter `adapter_name`: a copy of the base's own parameters in the master dtype.

        Args:
            adapter_name: its name.
            config: its configuration.
            trained: which of the own parameters it has, by name, with the flat positions of the entries that train;
                None in place of positions for a whole one. Default: all of them, whole.
        """
        refuse_new_adapter(self.base_layer)
        master_dtype = torch.float32 if config.master_dtype == "float32" else None
        masters, positions = {}, {}
        with gathered(p for _, p in self._own()):
            for name, weight in self._base_weights().items():
                if trained is not None and name not in trained:
                    continue
                where = None if trained is None else trained[name]
                if where is not None:
                    positions[name] = where if weight.is_meta else where.to(weight.device)
                    weight = weight.new_empty(len(where)) if weight.is_meta else weight.flatten()[positions[name]]
                dtype = weight.dtype if master_dtype is None else torch.promote_types(weight.dtype, master_dtype)
                master = weight.detach().to(dtype, copy=True)
                if not config.init_weights and not master.is_meta:
                    master += 0.1 * torch.randn_like(master)
                masters[name] = nn.Parameter(master)
        self.master_dtypes[adapter_name] = master_dtype
        self.single_layer_params[adapter_name] = stand_in(self.base_layer, masters, positions)
        adapter_parameters.update({id(p): p for p in self.masters(adapter_name).values()})
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _own(self) -> list[tuple[str, nn.Parameter]]:
        """The base layer's own parameters, as they are: quantized, partitioned or merged."""
        return list(own_parameters(self.base_layer).items())

    def masters(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters on this module."""
        return own_parameters(self.single_layer_params[adapter_name])

    def positions(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """Of the adapter's flat masters, by name: the positions of their entries in the base's tensor, (n,) int64."""
        buffers = self.single_layer_params[adapter_name]._buffers.items()
        return {name.removesuffix(POSITIONS): b for name, b in buffers if name.endswith(POSITIONS) and b is not None}

    def flatten_master(self, adapter_name: str, name: str, where: torch.Tensor) -> None:
        """Keep of a whole master the entries at the flat positions `where`."""
        master = self.masters(adapter_name)[name]
        values = master.data.flatten()
        master.data = values.new_empty(len(where)) if master.is_meta else values[where.to(values.device)]
        device = self.base_layer._parameters[name].device if master.is_meta else master.device
        where = where if device.type == "meta" else where.to(device)
        self.single_layer_params[adapter_name].register_buffer(name + POSITIONS, where, persistent=False)

    def whole(self, adapter_name: str, name: str, origin: torch.Tensor, dtype: torch.dtype | None = None) -> Any:
        """The adapter's weight in place of the base's own parameter `name`, in its whole shape.

        Args:
            adapter_name: one that is on this module.
            name: of the parameter, which the adapter may not have.
            origin: the base's values.
            dtype: of the result; default, that of the master, or where there is none of `origin`.

        Raises:
            RuntimeError: the entries that train stand in a tensor of which this process has but a part.
        """
        master = self.masters(adapter_name).get(name)
        if master is None:
            return origin.detach().to(dtype or origin.dtype)
        dtype = dtype or master.dtype
        where = self.positions(adapter_name).get(name)
        if where is not None and (isinstance(origin, DTensor) or (is_partitioned(origin) and not origin.numel())):
            raise RuntimeError(
                "the entries that the mask trains stand in a tensor of which each process has a part (DeepSpeed "
                "ZeRO-3, or FSDP2 outside of a forward pass); use ZeRO-2 or DDP, or save the adapter and merge "
                "its files."
            )
        return master.to(dtype) if where is None else scatter(origin.to(dtype), where, master.to(dtype))

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
        for adapter, part in list(self.single_layer_params.items()):  # another thread may be adding one or deleting it
            if (least := self.master_dtypes.get(adapter)) is None:
                continue
            for name, parameter in own_parameters(part).items():
                dtype = torch.promote_types(parameter.dtype, least)
                if dtype == parameter.dtype:
                    continue
                if not isinstance(parameter, DTensor) and is_fully_sharded(part):
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
        adapters = [name for name in adapters if name in self.single_layer_params]
        if not adapters:
            return {}
        if torch.compiler.is_compiling() or not rounded.keeps() or self._is_shared_out():
            return self._rounded(adapters)
        masters = [self.masters(name) for name in adapters]
        sources: list[torch.Tensor] = [p for part in (*masters, own_parameters(self.base_layer)) for p in part.values()]
        key = id(self), tuple(adapters)
        weights = rounded.find(key, sources)
        if weights is None:
            weights = self._rounded(adapters)
            if any(weights[name] is not master for name, master in masters[0].items()):
                rounded.keep(key, sources, weights)
        return dict(weights)

    def _is_shared_out(self) -> bool:
        """Whether several processes hold the parts of this module's parameters, which are whole for one pass only."""
        return is_fully_sharded(self.base_layer) or any(is_partitioned(p) for _, p in self._own())

    def _rounded(self, adapters: list[str]) -> dict[str, torch.Tensor]:
        weights, own = {}, self._own()
        masters: dict[str, Any] = self.masters(adapters[0])
        masked = any(len(self.masters(a)) < len(own) or self.positions(a) for a in adapters)
        origins = self._base_weights() if len(adapters) > 1 or masked else {}
        for name, base in own:
            dtype = base.dtype if base.is_floating_point() else None
            if not origins:
                weights[name] = masters[name] if dtype is None else masters[name].to(dtype)
            elif len(adapters) == 1:
                weights[name] = self.whole(adapters[0], name, origins[name], dtype)
            else:
                found = [self.masters(adapter).get(name) for adapter in adapters]
                master = next((m.dtype for m in found if m is not None), origins[name].dtype)
                origin = origins[name].to(master)
                weight = origin + sum(self.whole(adapter, name, origin) - origin for adapter in adapters)
                weights[name] = weight if dtype is None else weight.to(dtype)
        return weights

    def combine(self, weights: dict[str, float], into: str) -> None:
        """Set the adapter `into` to W_0 + sum_i weights_i * (W_i - W_0), in float64. One that is elsewhere adds 0."""
        with torch.no_grad(), self._gathered(write=True):
            for name, base in self._base_weights().items():
                origin = base.double()
                total = origin.clone()
                for adapter, weight in weights.items():
                    if adapter in self.single_layer_params:
                        total += weight * (self.whole(adapter, name, origin).double() - origin)
                self.masters(into)[name].copy_(total)

    def equals_base(self, adapter_name: str) -> bool:
        """Whether the adapter's weights are the base's once rounded to its dtype; False where a process has but a part
        of them, because to ask the others could wait for ever."""
        origins, positions = self._base_weights(), self.positions(adapter_name)
        for name, master in self.masters(adapter_name).items():
            base = origins[name]
            if isinstance(master, DTensor) or master.is_meta or base.is_meta or not master.numel():
                return False
            if name in positions:
                base = base.flatten()[positions[name]]
            if not torch.equal(master.to(base.device, base.dtype), base):
                return False
        return True

    def to_base_dtype(self, adapter_name: str) -> None:
        """Give up the adapter's master precision: keep it in the base's dtype from now on."""
        self.master_dtypes[adapter_name] = None
        origins = self._base_weights()
        for name, master in self.masters(adapter_name).items():
            master.data = master.data.to(origins[name].dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version also casts to the base's dtype, which would narrow the masters.
        if adapter_name not in self.single_layer_params:
            return
        own, holder = dict(self._own()), self.single_layer_params[adapter_name]
        for name, master in self.masters(adapter_name).items():
            if not master.is_meta:
                master.data = master.data.to(device or own[name].device)
        for name, where in self.positions(adapter_name).items():
            if (device or own[name].device).type != "meta":
                holder._buffers[name + POSITIONS] = where.to(device or own[name].device)
