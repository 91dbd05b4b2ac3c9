"""Refuses, at the first step, training that cannot change the adapter: silence there would cost a whole run.

A frozen adapter is found in the first forward pass, where the pass shows it. An optimizer is checked once, in a hook
that torch calls before every optimizer's step: whether one of a wrapped model's parameters that it holds trains, and
whether a gradient reaches them. An optimizer of other parameters belongs to something else. One without any parameters
is a trainer's that found nothing to train, if a model makes training passes and either all of it is frozen or still no
optimizer trains it when that one steps again (TRL's reference passes switch a frozen adapter to training).
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .instance import all_parameters
from .layer import SingleLayerLayer
from .stack import text_config

_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that carry adapters
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_empty: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # have stepped without parameters
_passed: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # made a training pass with an adapter in effect
_trained: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # a checked optimizer holds what they train


def watch(model: nn.Module) -> None:
    """Check every optimizer that holds parameters of `model` before its first step."""
    _register_hook()
    _watched.add(model)


@functools.cache
def _register_hook() -> None:
    register_optimizer_step_pre_hook(_before_step)


def note_training_pass(model: nn.Module) -> None:
    """Remember a model that makes a training pass with an adapter in effect, until an optimizer trains it."""
    if model not in _passed and model not in _trained and _in_effect(model):
        _passed.add(model)


def _in_effect(model: nn.Module) -> list[SingleLayerLayer]:
    return [m for m in model.modules() if isinstance(m, SingleLayerLayer) and m._in_effect()]


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
    if optimizer in _checked:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not held:
        if any(optimizer in _empty or not _trains(model) for model in _passed - _trained):
            raise RuntimeError(
                "the optimizer holds no parameters, and no other trains the model that makes training passes with its "
                "adapter: the adapter was frozen when the optimizer was made. To train it, load it with "
                "is_trainable=True."
            )
        _empty.add(optimizer)
        return
    for model in list(_watched):
        mine = [parameter for parameter in model.parameters() if id(parameter) in held]
        if not mine or not any(isinstance(module, SingleLayerLayer) for module in model.modules()):
            continue
        trained = [parameter for parameter in mine if parameter.requires_grad]
        if not trained:
            raise RuntimeError(
                f"the optimizer holds {len(mine)} parameters of this model, and all of them are frozen: it was made "
                "before the model was wrapped or the adapter chosen. Make it afterwards, from the parameters that "
                "require gradients."
            )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # would compute the gradients; args[0] is self
        if closure is None and all(parameter.grad is None for parameter in trained):
            raise RuntimeError(
                f"no gradient has reached any of the {len(trained)} trained parameters of this model: the loss does "
                "not depend on the trained block, or its adapter is merged or switched off."
            )
        _trained.add(model)
    _checked.add(optimizer)
