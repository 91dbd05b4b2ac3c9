"""Cuts the autograd graph below the trained block, so that nothing is kept for, or run back through, frozen blocks.

Trainers mark the embeddings' output as requiring grad (`enable_input_require_grads`) so that adapters work with
gradient checkpointing. Every block below the trained one then joins the graph, only to compute a gradient of the frozen
embeddings that nobody reads. Hooks on the blocks drop it:

- up to the first trained block, what a block is given is detached;
- a trained block under reentrant checkpointing gets hidden states that require grad, because
  `torch.utils.checkpoint` with use_reentrant=True gives no gradients at all when no tensor argument requires one;
- a frozen block whose input needs no gradient is run without checkpointing: there is nothing to recompute.

A hook on a checkpointed block runs inside what is checkpointed before transformers 5.23, and outside from there. The
cut has to be outside, where it is made once, so a checkpointed block makes it where it calls its checkpointing
function (`transformers.modeling_layers.GradientCheckpointingLayer`).
"""

from __future__ import annotations

import functools
import inspect
import threading
import uuid
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .head import spare_head_copies
from .instance import all_modules, all_parameters
from .layer import SingleLayerLayer
from .sharding import refuse_unmerging_in_forward
from .stack import DecoderStack, text_config
from .steps import Watched, note_training_pass, refuse_frozen_adapter, watch
from .threads import RunningPasses

HEAD_NAMES = {*SEQ_CLS_HEAD_NAMES, "lm_head", "embed_out", "qa_outputs", "v_head"}  # modules that run after the blocks
COMPILED = 0  # in place of a thread; there from the beginning, since a key that comes would have a graph traced anew


@dataclass
class _Pass:
    """One thread's pass through the blocks; HRM and ALBERT run the same ones several times."""

    caller_wants_input_gradients: bool
    nothing_trained_yet: bool = True


class GraphCut:
    """The hooks of one model.

    The model holds its hooks, and they refer to it weakly, so that it is freed with its last user. A copy or a pickle
    of the model holds hooks of its own, which refer to the copy.
    """

    def __init__(self, model: nn.Module, stack: DecoderStack) -> None:
        self._model = weakref.ref(model)
        self.stack_name = stack.name
        self.origin = uuid.uuid4().hex  # a copy of the model has the same
        self.known: Watched | None = watch(model, self.origin)
        self.embeds = text_config(model) is not None  # a plain module is given what enters the blocks
        self.passes = {COMPILED: _Pass(False)}  # the latest one of each thread
        self.running = RunningPasses()
        self.handles = [
            model.register_forward_pre_hook(refuse_frozen_adapter, with_kwargs=True),
            model.register_forward_pre_hook(self.running.begin, with_kwargs=True),
            model.register_forward_hook(self.running.end, with_kwargs=True, always_call=True),
            _entry(model, stack).register_forward_pre_hook(self._enter, with_kwargs=True),
        ]
        for block in stack.blocks:
            self.handles.append(block.register_forward_pre_hook(self._before_block, with_kwargs=True))
        self.handles += spare_head_copies(model)

    @property
    def model(self) -> nn.Module | None:
        """The model; None where but a part of it has been kept."""
        return self._model()

    def __getstate__(self) -> dict[str, Any]:
        living = [handle for handle in self.handles if handle.hooks_dict_ref() is not None]  # others cannot be copied
        return {
            **vars(self),
            "_model": self.model,
            "known": None,
            "handles": living,
            "passes": {COMPILED: _Pass(False)},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]
        vars(self).update(state, _model=(lambda: None) if model is None else weakref.ref(model))
        self.known = None if model is None else watch(model, self.origin)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        modules: Iterable[Any] = self.model.modules() if self.model is not None else ()
        for module in modules:
            if _is_taken_over(vars(module).get("_gradient_checkpointing_func")):
                module._gradient_checkpointing_func = module._gradient_checkpointing_func.args[0]

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            inside = all_modules(module)
            _unmerge_what_trains(inside)
            if self.model is not None and self.known is not None:
                note_training_pass(self.known, self.model, self.stack_name)
            self._take_over_checkpointing(inside)
        # A plain module embeds nothing: whatever it is given may be what the caller wants gradients for.
        given = [kwargs.get("inputs_embeds")] if self.embeds else [*args, *kwargs.values()]
        self.passes[_thread()] = _Pass(any(map(_needs_gradient, given)))

    def _take_over_checkpointing(self, modules: Iterable[Any]) -> None:
        """Have the checkpointed blocks among `modules` call `_checkpoint` in place of what transformers gave them."""
        for block in modules:
            if _checkpoints(block) and self in installed_graph_cuts(block):
                checkpoint = block._gradient_checkpointing_func  # read once: another thread may be here too
                if not _is_taken_over(checkpoint):
                    block._gradient_checkpointing_func = functools.partial(self._checkpoint, checkpoint)

    def _before_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        return None if _checkpoints(block) else self._cut(block, args, kwargs)

    def _checkpoint(self, checkpoint: Any, run: functools.partial, *args: Any) -> Any:
        """Checkpoint `run`, a partial of the block with its keyword arguments, by transformers' `checkpoint`."""
        function: Any = run.func
        block = run.args[0] if run.args else function.__self__  # before transformers 5.23 a bound method
        args, kwargs = self._cut(block, args, run.keywords)
        run = functools.partial(run.func, *run.args, **kwargs)
        if torch.is_grad_enabled() and not any(map(_needs_gradient, args)):
            if not any(map(_needs_gradient, (*kwargs.values(), *all_parameters(block)))):
                return run(*args)
            if args and checkpoint.keywords.get("use_reentrant", True) and not torch.compiler.is_compiling():
                args = (args[0].detach().requires_grad_(), *args[1:])  # compiled, both kinds are the same
        return checkpoint(run, *args)

    def _cut(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What a block is given, detached up to the first trained one."""
        run = self.passes.get(_thread())
        if not torch.is_grad_enabled() or run is None or not run.nothing_trained_yet:
            return args, kwargs
        # Every tensor: some models hand the embeddings to later blocks too (Gemma 3n's per-layer inputs).
        if any(map(_needs_gradient, (*args, *kwargs.values()))) and self._cut_is_free(run):
            args, kwargs = tuple(map(_detached, args)), {name: _detached(value) for name, value in kwargs.items()}
        run.nothing_trained_yet = not any(p.requires_grad for p in all_parameters(block))
        return args, kwargs

    def _cut_is_free(self, run: _Pass) -> bool:
        """Whether nothing that feeds the first block needs a gradient while an adapter trains."""
        model = self.model
        if model is None or run.caller_wants_input_gradients:
            return False
        blocks = model.get_submodule(self.stack_name)
        if any(p.requires_grad for p in _parameters_before(blocks, model)):
            return False
        tuned = (m for m in all_modules(blocks) if isinstance(m, SingleLayerLayer))
        return any(p.requires_grad for m in tuned for p in all_parameters(m))


def _entry(model: nn.Module, stack: DecoderStack) -> nn.Module:
    """Where a caller's own embeddings enter: the innermost module around the blocks that takes `inputs_embeds`.

    A multimodal model passes mixed embeddings on to its decoder, so there it is the whole model.
    """
    config, name = text_config(model), stack.owner
    if config is not None:
        takes_embeds = [n for n in _with_parents(name) if "inputs_embeds" in _parameter_names(model, n)]
        name = takes_embeds[0] if takes_embeds and config is model.config else ""
    return model.get_submodule(name)


def _unmerge_what_trains(modules: Iterable[nn.Module]) -> None:
    """Undo a merge that an exception left behind: TRL merges for a push to vLLM and does not unmerge when the push
    fails, and training a merged adapter would change nothing."""
    merged = [m for m in modules if isinstance(m, SingleLayerLayer) and m.merged]
    if any(layer.trains(name) for layer in merged for name in layer.active_adapters):
        warnings.warn("the adapter was merged while it trains; unmerging it first.", stacklevel=2)
        for layer in merged:
            refuse_unmerging_in_forward(layer.base_layer)
            layer.unmerge()


def _parameters_before(blocks: nn.Module, module: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters but those of the blocks and heads (and a few that run later; counting them is only slower)."""
    yield from module.parameters(recurse=False)
    for name, child in module.named_children():
        if child is not blocks and name not in HEAD_NAMES:
            yield from _parameters_before(blocks, child)


def _checkpoints(module: nn.Module) -> bool:
    """Whether a block runs itself through its `_gradient_checkpointing_func`."""
    return isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and module.training


def _is_taken_over(checkpoint: Any) -> bool:
    return getattr(getattr(checkpoint, "func", None), "__func__", None) is GraphCut._checkpoint


def _thread() -> int:
    """The thread's identity; a compiled graph has no use for it."""
    return COMPILED if torch.compiler.is_compiling() else threading.get_ident()


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _detached(value: Any) -> Any:
    return value.detach() if _needs_gradient(value) else value


def _with_parents(name: str) -> list[str]:
    """The dotted names that enclose `name`, innermost first: "a.b", "a", ""."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _parameter_names(model: nn.Module, name: str) -> set[str]:
    return set(inspect.signature(model.get_submodule(name).forward).parameters)


def installed_graph_cuts(model: nn.Module) -> list[GraphCut]:
    """The cuts on `model`, found through their hooks: a bare model with an injected adapter has no tuner."""
    owners = (getattr(hook, "__self__", None) for m in model.modules() for hook in m._forward_pre_hooks.values())
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, GraphCut)))


def installed_graph_cut(stack: DecoderStack) -> GraphCut | None:
    """The cut that sits on `stack`."""
    return next(iter(installed_graph_cuts(stack.blocks[0])), None)
