"""A module with other parameters in place of its own, and nothing written to the module.

Several threads may run one model at once, so a forward pass must not exchange the parameters that the module keeps
(`torch.func.functional_call` does). A shallow copy of the module holds them for one call instead.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from torch.nn.modules.rnn import RNNBase

PATCHED = ("forward", "_old_forward", "_hf_hook")  # accelerate's `add_hook_to_module` sets these on a module
_MISSING = object()


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters registered on `module` itself, each once.

    A replica of `nn.DataParallel` has them as plain attributes, and lists them in `_former_parameters`.
    """
    if former := vars(module).get("_former_parameters"):
        return dict(former)
    # As `named_parameters(recurse=False)` has it, in a fifth of the time: a forward pass asks several times a module.
    found = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    if len(found) > 1 and len({*map(id, found.values())}) < len(found):
        first = {id(parameter): name for name, parameter in reversed(found.items())}
        return {name: parameter for name, parameter in found.items() if first[id(parameter)] == name}
    return found


def all_modules(module: nn.Module, but: nn.Module | None = None) -> list[nn.Module]:
    """`module` and all within, each once: `modules()` without names and in another order, in a tenth of the time, for
    what looks through a model in every pass. Without what is in `but` alone."""
    if torch.compiler.is_compiling() and but is None:
        return list(module.modules())
    found, seen = [module], {id(module), id(but)}
    for each in found:  # which grows
        for child in list(each._modules.values()):  # at once: another thread may be adding an adapter
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def all_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of `module` and of all within, also of a replica, which hides them from `parameters()`."""
    return list(module.parameters()) if torch.compiler.is_compiling() else parameters_of(all_modules(module))


def parameters_of(modules: list[nn.Module]) -> list[nn.Parameter]:
    """The parameters registered on the modules themselves, each once; also those of replicas."""
    own = own_parameters if "_former_parameters" in vars(modules[0]) else _registered
    return list({id(p): p for module in modules for p in own(module).values() if p is not None}.values())


def _registered(module: nn.Module) -> dict[str, nn.Parameter | None]:
    return module._parameters


def rebound(value: Any, module: nn.Module, other: nn.Module) -> Any:
    """`value`, an attribute of `module`, as `other` would have it: a bound method or a partial is made anew."""
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, other)
    if isinstance(value, functools.partial) and any(arg is module for arg in value.args):
        args = [other if arg is module else arg for arg in value.args]
        return functools.partial(rebound(value.func, module, other), *args, **value.keywords)
    return value


def can_be_copied(module: nn.Module) -> bool:
    """Whether a shallow copy of `module` runs with the copy's parameters: not where somebody gave this one object a
    `forward` that refers to the module in a way that cannot be seen."""
    forward = vars(module).get("forward")
    return forward is None or rebound(forward, module, nn.Module()) is not forward


def call_with(module: nn.Module, method: str, weights: dict[str, torch.Tensor], args: tuple, kwargs: dict) -> Any:
    """Call a method of `module` with `weights` as its own parameters.

    Children, buffers and hooks are the module's; what the method sets on `self` is set on the module.

    Args:
        weights: one for each of `own_parameters(module)`; a method that assigns a parameter puts it here.
    """
    own = vars(module)
    instance = object.__new__(type(module))
    state = vars(instance)
    state.update(own)
    for name, value in own.items():
        if isinstance(value, (types.MethodType, functools.partial)):
            state[name] = rebound(value, module, instance)
    state["_parameters"] = {name: weights.get(name) for name in module._parameters}
    if "_former_parameters" in own:
        state.update(weights)
    if isinstance(module, RNNBase):
        state["_flat_weights"] = [weights[name] for name in module._flat_weights_names]
    given = dict(state)
    try:
        return getattr(instance, method)(*args, **kwargs)
    finally:
        if [*map(id, state.values())] != [*map(id, given.values())] or state.keys() != given.keys():
            own.update({name: v for name, v in state.items() if v is not given.get(name, _MISSING)})
        for name in weights:
            weights[name] = state["_parameters"].get(name, weights[name])
