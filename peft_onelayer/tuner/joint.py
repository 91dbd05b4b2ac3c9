"""Passes of several models that share a base and each have a block of their own, run as one pass.

Below its block a model is the base, so equal rows of several models are one row there. From its block on a model's rows
are its own: they go through its block, and with the rows of the others through the base's blocks above. With gradients,
rows below their model's block run without. Every row gets the numbers of another batching, and may differ by its
rounding.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .layer import SingleLayerLayer
from .mixed_batch import entries_of_a_row, take_rows
from .pass_inputs import PassInputs
from .prompts import decoder_of, is_fresh
from .stack import find_decoder_stack


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose modules are its own and whose parameters and buffers are the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def without_frozen_blocks(model: PeftModel) -> Callable[[], AbstractContextManager[None]]:
    """Put stand-ins, which hold one weight, in place of the blocks that no adapter is on.

    For a model whose passes are joint ones. A trainer walks through all modules of its model in every step, which takes
    longer than the rest of what it does.

    Returns:
        Within what it returns, the model has its blocks.
    """
    blocks: Any = find_decoder_stack(model.get_base_model()).blocks
    whole = dict(blocks._modules)
    light = {
        name: block if any(isinstance(m, SingleLayerLayer) for m in block.modules()) else _StandIn(block)
        for name, block in whole.items()
    }
    blocks._modules.update(light)

    @contextmanager
    def with_blocks() -> Iterator[None]:
        blocks._modules.update({name: block.train(blocks.training) for name, block in whole.items()})
        try:
            yield
        finally:
            blocks._modules.update(light)

    return with_blocks


class _StandIn(nn.Module):
    """What is left of a frozen block in a model whose passes are run elsewhere."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.weight = next(block.parameters())


@dataclass(eq=False)
class JointPass:
    """One model's part of a pass.

    Attributes:
        name: of the model, as `JointDecoder.add` has it.
        inputs: what its decoder is given but for the cache, which `pass_inputs` leaves out.
        cache: its own, which the pass adds to; None for none.
        width: how many positions are its own; those behind are padding. None for all.
        output: behind the pass, (B, T, H): a leaf, whose gradient `JointDecoder.backward` takes further.
    """

    name: str
    inputs: PassInputs
    cache: DynamicCache | None = None
    width: int | None = None
    output: torch.Tensor | None = None
    joined: torch.Tensor | None = None  # the same rows in the graph of the joint pass

    @property
    def signature(self) -> Hashable:
        """What passes must have in common to be run as one."""
        return self.inputs.rest, self.inputs.by_row, None if self.cache is None else self.cache.get_seq_length()

    @property
    def begins(self) -> bool:
        """Whether nothing is in a cache yet, so that equal rows have equal states."""
        return self.cache is None or is_fresh(self.cache)


@dataclass(frozen=True)
class _Level:
    """The batch of one block: frozen rows, which are below their models' blocks, then the rows of single models.

    Attributes:
        size: how many rows.
        frozen: how many of them come first that are frozen.
        frozen_of: where in the frozen rows those of each pass are that is still below its block.
        take: the rows of the batch before, and behind them of the kept states that join, of which this one consists;
            None for the batch before as it is.
        origin: for each row, its place among the rows that the decoder is given; None for these, in their order.
        segments: for each pass that has joined, its first row and the one behind its last.
        joining: passes whose rows leave the frozen ones at this block.
    """

    size: int
    frozen: int
    frozen_of: dict[int, torch.Tensor | slice]
    take: torch.Tensor | None
    origin: torch.Tensor | None
    segments: dict[int, tuple[int, int]]
    joining: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    """How the rows of several passes go through the blocks.

    Attributes:
        chosen: the rows that the decoder is given, of those of all passes one after another; None for all.
        levels: one for each block.
    """

    chosen: torch.Tensor | None
    levels: tuple[_Level, ...]


class JointDecoder:
    """The decoder of a base, whose passes hold rows of several models."""

    def __init__(self, base: PreTrainedModel) -> None:
        """
        Args:
            base: not wrapped; stays as it is.

        Raises:
            ValueError: the base has no one stack of blocks.
        """
        model = sharing_weights(base).eval()
        self.blocks: Any = find_decoder_stack(model).blocks
        self.model, self.decoder = model, decoder_of(model)
        for index, block in enumerate(self.blocks):
            block.forward = functools.partial(self._run_block, index, block.forward)
        self.depths: dict[str, int] = {}
        self._kept: dict[str, dict[Hashable, tuple[torch.Tensor, int]]] = {}
        self._plans: dict[Hashable, _Plan] = {}  # of rows that all differ, by names and sizes
        self._passes: list[JointPass] = []
        self._plan = _Plan(None, ())
        self._states: list[torch.Tensor | None] = []  # of each pass, what was kept
        self.segments: list[tuple[str, int, int]] = []  # of the call of a block under way
        self.rows = 0  # of that call
        self.states: Sequence[int] = ()  # the shape of what it was given
        self.size = 0  # rows that the decoder was given
        self._last: tuple[DynamicCache, list[tuple[DynamicCache, torch.Tensor]]] | None = None

    def add(self, name: str, model: nn.Module) -> None:
        """Let passes hold rows of `model`: one wrapped with `SingleLayerConfig`, or the base as it is."""
        blocks = find_decoder_stack(model.get_base_model() if isinstance(model, PeftModel) else model).blocks
        wrapped = {path: m for path, m in blocks.named_modules() if isinstance(m, SingleLayerLayer)}
        self.depths[name] = min((int(path.partition(".")[0]) for path in wrapped), default=len(blocks))
        self._kept[name] = {}
        for path, layer in wrapped.items():
            parent, _, attribute = path.replace(".base_layer", "").rpartition(".")
            owner = self.blocks.get_submodule(parent)
            if isinstance(owner, _ByModel):
                owner = owner.base_layer
            if not isinstance(getattr(owner, attribute), _ByModel):
                setattr(owner, attribute, _ByModel(getattr(owner, attribute), self))
            getattr(owner, attribute).of_models[name] = layer

    def remove(self, name: str) -> None:
        """Forget a model."""
        self.depths.pop(name, None)
        self._kept.pop(name, None)
        self._plans.clear()
        self._last = None
        for module in self.blocks.modules():
            if isinstance(module, _ByModel):
                module.of_models.pop(name, None)

    def run(self, passes: Sequence[JointPass]) -> None:
        """Run passes of one signature as one. Each gets its output, and its cache what is new in it."""
        passes = sorted(passes, key=lambda own: -self.depths[own.name])
        first = passes[0]
        if first.cache is not None and first.begins:
            for own in passes:
                self._kept[own.name].clear()  # a generation: the rows before it do not come back
        self._passes, self._states = passes, [self._find(own) for own in passes]
        self._plan = plan = self._make_plan()
        given = dict(first.inputs.given)
        for name in first.inputs.by_row:
            rows = torch.cat([own.inputs.given[name] for own in passes])
            given[name] = rows if plan.chosen is None else rows[plan.chosen.to(rows.device)]
        cache = None
        if first.cache is not None:
            given["past_key_values"] = cache = self._whole_cache()
        assert self.decoder is not None
        try:
            states = self.decoder(**given).last_hidden_state
        finally:
            self._states = []
        last = plan.levels[-1]
        for index, own in enumerate(passes):
            own.joined = _rows_of(states, last, index)[:, : own.width]
            own.output = own.joined.detach()
            if own.joined.requires_grad and index in last.segments:
                own.output.requires_grad_()
        if cache is not None:
            self._hand_out(cache)

    @staticmethod
    def backward(passes: Sequence[JointPass]) -> None:
        """Take the gradients of the passes' outputs to the weights of their models' blocks, in one pass backward."""
        outputs, gradients = [], []
        for own in passes:
            if own.joined is not None and own.output is not None and own.output.grad is not None:
                outputs.append(own.joined)
                gradients.append(own.output.grad)
            own.joined = own.output = None
        if outputs:
            torch.autograd.backward(outputs, gradients)

    def _make_plan(self) -> _Plan:
        passes = self._passes
        kept = [states is not None for states in self._states]
        known: Hashable = (
            tuple((own.name, len(own.inputs.rows)) for own in passes),
            tuple(kept),
        )
        rows: list[Sequence[Hashable]] = [own.inputs.rows for own in passes]
        differ = not passes[0].begins or all(kept) or len({*itertools.chain(*rows)}) == sum(map(len, rows))
        if differ:
            if known in self._plans:
                return self._plans[known]
            rows = [[(index, row) for row in range(len(own))] for index, own in enumerate(rows)]
        plan = _make_plan([self.depths[own.name] for own in passes], rows, kept, len(self.blocks))
        if differ:
            self._plans[known] = plan
        return plan

    def _find(self, own: JointPass) -> torch.Tensor | None:
        """The kept states of all of a pass's rows."""
        kept = self._kept[own.name]
        if own.cache is not None or not kept:
            return None
        found = [kept.get((own.inputs.rest, row)) for row in own.inputs.rows]
        if any(each is None for each in found):
            return None
        return torch.stack([states[row] for states, row in found])  # type: ignore[misc]

    def _run_block(self, index: int, whole: Callable[..., Any], states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        level = self._plan.levels[index]
        if index == 0:
            self.size = len(states)
        joining = [self._states[i] for i in level.joining if self._states[i] is not None]
        if joining:
            states = torch.cat([states, *joining])  # type: ignore[list-item]
        if level.take is not None:
            states = states[level.take.to(states.device)]
        for i in level.joining:
            self._keep(i, states, level)
        if not level.size:
            return states
        total = self.size
        if level.origin is not None:
            args, kwargs = _taken(level.origin, total, args, kwargs)
            total = level.size
        names = [(self._passes[i].name, start, end) for i, (start, end) in level.segments.items()]
        if not torch.is_grad_enabled() or not level.frozen:
            return self._call(whole, states, args, kwargs, names)
        args_below, kwargs_below = _taken(slice(0, level.frozen), total, args, kwargs)
        with torch.no_grad():
            below = self._call(whole, states[: level.frozen], args_below, kwargs_below, [])
        if level.frozen == level.size:
            return below
        args, kwargs = _taken(slice(level.frozen, None), total, args, kwargs)
        shifted = [(name, start - level.frozen, end - level.frozen) for name, start, end in names]
        return torch.cat([below, self._call(whole, states[level.frozen :], args, kwargs, shifted)])

    def _call(
        self, whole: Callable[..., Any], states: torch.Tensor, args: Any, kwargs: Any, segments: list
    ) -> torch.Tensor:
        self.segments, self.rows, self.states = segments, len(states), states.shape
        output = whole(states, *args, **kwargs)
        if not isinstance(output, torch.Tensor):
            raise TypeError("a block returns something else than hidden states")
        return output

    def _keep(self, index: int, states: torch.Tensor, level: _Level) -> None:
        own = self._passes[index]
        if own.cache is not None or self._states[index] is not None or not self.depths[own.name]:
            return
        start, end = level.segments[index]
        values = states[start:end].detach()
        self._kept[own.name].update({(own.inputs.rest, row): (values, i) for i, row in enumerate(own.inputs.rows)})

    def _whole_cache(self) -> DynamicCache:
        """The cache of all rows of a pass, made of the passes' own."""
        caches: list[Any] = [own.cache for own in self._passes]
        if self._last is not None:
            whole, parts = self._last
            if len(parts) == len(caches) and all(
                own is cache and cache.layers[0].keys is keys for own, (cache, keys) in zip(caches, parts, strict=True)
            ):
                return whole
        self._last = None
        whole = copy.copy(caches[0])
        whole.layers = [copy.copy(layer) for layer in caches[0].layers]
        if not self._passes[0].begins:
            for index, layer in enumerate(whole.layers):
                layer.keys = torch.cat([cache.layers[index].keys for cache in caches])
                layer.values = torch.cat([cache.layers[index].values for cache in caches])
        return whole

    def _hand_out(self, whole: Any) -> None:
        """Give every pass's cache its rows of `whole`."""
        levels = self._plan.levels
        if len(whole.layers) != len(levels):
            raise ValueError("the cache has another number of layers than the model has blocks")
        for index, own in enumerate(self._passes):
            layers = []
            for level, layer in zip(levels, whole.layers, strict=True):
                part = copy.copy(layer)
                part.keys, part.values = _rows_of(layer.keys, level, index), _rows_of(layer.values, level, index)
                layers.append(part)
            cache: Any = own.cache
            cache.layers[:] = layers
        plain = all(level.take is None and level.origin is None for level in levels)
        parts = [(own.cache, own.cache.layers[0].keys) for own in self._passes]  # type: ignore[union-attr]
        self._last = (whole, parts) if plain else None


class _ByModel(nn.Module):
    """A module of the base whose place single models have in their blocks."""

    def __init__(self, base_layer: nn.Module, joint: JointDecoder) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.of_models: dict[str, SingleLayerLayer] = {}
        self.joint = (joint,)  # which holds this module
        self.overwrites = True  # whether the base layer is thought to return a tensor that nothing else holds

    def __getattr__(self, name: str) -> Any:
        """What is not a tensor is the base layer's: a tensor would be of one model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("base_layer"), name)
            if isinstance(value, torch.Tensor):
                raise RuntimeError(f"a {type(self.base_layer).__name__}'s {name} is read without a call") from None
            return value

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        joint, base, total = self.joint[0], self.base_layer, len(states)
        segments: list[tuple[nn.Module, int, int]] = [
            (self.of_models[name], start, end) for name, start, end in joint.segments if name in self.of_models
        ]
        if not segments:
            return base(states, *args, **kwargs)
        repeats = entries_of_a_row(states.shape, joint.rows, joint.states)
        if repeats is None:
            raise RuntimeError(f"a {type(base).__name__} is not given rows of the batch")

        def run(module: nn.Module, first: int, last: int) -> Any:
            rows = slice(first * repeats, last * repeats)
            some, named = _taken(rows, total, args, kwargs) if args or kwargs else ((), {})
            return module(states[rows], *some, **named)

        few = 2 * sum(end - start for _, start, end in segments) <= joint.rows
        if self.overwrites and few and not torch.is_grad_enabled():  # one call of the base less, and no new tensor
            whole = base(states, *args, **kwargs)
            self.overwrites = type(whole) is torch.Tensor and whole._base is None and whole is not states
            if self.overwrites:
                for module, start, end in segments:
                    whole[start * repeats : end * repeats] = run(module, start, end)
                return whole
        parts, done = [], 0
        for module, start, end in segments:
            if done < start:
                parts.append(run(base, done, start))
            parts.append(run(module, start, end))
            done = end
        if done < joint.rows:
            parts.append(run(base, done, joint.rows))
        return parts[0] if len(parts) == 1 else _one_behind_another(parts)


def _one_behind_another(parts: Sequence[Any]) -> Any:
    """What a module returned for rows that follow each other, as if for all of them."""
    if isinstance(parts[0], tuple):
        return tuple(map(_one_behind_another, zip(*parts, strict=True)))
    return torch.cat(tuple(parts))


def _taken(rows: torch.Tensor | slice, total: int, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a module with only these rows."""
    return take_rows(list(args), rows, total), {name: take_rows(v, rows, total) for name, v in kwargs.items()}


def _rows_of(values: torch.Tensor, level: _Level, index: int) -> torch.Tensor:
    """The rows of one pass in the batch of a block."""
    if index in level.segments:
        start, end = level.segments[index]
        return values[start:end]
    rows = level.frozen_of[index]
    return values[rows if isinstance(rows, slice) else rows.to(values.device)]


def _as_slice(places: list[int]) -> torch.Tensor | slice:
    """The same rows, as a slice where they lie together, of which torch makes a view."""
    if places == list(range(places[0], places[0] + len(places))):
        return slice(places[0], places[0] + len(places))
    return torch.tensor(places)


def _make_plan(depths: Sequence[int], rows: Sequence[Sequence[Hashable]], kept: Sequence[bool], blocks: int) -> _Plan:
    """
    Args:
        depths: of each pass the block from which on its rows are its own, in descending order.
        rows: of each pass, where equal rows are equal.
        kept: whether its rows join with states that are known already.
        blocks: how many.
    """
    everything = list(itertools.chain(*rows))
    number = {row: i for i, row in enumerate(dict.fromkeys(everything))}
    chosen = None
    if len(number) < len(everything):
        first: dict[Hashable, int] = {}
        for at, row in enumerate(everything):
            first.setdefault(row, at)
        chosen = torch.tensor(list(first.values()))
    before = {(-1, i): i for i in range(len(number))}  # where the rows of the batch before are
    levels = []
    for block in range(blocks):
        below = [i for i, depth in enumerate(depths) if depth > block and not kept[i]]
        frozen = dict.fromkeys((-1, number[row]) for i in below for row in rows[i])
        joined = [i for i, depth in enumerate(depths) if depth <= block]
        joining = tuple(i for i in joined if depths[i] == block)
        batch = [*frozen, *((i, at) for i in joined for at in range(len(rows[i])))]
        behind = len(before)
        take = []
        for i, at in batch:
            if (i, at) in before:
                take.append(before[i, at])
            elif kept[i]:
                take.append(behind)
                behind += 1
            else:
                take.append(before[-1, number[rows[i][at]]])
        origin = [at if i < 0 else number[rows[i][at]] for i, at in batch]
        before = {entry: at for at, entry in enumerate(batch)}
        segments = {i: (before[i, 0], before[i, 0] + len(rows[i])) for i in joined}
        levels.append(
            _Level(
                len(batch),
                len(frozen),
                {i: _as_slice([before[-1, number[row]] for row in rows[i]]) for i in below},
                None
                if take == list(range(len(take))) and behind == len(take)
                else torch.tensor(take, dtype=torch.long),
                None if origin == list(range(len(number))) else torch.tensor(origin, dtype=torch.long),
                segments,
                joining,
            )
        )
    return _Plan(chosen, tuple(levels))
