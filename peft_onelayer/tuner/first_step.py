"""Refuses, at the first step, training that cannot change the adapter: silence there would cost a whole run.

A frozen adapter is found in the first forward pass. An optimizer that holds parameters of a wrapped model is checked
once, in a hook that torch calls before every optimizer's step: whether one of the parameters trains, and whether a
gradient reaches them. An optimizer that holds none of them may well belong to something else.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .layer import SingleLayerLayer
from .stack import text_config

_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that carry adapters
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def watch(model: nn.Module) -> None:
    """Check every optimizer that holds parameters of `model` before its first step."""
    _register_hook()
    _watched.add(model)


@functools.cache
def _register_hook() -> None:
    register_optimizer_step_pre_hook(_before_step)


def refuse_frozen_adapter(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: a training pass through an adapter in effect, with nothing in the model to train.

    Only where the output cannot feed something that is trained outside: a language model's logits, or a loss.

    Raises:
        RuntimeError: as said, naming the adapter and how to make it train.
    """
    if not model.training or not torch.is_grad_enabled() or kwargs.get("output_hidden_states"):
        return
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in (*args, *kwargs.values())):
        return
    ends_here = text_config(model) is not None and (
        kwargs.get("labels") is not None or model.get_output_embeddings() is not None  # type: ignore[operator]
    )
    in_effect = [m for m in model.modules() if isinstance(m, SingleLayerLayer) and m._in_effect()]
    if ends_here and in_effect:
        raise RuntimeError(
            f"the adapter {', '.join(in_effect[0].active_adapters)} is frozen and nothing else in the model trains: "
            "load it with is_trainable=True, or call eval() if no training is meant."
        )


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    if optimizer in _checked:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
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
    _checked.add(optimizer)
