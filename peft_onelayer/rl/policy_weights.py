"""What an inference engine holds of a wrapped model: the plain model's weights by their names, their changes, and their
digests."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peft_onelayer.sparse.names import TRAINED, base_name
from peft_onelayer.tuner.layer import SingleLayerLayer, tuned_layers

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

# Tensors of a checkpoint that vLLM holds as one, in this order along their first dimension.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Entries:
    """New values of some entries of a tensor: the fields of vLLM's `SparseWeightPatch`.

    Attributes:
        name: of the tensor in the plain model, as in its checkpoint.
        indices: flat positions in the tensor, ascending: (n,) int32.
        values: what stands there now, (n,) in the engine's dtype.
        full_shape: of the tensor.
    """

    name: str
    indices: torch.Tensor
    values: torch.Tensor
    full_shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, where: torch.Tensor | None) -> Entries:
        """The entries of `tensor` at the flat positions `where`, (n,) int64; None: all."""
        flat, shape = tensor.flatten(), tuple(tensor.shape)
        if where is None:
            return cls(name, torch.arange(len(flat), dtype=torch.int32, device=flat.device), flat, shape)
        return cls(name, where.to(flat.device, torch.int32), flat[where], shape)

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.values.nbytes


class PolicyWeights:
    """The weights of the plain model that a wrapped model stands for now: those of `merge_and_unload`, by its names.

    Attributes:
        adapters: names of the active adapters.
        changing: names of the tensors that adapters may change: those of the wrapped modules and of `modules_to_save`.
        untied: names of the tensors that are tied in the base to what `modules_to_save` holds apart from them.
    """

    def __init__(self, model: PeftModel) -> None:
        layers = tuned_layers(model)
        self.adapters = tuple(layers[0].names_when_merged())
        own = {id(parameter): (layer, name) for layer in layers for name, parameter in layer._own()}
        left_out, saved = _modules_to_save(model)
        self._owners: dict[str, tuple[nn.Parameter, SingleLayerLayer | None, str]] = {}
        self.changing: list[str] = []
        self.untied: list[str] = []
        seen = set()  # tied parameters have one name
        named = dict(model.named_parameters(remove_duplicate=False))
        replaced = {id(parameter) for name, parameter in named.items() if name.startswith(left_out)}
        for full_name, parameter in named.items():
            if TRAINED in full_name or full_name.startswith(left_out) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            holder = next((kept for kept in saved if full_name.startswith(kept)), None)
            name = base_name(full_name if holder is None else full_name.replace(holder, saved[holder], 1))
            layer, own_name = own.get(id(parameter), (None, ""))
            self._owners[name] = parameter, layer, own_name
            if layer is not None or holder is not None:
                self.changing.append(name)
            elif id(parameter) in replaced:
                self.untied.append(name)
        self._merged: dict[SingleLayerLayer, dict[str, torch.Tensor]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._owners)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._owners[name][0].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor in the base."""
        return self._owners[name][0].dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor in the base's dtype; it may be one that the model keeps."""
        parameter, layer, own_name = self._owners[name]
        if layer is None:
            return parameter.detach()
        if layer not in self._merged:
            with torch.no_grad():
                self._merged[layer] = layer.merged_weights()
        return self._merged[layer][own_name].detach()

    def positions(self, name: str) -> torch.Tensor | None:
        """Where the tensor's entries can differ from the base's under a mask, (n,) int64 ascending; None: anywhere."""
        parameter, layer, own_name = self._owners[name]
        if layer is None:
            return None
        found = [torch.empty(0, dtype=torch.int64, device=parameter.device)]
        for adapter in self.adapters:
            if adapter in layer.single_layer_params and own_name in layer.masters(adapter):
                where = layer.positions(adapter).get(own_name)
                if where is None:
                    return None
                found.append(where)
        return torch.cat(found).unique()


def _modules_to_save(model: nn.Module) -> tuple[tuple[str, ...], dict[str, str]]:
    """How the names of the copies in `modules_to_save` begin: those not in effect, and those in effect with the
    beginning of their name in the plain model."""
    left_out, saved = [], {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ModulesToSaveWrapper):
            copies = {f"{path}.modules_to_save.{name}.": name for name in module.modules_to_save}
            active = [copy for copy, name in copies.items() if name in module.active_adapters]
            every = {f"{path}.original_module.", *copies}
            chosen = active[0] if active else f"{path}.original_module."
            saved[chosen] = f"{path}."
            left_out += sorted(every - {chosen})
    return tuple(left_out), saved


def changed(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The flat positions where two tensors of one shape and dtype have other bits: (n,) int64, ascending."""
    bits = _BITS[new.element_size()]
    return (new.flatten().view(bits) != old.flatten().view(bits)).nonzero().squeeze(1)


def digest(parts: Iterable[torch.Tensor]) -> str:
    """SHA-256 of tensors' bytes, one after the other, as a hexadecimal string."""
    found = hashlib.sha256()
    for tensor in parts:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def held_as(name: str, held: Collection[str]) -> tuple[str, list[str]] | None:
    """Under which of the names `held` an engine has a tensor, and the names of all tensors that stand there in order;
    None: under none.

    >>> held_as("model.layers.3.mlp.up_proj.weight", ["model.layers.3.mlp.gate_up_proj.weight"])[1]
    ['model.layers.3.mlp.gate_proj.weight', 'model.layers.3.mlp.up_proj.weight']
    """
    if name in held:
        return name, [name]
    for fused, parts in FUSED.items():
        for part in parts:
            whole = name.replace(f".{part}.", f".{fused}.")
            if whole != name and whole in held:
                return whole, [name.replace(f".{part}.", f".{other}.") for other in parts]
    return None
