"""Runs in this process that share one base model in memory: what their models pass is passed together.

Every run is the run that it is alone, with a trainer and random numbers of its own. Where it passes something through
its model's blocks, it waits for the others, and all that wait pass as one batch (`tuner/joint.py`): in generation, in
training, forward and backward, and in the evaluation. So a run equals its separate run up to the rounding of the
batching. Runs of all parameters, and those that find a learning rate, share nothing and run alone, one after another.
"""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from peft_onelayer.records.text import one_line
from peft_onelayer.sweep.lockstep import Member, process_state_kept, run_together
from peft_onelayer.sweep.run_layer import Alone, OnStep, Row, RunSpec, run_layer

from . import Answer, RunsFailedError, attempt
from .local import visible_devices

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from peft_onelayer.tuner.joint import JointDecoder, JointPass

TOGETHER = 8  # runs at a time, where nobody says how many


def run(
    specs: Sequence[RunSpec],
    *,
    folder: Path,
    workers: int | None = None,
    run_row: Callable[..., Row] = run_layer,
) -> Iterator[Row]:
    """Yield the rows of `specs` as they are done; see the package for what happens to failures.

    Args:
        workers: runs that share the model at a time (default: `TOGETHER`).
        run_row: takes what `run_layer` takes.

    Raises:
        ValueError: several GPUs are visible; trainers would spread their batches over them.
        RunsFailedError: some runs failed.
    """
    if (devices := len(visible_devices())) > 1:
        raise ValueError(
            f"the engine shared computes on one GPU, and {devices} are visible; name one in CUDA_VISIBLE_DEVICES, or "
            "use --engine local, which gives each a process."
        )
    failures: list[tuple[RunSpec, str]] = []
    if not specs:
        return
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    sharing = [spec for spec in specs if _shares(spec)]
    alone = [spec for spec in specs if not _shares(spec)]
    together = workers or TOGETHER

    def answers(log: TextIO) -> Generator[tuple[RunSpec, Answer], None, None]:
        for start in range(0, len(sharing), together):
            yield from _together(sharing[start : start + together], run_row, log)
        for spec in alone:  # in the main thread, where Ctrl-C ends it at once
            with process_state_kept():
                answer = _run(run_row, spec, lambda step, reward: None, Alone(), log)
            yield spec, answer

    with (logs / "shared.log").open("a", encoding="utf-8") as log, closing(answers(log)) as arriving:
        for spec, answer in arriving:
            if "row" in answer:
                yield answer["row"]
            else:
                failures.append((spec, answer["error"]))
    if failures:
        raise RunsFailedError(failures)


def _shares(spec: RunSpec) -> bool:
    return spec.layer != "full" and not spec.finds_rate


def _together(
    specs: Sequence[RunSpec], run_row: Callable[..., Row], log: TextIO
) -> Generator[tuple[RunSpec, Answer], None, None]:
    """The answers of runs of one model, as they end."""
    joint = _Joint(log)
    gc.freeze()  # what is there already, such as modules, is no garbage: every trainer looks through all of it
    named = {f"run {i}, {spec}": spec for i, spec in enumerate(specs)}

    def run_one(spec: RunSpec, member: Member) -> Answer:
        return _run(run_row, spec, lambda step, reward: member.check(), _Shared(member, joint), log)

    functions = {name: functools.partial(run_one, spec) for name, spec in named.items()}
    try:
        with joint, closing(run_together(functions, joint.serve)) as members:
            for member in members:
                joint.remove(member.name)
                yield named[member.name], member.result
    finally:
        gc.unfreeze()


def _run(run_row: Callable[..., Row], spec: RunSpec, on_step: OnStep, place: Alone, log: TextIO) -> Answer:
    """The answer of a run, whose warnings go to the log until the process's state is exchanged."""

    def note(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        with suppress(OSError):  # the log's disk is full
            log.write(warnings.formatwarning(message, category, filename, lineno))

    warnings.showwarning = note
    return attempt(run_row, spec, on_step, place, log=log)


@dataclass
class _Forward:
    """A pass through a run's blocks: what its decoder was given."""

    decoder: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    gradients: bool
    autocast: torch.dtype | None


@dataclass
class _Backward:
    """The gradients of passes' outputs are there."""

    passes: list[JointPass]


class _Evaluation:
    """Training is done."""


class _Shared(Alone):
    """The place of a run beside others: a model of its own whose weights are the common base's."""

    def __init__(self, member: Member, joint: _Joint) -> None:
        self.member, self.joint = member, joint
        self.passes: list[JointPass] = []  # whose outputs have no gradient yet
        self.joins = False
        self._with_blocks: Callable[[], AbstractContextManager[object]] = nullcontext

    def load(self, spec: RunSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from peft_onelayer.rl.prefix import draws
        from peft_onelayer.tuner.joint import sharing_weights
        from peft_onelayer.tuner.prompts import decoder_of

        base, tokenizer = self.joint.base(spec, super().load)
        model = sharing_weights(base)
        if (decoder := decoder_of(model)) is not None and not draws(decoder):
            own = decoder.forward
            decoder.forward = functools.wraps(own)(functools.partial(self._forward, decoder, own))
            self.joint.add(self.member.name, model)
            self.joins = True
        return model, tokenizer

    def share(self, trainer: Trainer) -> None:
        from peft_onelayer.tuner.joint import without_frozen_blocks

        if not self.joins:
            super().share(trainer)
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.joint.add(self.member.name, model)
        self._with_blocks = without_frozen_blocks(model)
        backward = trainer.accelerator.backward

        def backward_together(*args: Any, **kwargs: Any) -> None:
            backward(*args, **kwargs)
            if passes := self.passes:
                self.passes = []
                self.member.ask(_Backward(passes))

        trainer.accelerator.backward = backward_together

    def begin_evaluation(self) -> None:
        self.member.ask(_Evaluation())

    def _forward(self, decoder: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        device = next(decoder.parameters()).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        run = self.member.ask(_Forward(decoder, args, kwargs, torch.is_grad_enabled(), autocast))
        if run is None:
            with self._with_blocks():
                return own(*args, **kwargs)
        if run.output.requires_grad:
            self.passes.append(run)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=run.output, past_key_values=run.cache)


class _Joint:
    """What the runs of a group share: the base, and their passes."""

    def __init__(self, log: TextIO) -> None:
        self.log = log
        self.loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self.decoder: JointDecoder | None = None
        self._rounded = ExitStack()  # open while
        self._generating = False  # passes of generations follow each other
        self._problems: set[str] = set()  # that were told

    def __enter__(self) -> _Joint:
        return self

    def __exit__(self, *error: object) -> None:
        self._rounded.close()
        self.loaded = self.decoder = None

    def base(
        self, spec: RunSpec, load: Callable[[RunSpec], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base, loaded for the first run that asks, and a tokenizer that is the run's own."""
        from peft_onelayer.tuner.joint import JointDecoder

        if self.loaded is None:
            model, tokenizer = load(spec)
            self.loaded, self.decoder = (model, tokenizer), JointDecoder(model.requires_grad_(False))
        model, tokenizer = self.loaded
        return model, copy.deepcopy(tokenizer)

    def add(self, name: str, model: nn.Module) -> None:
        assert self.decoder is not None
        self.decoder.add(name, model)

    def remove(self, name: str) -> None:
        if self.decoder is not None:
            self.decoder.remove(name)

    def serve(self, members: Sequence[Member]) -> None:
        """Serve what is furthest behind, so that runs that went ahead wait for the others: generations first, then
        passes without a cache, then backward, and the evaluation last."""
        asking = {kind: [m for m in members if isinstance(m.request, kind)] for kind in (_Forward, _Backward)}
        if forward := asking[_Forward]:
            generating = [member for member in forward if member.request.kwargs.get("past_key_values") is not None]
            self._forward(generating or forward)
        elif backward := asking[_Backward]:
            self._backward(backward)
        else:
            for member in members:
                member.answer(None)

    def _forward(self, members: Sequence[Member]) -> None:
        groups: dict[Hashable, list[tuple[Member, JointPass]]] = {}
        width = max(_width(member.request) for member in members)
        for member in members:
            request: _Forward = member.request
            own = _joint_pass(member.name, request, width)
            if own is None:
                member.answer(None)  # for the run to pass by itself
            else:
                groups.setdefault((own.signature, request.gradients, request.autocast), []).append((member, own))
        for group in groups.values():
            together = self._run([own for _, own in group], group[0][0].request)
            for member, own in group:
                member.answer(own if together else None)

    def _run(self, passes: list[JointPass], request: _Forward) -> bool:
        """Whether the passes were run as one."""
        from peft_onelayer.tuner.rounded import keeping_rounded

        assert self.decoder is not None
        if passes[0].cache is None:
            self._rounded.close()
        elif not self._generating:
            self._rounded.enter_context(keeping_rounded())
        self._generating = passes[0].cache is not None
        device = next(self.decoder.model.parameters()).device.type
        try:
            with (
                torch.set_grad_enabled(request.gradients),
                torch.autocast(device, dtype=request.autocast, enabled=request.autocast is not None),
            ):
                self.decoder.run(passes)
        except Exception as error:
            if (problem := one_line(error)) not in self._problems:
                self._problems.add(problem)
                print(f"passes that could not be joined are run one by one: {problem}", file=self.log, flush=True)
            return False
        return True

    def _backward(self, members: Sequence[Member]) -> None:
        from peft_onelayer.tuner.joint import JointDecoder

        answer: Exception | None = None
        try:
            JointDecoder.backward([own for member in members for own in member.request.passes])
        except Exception as error:  # some weights may have their gradients: none of these runs can go on
            answer = error
        for member in members:
            member.answer(answer)


def _width(request: _Forward) -> int:
    """Positions of each row of a pass without a cache."""
    ids = request.kwargs.get("input_ids", request.args[0] if request.args else None)
    return 0 if ids is None else ids.shape[1]


def _joint_pass(name: str, request: _Forward, width: int) -> JointPass | None:
    """A run's part of a joint pass, where it has no cache padded to so many positions; None where it cannot be part of
    one: where it wants more than hidden states, or has a cache of another kind."""
    from peft_onelayer.tuner.joint import JointPass
    from peft_onelayer.tuner.pass_inputs import pass_inputs
    from peft_onelayer.tuner.prompts import can_be_split

    kwargs, cache = request.kwargs, request.kwargs.get("past_key_values")
    own = _width(request)
    if cache is None and kwargs.get("use_cache") is not False:
        return None
    if cache is not None and not can_be_split(cache):
        return None
    if kwargs.get("return_dict") is False:
        return None
    if cache is None and own < width:  # what stands behind a row does not change it
        kwargs = _padded(request.decoder, kwargs, own, width)
    inputs = pass_inputs(request.decoder, request.args, kwargs, left_out=("past_key_values",))
    return None if inputs is None else JointPass(name, inputs, cache, own if cache is None else None)


def _padded(decoder: nn.Module, kwargs: dict[str, Any], own: int, width: int) -> dict[str, Any]:
    """What a decoder is given, with so many positions in place of its `own`."""
    from peft_onelayer.rl.packing import packed_masks
    from peft_onelayer.tuner.pass_inputs import MADE_FROM

    def pad(value: torch.Tensor, filler: int = 0) -> torch.Tensor:
        return torch.nn.functional.pad(value, (0, width - own), value=filler)

    padded = {
        key: pad(value) if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] == own else value
        for key, value in kwargs.items()
    }
    masks = kwargs.get("attention_mask")
    mask = next(iter(masks.values())) if isinstance(masks, dict) else masks
    if (slots := getattr(mask, MADE_FROM, None)) is not None:  # prompts are packed
        padded["attention_mask"] = packed_masks(decoder, padded["position_ids"], pad(slots, -1))
    return padded
