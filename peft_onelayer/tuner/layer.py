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
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from . import mixed_batch
from .config import SingleLayerConfig
from .instance import call_with, can_be_copied, own_parameters
from .merging import MergeableWeights
from .quantized import is_bitsandbytes
from .sharding import is_partitioned, refuse_silent_wrap, refuse_unmerging_in_forward
from .writable import WritableCopy


class SingleLayerLayer(MergeableWeights):
    """Runs `base_layer` with the weights of the active adapters in place of its own.

    Weights are rounded to the base's dtype in the forward pass, so gradients reach the masters exactly as they would
    reach the base's weights (those of a weight used several times per pass are summed in the master dtype).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SingleLayerConfig,
        trained: dict[str, torch.Tensor | None] | None = None,
    ) -> None:
        super().__init__(base_layer, adapter_name, config, trained)
        self.switched_off_by: int | None = None  # a thread
        self.rows_of_threads: dict[int, list[str]] = {}  # see `row_adapters`, by the thread's identity
        self.exchanging: dict[str, int] = {}  # see `_alone`
        self._frozen_while_disabled: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """What is not the wrapper's is the base layer's (`in_features`, `eps`, a composite's children, ...)."""
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # the wrapper's own, asked for several times a call
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names stay private: accelerate keeps its hooks under them and deletes them from where it finds
            # them. Without base_layer this is a copy or an unpickling under way.
            if name.startswith("_") or "base_layer" not in modules:
                raise
        value = getattr(self.base_layer, name)
        if inspect.ismethod(value) and value.__self__ is self.base_layer:  # e.g. Gemma 3n calls `altup.predict(...)`
            return functools.partial(self._run, name)
        return self._read(name) if isinstance(value, torch.Tensor) else value

    def __setattr__(self, name: str, value: Any) -> None:
        """What model code keeps on a module (RecurrentGemma sets `rg_lru.recurrent_states`) is the base layer's, and a
        parameter is set where it is in effect."""
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if base is not None and name in own_parameters(base):
            self._write(name, value)
        elif base is not None and name in base.__dict__ and name not in self.__dict__ and not name.startswith("_"):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    # Some model code reads `module.weight` instead of calling the module: it must see the weights in effect.
    @property
    def weight(self) -> torch.Tensor:
        return self._read("weight")

    @property
    def bias(self) -> torch.Tensor | None:
        return self._read("bias")

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Asked of `nn.MultiheadAttention` by `nn.TransformerEncoderLayer`, whose fused path in eval mode would read
        tensors from inside the modules in place of calling them: told no, it calls them."""
        return False

    def _read(self, name: str) -> Any:
        """An own parameter of the base layer, or the weight in effect for it, which can be written."""
        self._unmerge_if_off()
        if not self._in_effect() or name not in dict(self._own()):
            return getattr(self.base_layer, name)
        return self._writable(self._weights_of(self._adapters_in_effect()))[name]

    def _writable(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights in effect such that what is written to them reaches the masters."""
        if torch.compiler.is_compiling():
            return weights
        names = self._names_on_module()
        masters = self.masters(names[0])
        return {
            name: weight
            if name not in masters or weight is masters[name] or isinstance(weight, DTensor)
            else WritableCopy.of(weight, masters[name], functools.partial(self._write, name))
            for name, weight in weights.items()
        }

    def in_effect(self) -> Any:
        """The module that owns the weights in effect: the base layer, or the one adapter's.

        Raises:
            RuntimeError: several adapters are in effect.
        """
        self._unmerge_if_off()
        if not self._in_effect():
            return self.base_layer
        names = self._names_on_module()
        if len(names) > 1:
            raise RuntimeError(
                f"the adapters {', '.join(names)} are in effect together, so it is not clear whose weights are meant; "
                "make one of them active with set_adapter, or write to single_layer_params."
            )
        return self.single_layer_params[names[0]]

    def _write(self, name: str, value: Any, where: torch.Tensor | None = None) -> None:
        """Set what is in effect for the base layer's own parameter `name`.

        Args:
            where: the entries to set, True or False, of the parameter's shape; None: all.

        Raises:
            ValueError: no tensor of the parameter's shape, or another value of an entry that the mask leaves out.
            RuntimeError: several adapters are in effect.
        """
        base, owner = dict(self._own())[name], self.in_effect()
        target = own_parameters(owner).get(name, base)
        positions = {} if owner is self.base_layer else self.positions(self._names_on_module()[0])
        shape = base.shape if name in positions else target.shape
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            given = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"the {name} of a trained {type(self.base_layer).__name__} has shape {tuple(shape)}; {given} was given."
            )
        with torch.no_grad():
            value = value.detach().to(target.device)
            if name in positions:
                self._refuse_writing_beside(name, value, positions[name])
                value = value.flatten()[positions[name]]
                where = None if where is None else where.flatten()[positions[name]]
            shown = target.to(base.dtype) if base.is_floating_point() else target
            same = value.to(shown.dtype) == shown
            if value.dtype != shown.dtype or not same.all():
                value = value.to(target.dtype)
                target.copy_(value if where is None else torch.where(where, value, target))

    def _refuse_writing_beside(self, name: str, value: torch.Tensor, positions: torch.Tensor) -> None:
        """Raise ValueError if `value` has other entries than the base where the mask is False."""
        base = self._base_weights()[name]
        kept = torch.ones(base.numel(), dtype=torch.bool, device=base.device)
        kept[positions] = False
        if not torch.equal(value.to(base.dtype).flatten()[kept], base.flatten()[kept]):
            raise ValueError(
                f"other entries than those that the mask trains were written to the {name} of a trained "
                f"{type(self.base_layer).__name__}: they stay as they are in the base."
            )

    def _names_on_module(self) -> list[str]:
        there = self.single_layer_params
        return [name for name in self._adapters_in_effect() if name in there]

    def _unmerge_if_off(self) -> None:
        """Give the base its own weights back if an adapter is merged while all are switched off."""
        if self.disable_adapters and self.merged:
            refuse_unmerging_in_forward(self.base_layer)
            self.unmerge()

    def _in_effect(self) -> bool:
        """Whether an adapter is: none is while they are switched off or merged."""
        return not self.disable_adapters and not self.merged and bool(self._names_on_module())

    @property
    def row_adapters(self) -> list[str] | None:
        """The adapter of each row of this thread's mixed batch."""
        return self.rows_of_threads.get(threading.get_ident()) if self.rows_of_threads else None

    @row_adapters.setter
    def row_adapters(self, names: list[str] | None) -> None:
        if names is None:
            self.rows_of_threads.pop(threading.get_ident(), None)
        else:
            self.rows_of_threads[threading.get_ident()] = names

    def _adapters_in_effect(self) -> list[str]:
        """The active adapters, or in a mixed batch the one that all of the module's rows take."""
        return self.active_adapters if self.row_adapters is None else mixed_batch.adapter_of_all_rows(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", *args, **kwargs)

    def _run(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the base layer with the weights in effect."""
        if self.row_adapters is not None and len(mixed_batch.rows_by_adapter(self)) > 1:
            return mixed_batch.run_by_adapter(self, method, args, kwargs)
        base = self.base_layer
        self._unmerge_if_off()
        if not self._in_effect():
            return getattr(base, method)(*args, **kwargs)
        own = own_parameters(base)
        refuse_silent_wrap(base, own, list(self.single_layer_params.values()))
        self.widen()  # TRL assigns bfloat16 to the `.data` of what trains when other parts are quantized
        weights = self._weights_of(self._adapters_in_effect())
        if any(parameter.is_meta for parameter in own.values()):
            raise RuntimeError(
                "the trained block's base weights are on the meta device (offloaded to CPU or disk, or never loaded): "
                "its adapter would have no effect; keep that block on the device with device_map, or load the weights."
            )
        if is_bitsandbytes(own.values()):
            return self._dense_linear(weights, *args)
        if method == "__call__" and any(is_partitioned(parameter) for parameter in own.values()):
            # DeepSpeed plans ahead from the modules called and takes it for an error if the same modules want other
            # parameters, as they would with the adapter off (TRL's reference): leave the base layer's hook out.
            method = "forward"
        if torch.compiler.is_compiling():
            return self._exchange(method, weights, args, kwargs)
        if not can_be_copied(base):
            with self._alone():
                return self._exchange(method, weights, args, kwargs)
        given = weights if method in ("__call__", "forward") else self._writable(weights)
        left = dict(given)
        result = call_with(base, method, left, args, kwargs)
        for name, weight in given.items():
            if left[name] is not weight:  # the method has assigned a parameter
                self._write(name, left[name])
        return result

    def _exchange(self, method: str, weights: dict[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a method of the base layer while `weights` stand in place of its parameters: what torch.compile traces,
        and what a `forward` that somebody gave to this one module sees. Other threads would see them too."""
        if method == "__call__":
            return functional_call(self.base_layer, weights, args, kwargs)
        weights = {f"module.{name}": weight for name, weight in weights.items()}
        return functional_call(_Method(self.base_layer, method), weights, args, kwargs)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Raise RuntimeError if another thread is in here."""
        mine = threading.get_ident()
        if self.exchanging.setdefault("thread", mine) != mine:
            raise RuntimeError(
                f"a forward of its own was given to one {type(self.base_layer).__name__} of the trained block, and so "
                "two threads cannot run the model at the same time; run it in one thread, or merge the adapter."
            )
        try:
            yield
        finally:
            self.exchanging.clear()

    def _dense_linear(self, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `x`."""
        bias = weights.get("bias")
        return nn.functional.linear(x, weights["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """See `BaseTunerLayer.set_adapter`; it decides anew what trains, also while the adapters are switched off."""
        before = self.active_adapters
        super().set_adapter(adapter_names, inference_mode)
        self._frozen_while_disabled = []
        if before != self.active_adapters:
            self._count_switch()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off. PEFT's own lets a frozen active adapter train once it is on again."""
        frozen = self._frozen_while_disabled
        if not enabled and not self.disable_adapters:
            frozen = [n for n in self.active_adapters if not self.trains(n)]
        if enabled == self.disable_adapters:
            self._count_switch()
            self.switched_off_by = None if enabled else threading.get_ident()
        super().enable_adapters(enabled)
        if enabled:
            self.set_requires_grad(frozen, False)
        self._frozen_while_disabled = [] if enabled else frozen

    def _count_switch(self) -> None:
        mine = threading.get_ident()
        self.switches[mine] = self.switches.get(mine, 0) + 1

    def trains(self, adapter_name: str) -> bool:
        """Whether the adapter is on this module and has parameters that require gradients."""
        return adapter_name in self.single_layer_params and any(
            parameter.requires_grad for parameter in self.masters(adapter_name).values()
        )

    def __repr__(self) -> str:
        return "single_layer." + super().__repr__()


_tuned: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[SingleLayerLayer]]] = weakref.WeakKeyDictionary()


def tuned_layers(model: nn.Module) -> list[SingleLayerLayer]:
    """The wrapped modules in `model`."""
    if torch.compiler.is_compiling():  # a trace would guard on the models that the cache held then
        return [module for module in model.modules() if isinstance(module, SingleLayerLayer)]
    made, layers = _tuned.get(model, (-1, []))
    if made != SingleLayerLayer.made:
        layers = [module for module in model.modules() if isinstance(module, SingleLayerLayer)]
        _tuned[model] = SingleLayerLayer.made, layers
    return layers


class _Method(nn.Module):
    """Makes a method of `module` callable through `functional_call`, which calls `forward` only."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.name)(*args, **kwargs)
