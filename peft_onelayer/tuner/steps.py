"""Refuses training that cannot change the adapter in effect: silence there would cost a whole run.

A frozen adapter is found in the forward pass, where the pass shows it. Every step of an optimizer is checked in a hook
that torch calls before it. At its first step one of a wrapped model's parameters that it holds must train, and a
gradient must reach them. At every later step what it holds must still be what trains: adapters are switched, frozen,
deleted, loaded over, and models are copied, while the optimizer keeps its parameters. An optimizer of other parameters
belongs to something else. One without any parameters is a trainer's that found nothing to train, if a model makes
training passes and either all of it is frozen or still no optimizer trains it when that one steps again (TRL's
reference passes switch a frozen adapter to training).

A step costs a look at the trained blocks' parameters; the whole model is searched when an optimizer is new.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .buffers import Buffers
from .instance import all_parameters
from .layer import SingleLayerLayer, tuned_layers
from .stack import text_config
from .weights import adapter_parameters


@dataclass
class Watched:
    """What is known of a model that carries adapters.

    Attributes:
        origin: the same for a model and its copies.
        passes: training passes with an adapter in effect, that were not compiled.
        compiled: the ModuleList that holds the blocks of compiled ones, where there were any. They are not counted: a
            number that every pass changes would have every pass traced anew.
        is_trained: an optimizer that has been checked holds what it trains.
        buffers: of the trained blocks, as they were at the first training pass, or if that was compiled at the
            optimizer's first step.
    """

    origin: str
    passes: int = 0
    compiled: str | None = None
    is_trained: bool = False
    buffers: Buffers | None = None

    @property
    def has_passes(self) -> bool:
        return self.passes > 0 or self.compiled is not None


@dataclass
class _Holding:
    """What an optimizer holds of a model, as it was at the optimizer's latest step.

    Attributes:
        parameters: the model's among those that the optimizer holds.
        made_of: how many parameters the optimizer held, and how many wrapped modules there were, when they were found.
        steps: of the optimizer.
        passes: training passes of the model.
        gradients: weak references to the parameters' gradients, and their versions.
        trained_adapter: whether it has held parameters of an adapter in effect.
    """

    parameters: list[nn.Parameter]
    made_of: tuple[int, int]
    steps: int = 0
    passes: int = 0
    gradients: list[tuple[Any, int]] = field(default_factory=list)
    trained_adapter: bool = False


_models: weakref.WeakKeyDictionary[nn.Module, Watched] = weakref.WeakKeyDictionary()
_held: weakref.WeakKeyDictionary[Optimizer, weakref.WeakKeyDictionary[nn.Module, _Holding]]
_held = weakref.WeakKeyDictionary()
_empty: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # have stepped without parameters


def watch(model: nn.Module, origin: str) -> Watched:
    """Check every optimizer that holds parameters of `model` at each of its steps.

    Args:
        origin: a name that the model shares with its copies.

    Returns:
        What is known of it, for `note_training_pass`: a compiled pass that looked for it here would be traced anew when
        another model comes or goes, and could not be traced while one goes.
    """
    _register_hook()
    return _models.setdefault(model, Watched(origin))


@functools.cache
def _register_hook() -> None:
    register_optimizer_step_pre_hook(_before_step)


def note_training_pass(known: Watched, model: nn.Module, stack_name: str) -> None:
    """Count a training pass of a model, if it is one with an adapter in effect.

    Args:
        known: what `watch` returned.
        stack_name: of the ModuleList that holds its blocks.
    """
    if not _in_effect(model):
        return
    if torch.compiler.is_compiling():
        known.compiled = stack_name
        return
    known.passes += 1
    known.buffers = known.buffers or Buffers(model, stack_name)


def _in_effect(model: nn.Module) -> list[SingleLayerLayer]:
    return [layer for layer in tuned_layers(model) if layer._in_effect()]


def _trains(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in all_parameters(model))


def refuse_frozen_adapter(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: a training pass through an adapter in effect, with nothing in the model to train.

    Only where the output cannot feed something that is trained outside: a language model's logits, or a loss.

    Raises:
        RuntimeError: as said, naming the adapter and how to make it train.
    """
    if not model.training or not torch.is_grad_enabled() or kwargs.get("output_hidden_states"):
        return
    if _trains(model):
        return
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in (*args, *kwargs.values())):
        return
    ends_here = text_config(model) is not None and (
        kwargs.get("labels") is not None or model.get_output_embeddings() is not None  # type: ignore[operator]
    )
    if ends_here and (in_effect := _in_effect(model)):
        raise RuntimeError(
            f"the adapter {', '.join(in_effect[0].active_adapters)} is frozen and nothing else in the model trains: "
            "load it with is_trainable=True, or call eval() if no training is meant."
        )


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not given:
        _check_empty(optimizer)
        return
    held = {id(parameter) for parameter in given}
    _refuse_lost_parameters(given)
    holdings = _held.setdefault(optimizer, weakref.WeakKeyDictionary())
    closure = args[1] if len(args) > 1 else kwargs.get("closure")  # would compute the gradients; args[0] is self
    for model, known in list(_models.items()):
        made_of = (len(given), SingleLayerLayer.made)
        holding = holdings.get(model)
        if holding is None or holding.made_of != made_of:
            mine = [p for p in model.parameters() if id(p) in held] if tuned_layers(model) else []
            holding = replace(holding, parameters=mine, made_of=made_of) if holding else _Holding(mine, made_of)
            holdings[model] = holding
        if not holding.parameters:
            continue
        _refuse_frozen_parameters(holding)
        if closure is None:
            if holding.steps == 0:
                _refuse_no_gradient(holding)
            else:
                _refuse_training_a_copy(model, known, holding)
                _refuse_training_another_adapter(model, holding)
        if known.compiled is not None and known.buffers is None:
            known.buffers = Buffers(model, known.compiled)
        if known.buffers is not None:
            known.buffers.refuse_changes(model)
        known.is_trained = True
        holding.steps += 1
        holding.passes = known.passes
        holding.gradients = _gradients(holding)
        holding.trained_adapter |= any(held & ids for ids in _trained_in_effect(model).values())


def _check_empty(optimizer: Optimizer) -> None:
    for model, known in list(_models.items()):
        if known.has_passes and not known.is_trained and (optimizer in _empty or not _trains(model)):
            raise RuntimeError(
                "the optimizer holds no parameters, and no other trains the model that makes training passes with its "
                "adapter: the adapter was frozen when the optimizer was made. To train it, load it with "
                "is_trainable=True."
            )
    _empty.add(optimizer)


def _refuse_lost_parameters(given: list[nn.Parameter]) -> None:
    """Of the adapters' parameters that an optimizer holds, one at least must still be in a model."""
    ours = [parameter for parameter in given if adapter_parameters.get(id(parameter)) is parameter]
    if not ours:
        return
    living = {
        id(parameter)
        for model in list(_models)
        for layer in tuned_layers(model)
        for adapter in layer.single_layer_params
        for parameter in layer.masters(adapter).values()
    }
    if not any(id(parameter) in living for parameter in ours):
        raise RuntimeError(
            f"the optimizer holds {len(ours)} parameters of an adapter that is in no model any more: it was deleted, "
            "merged and unloaded, or loaded anew as other parameters. Make the optimizer afterwards, from the "
            "parameters that require gradients."
        )


def _refuse_frozen_parameters(holding: _Holding) -> None:
    mine = holding.parameters
    if any(parameter.requires_grad for parameter in mine) or (holding.steps and _switched_before_step(holding)):
        return
    raise RuntimeError(
        f"the optimizer holds {len(mine)} parameters of this model, and all of them are frozen: it was made before the "
        "model was wrapped, or another adapter was chosen or this one frozen since. Make it afterwards, from the "
        "parameters that require gradients."
    )


def _refuse_no_gradient(holding: _Holding) -> None:
    trained = [parameter for parameter in holding.parameters if parameter.requires_grad]
    if all(parameter.grad is None for parameter in trained):
        raise RuntimeError(
            f"no gradient has reached any of the {len(trained)} trained parameters of this model: the loss does "
            "not depend on the trained block, or its adapter is merged or switched off."
        )


def _refuse_training_a_copy(model: nn.Module, known: Watched, holding: _Holding) -> None:
    """A copy made passes, the model none, and no gradient has come: not even from the copy, by hand."""
    if known.compiled is not None or known.passes != holding.passes or not _stale(holding):
        return
    for other, copy in list(_models.items()):
        if other is not model and copy.origin == known.origin and copy.has_passes and not copy.is_trained:
            raise RuntimeError(
                "training passes are made with a copy of the model, and the optimizer holds the parameters of the "
                "original; make the optimizer of the copy's parameters."
            )


def _refuse_training_another_adapter(model: nn.Module, holding: _Holding) -> None:
    """An adapter in effect that trains, gets gradients and is in no optimizer, where this optimizer trains another."""
    if not holding.trained_adapter or _switched_before_step(holding):
        return
    held = {id(p) for holdings in list(_held.values()) if model in holdings for p in holdings[model].parameters}
    for name, ids in _trained_in_effect(model, with_gradient=True).items():
        if not ids & held:
            raise RuntimeError(
                f"the adapter {name} is in effect and gets gradients, but no optimizer holds its parameters: they were "
                "made for the adapter before. Make an optimizer from the parameters that require gradients, or freeze "
                f"{name} with set_requires_grad."
            )


def _switched_before_step(holding: _Holding) -> bool:
    """Whether adapters that train in turns were switched between a backward pass and its step."""
    frozen = [parameter for parameter in holding.parameters if not parameter.requires_grad]
    return any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in frozen)


def _trained_in_effect(model: nn.Module, with_gradient: bool = False) -> dict[str, set[int]]:
    """The identities of the parameters that train, by the name of the adapter in effect."""
    found: dict[str, set[int]] = {}
    for layer in _in_effect(model):
        for name in layer.active_adapters:
            for parameter in layer.masters(name).values() if name in layer.single_layer_params else ():
                if parameter.requires_grad and not (with_gradient and parameter.grad is None):
                    found.setdefault(name, set()).add(id(parameter))
    return found


def _gradients(holding: _Holding) -> list[tuple[Any, int]]:
    gradients = [parameter.grad for parameter in holding.parameters]
    return [(None, 0) if gradient is None else (weakref.ref(gradient), gradient._version) for gradient in gradients]


def _stale(holding: _Holding) -> bool:
    """Whether the gradients are those of the latest step, or none."""
    return all(
        parameter.grad is None or (seen is not None and seen() is parameter.grad and version == parameter.grad._version)
        for parameter, (seen, version) in zip(holding.parameters, holding.gradients, strict=True)
    )
