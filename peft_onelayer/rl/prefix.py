"""The shared prefix: blocks below the lowest trained one run once for every row, for policy, old policy and reference.

They are frozen, so what leaves them is the same in all passes over a row. The first pass over a row keeps it, and later
passes start from there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.modules.dropout import _DropoutNd
from transformers import Trainer

from peft_onelayer.seams import check
from peft_onelayer.tuner.graph_cut import installed_graph_cuts
from peft_onelayer.tuner.instance import all_modules, parameters_of
from peft_onelayer.tuner.layer import SingleLayerLayer
from peft_onelayer.tuner.pass_inputs import PassInputs, pass_inputs
from peft_onelayer.tuner.prefix import HiddenStates, starting_at
from peft_onelayer.tuner.sharding import is_partitioned

from .hooks import HooksWhileTraining, while_training
from .state_cache import GIGABYTE, StateCache

CACHE_BYTES = 50 * GIGABYTE
RANDOM = ("drop", "jitter")  # parts of the names under which modules keep a share of what they drop, or of noise


def shared_prefix(
    trainer: Trainer, cache_dir: str | Path | None = None, cache_bytes: int = CACHE_BYTES
) -> SharedPrefix:
    """Run the blocks below the lowest trained one once for every row that a trainer passes through its model.

    For trainers whose passes come back to a row: of a policy and its reference (GRPO, Dr. GRPO, GiGPO and RLOO with
    `beta` above 0, DPO, KTO), of an older policy, or of several iterations. Call it before `trainer.train()`.

    What a pass computes is bit for bit what it would be, where its batch is one that was passed before. Where a trainer
    puts rows together anew (GRPO shuffles), the states are those of another batching, and may differ by its rounding.

    The states of one generation are kept, or without generations those of one batch. Sharing ends by itself, with a
    warning that says why, where it would be wrong: dropout or noise in training, blocks that hand on more than hidden
    states, embeddings in place of token ids, FSDP, DeepSpeed ZeRO-3, and compiled models. The first time that a row
    comes back, both ways are run and compared.

    Offline trainers pass the same rows in every epoch. With `cache_dir` their states are kept on disk too, by the row's
    content and a digest of the frozen weights, so that later epochs, and later runs, start above the frozen blocks. A
    row that comes back in another batch has the states of the batch that it was in first.

    Args:
        trainer: holds a model wrapped with `SingleLayerConfig`.
        cache_dir: folder for states on disk; None for none. Several processes may share it.
        cache_bytes: of all files in it, at most: nothing is added beyond.

    Returns:
        What does it, already a callback of the trainer.

    Raises:
        ValueError: the trainer's model is not wrapped, or it was called for this trainer before.
    """
    check(__name__)
    model = trainer.accelerator.unwrap_model(trainer.model)
    cuts = installed_graph_cuts(model)
    base = cuts[0].model if cuts else None
    if base is None:
        raise ValueError(
            f"the trainer's model, a {type(model).__name__}, is not wrapped with SingleLayerConfig, so no blocks below "
            "a trained one are known."
        )
    fields = trainer.args.to_dict()
    batches = fields.get("steps_per_generation")  # None: no generation that serves several steps
    passes = (batches or 1) * fields.get("num_iterations", 1)
    steps = math.ceil(passes / trainer.args.gradient_accumulation_steps) if batches else 0
    prefix = SharedPrefix(base, cuts[0].stack_name, steps)
    if cache_dir is not None:
        prefix.cache = StateCache(cache_dir, cache_bytes)
    while_training(trainer, prefix)
    return prefix


@dataclass
class _Pass:
    """A pass through the decoder that runs whole, and what it leaves to be kept.

    Attributes:
        inputs: what the decoder is given.
        stamp: what else a row's states depend on.
        depth: how many blocks are frozen.
        repeats: whether all rows were kept already.
        values: (B, T, H), what the last frozen block returned.
        returns_tuple: for each frozen block, whether it returns a tuple.
        problem: why the states are not all that the next block depends on, or None.
        folder: of the states on disk, or None.
    """

    inputs: PassInputs
    stamp: tuple
    depth: int
    repeats: bool = False
    values: torch.Tensor | None = None
    returns_tuple: list[bool] = field(default_factory=list)
    problem: str | None = None
    folder: Path | None = None

    @contextmanager
    def noting(self, blocks: Any) -> Iterator[None]:
        """Within, a pass notes what the frozen blocks return."""
        with ExitStack() as stack:
            for block in blocks[: self.depth]:
                stack.callback(block.register_forward_hook(self._note, with_kwargs=True).remove)
            yield

    def _note(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        returned = output if isinstance(output, tuple) else (output,)
        if len(returned) > 1 or returned[0].size(0) != len(self.inputs.rows):
            self.problem = "a block returns something else than the hidden states of each row"
        if any(isinstance(value, MutableMapping | list) for value in (*args, *kwargs.values())):
            self.problem = "a block is given something that it may write to for later blocks"
        self.values = returned[0].detach()
        self.returns_tuple.append(isinstance(output, tuple))

    def states(self, blocks: Any) -> HiddenStates:
        assert self.values is not None
        return HiddenStates(blocks, self.depth, self.values, tuple(self.returns_tuple))


class SharedPrefix(HooksWhileTraining):
    """Keeps what leaves the frozen blocks, and gives it to later passes over the same rows, while a trainer trains.

    Attributes:
        started: passes that started above the frozen blocks.
        whole: passes that ran them and were kept.
        off: why nothing is shared any more, or None.
        cache: states on disk, or None.
    """

    def __init__(self, model: nn.Module, stack_name: str, steps: int) -> None:
        """
        Args:
            model: the base, which holds the wrapped modules.
            stack_name: of the ModuleList that holds its blocks.
            steps: optimizer steps for which a row's states are kept; 0: until the next batch.
        """
        super().__init__(model)
        self.blocks: Any = model.get_submodule(stack_name)
        self.decoder = model.get_submodule(stack_name.rpartition(".")[0])
        self.steps = steps
        self.started = self.whole = 0
        self.off: str | None = None
        self.kept: dict[tuple, dict[bytes, tuple[HiddenStates, int]]] = {}  # by stamp and row: states, and whose row
        self.cache: StateCache | None = None
        self._proven = False
        self._pass: _Pass | None = None
        self._open = ExitStack()  # what is in place during a pass

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kept": {}, "_pass": None, "_open": ExitStack()}

    def hooks(self, args: Any) -> list[Any]:
        if args.torch_compile:
            self._switch_off("the model is compiled")
            return []
        return [
            self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.decoder.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.steps:
            self.kept.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.steps or state.global_step % self.steps == 0:
            self.kept.clear()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept.clear()

    def remove(self) -> None:
        """End sharing, and free what was kept."""
        self._open.close()
        self._pass = None
        self.kept.clear()
        super().remove()

    def _enter(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a pass: start it above the frozen blocks, or note what leaves them."""
        if torch.compiler.is_compiling() or decoder is not self.decoder or self.off is not None:
            return  # a replica of the model, or nothing to share
        self._open.close()
        self._pass = None
        if kwargs.get("use_cache") is not False or kwargs.get("past_key_values") is not None:
            return  # what is not False makes a cache, which every block adds to: a pass for every token of a generation
        depth, below = self._frozen()
        if not depth:
            return
        if problem := self._problem(kwargs):
            self._switch_off(problem)
            return
        inputs = pass_inputs(decoder, args, kwargs)
        if inputs is None:
            return
        self._pass = _Pass(inputs, (inputs.rest, depth, decoder.training, _versions(below)), depth)
        found = self._find(self._pass)
        if found is None and self.cache is not None:
            self._pass.folder = self.cache.folder_of(decoder, below, self._pass.stamp[-1], inputs)
            found = self.cache.read(inputs, self.blocks, self._pass.folder)
            if found is not None:
                self._keep(self._pass, found)
        if found is not None and self._proven:
            self.started += 1
            self._pass = None
            self._open.enter_context(starting_at(found))
        else:
            self.whole += 1
            self._pass.repeats = found is not None
            self._open.enter_context(self._pass.noting(self.blocks))

    def _leave(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Behind a pass, also after an exception, which leaves no output: keep what it noted."""
        if torch.compiler.is_compiling() or decoder is not self.decoder or self.off is not None:
            return
        self._open.close()
        run, self._pass = self._pass, None
        if run is None or output is None:
            return
        if run.problem is None and run.repeats and not self._proven:
            run.problem = self._compare(run, args, kwargs)
            self._proven = run.problem is None
        if run.problem is not None:
            self._switch_off(run.problem)
            return
        states = run.states(self.blocks)
        self._keep(run, states)
        if self.cache is not None and run.folder is not None:
            self.cache.write(run.inputs, states, run.folder)

    def _keep(self, run: _Pass, states: HiddenStates) -> None:
        self.kept.setdefault(run.stamp, {}).update({row: (states, i) for i, row in enumerate(run.inputs.rows)})

    def _find(self, run: _Pass) -> HiddenStates | None:
        """The kept states of all of a pass's rows."""
        kept = self.kept.get(run.stamp, {})
        found = [kept[row] for row in run.inputs.rows if row in kept]
        if not found or len(found) < len(run.inputs.rows):
            return None
        first = found[0][0]
        if len(first.values) == len(found) and all(s is first and i == at for at, (s, i) in enumerate(found)):
            return first
        return replace(first, values=torch.stack([states.values[i] for states, i in found]))

    def _compare(self, run: _Pass, args: tuple, kwargs: dict[str, Any]) -> str | None:
        """Pass the same inputs twice more, whole and started above the frozen blocks, and say what differs."""
        decoder, again = self.decoder, replace(run, values=None, returns_tuple=[])
        devices = [run.inputs.given["input_ids"].device] if run.inputs.given["input_ids"].is_cuda else []
        off, self.off = self.off, "comparing"
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                with again.noting(self.blocks):
                    whole = decoder(*args, **kwargs)[0]
                with starting_at(run.states(self.blocks)):
                    started = decoder(*args, **kwargs)[0]
        finally:
            self.off = off
        if again.values is None or run.values is None or not torch.equal(again.values, run.values):
            return "two passes over the same rows differ below the trained block"
        if not torch.equal(whole, started):
            return "blocks above the frozen ones need more of them than the hidden states"
        return None

    def _frozen(self) -> tuple[int, list[nn.Parameter]]:
        """How many blocks are frozen and stand below every adapter, and the decoder's parameters without those of the
        blocks above; 0 where something before the blocks trains."""
        inside = [all_modules(block) for block in self.blocks]
        own = [parameters_of(modules) for modules in inside]
        around = parameters_of(all_modules(self.decoder, but=self.blocks))
        of_blocks = {id(parameter) for parameters in own for parameter in parameters}
        if any(parameter.requires_grad and id(parameter) not in of_blocks for parameter in around):
            return 0, []
        depth = 0
        for index, (modules, parameters) in enumerate(zip(inside, own, strict=True)):
            if _any_is(modules, SingleLayerLayer) or any(parameter.requires_grad for parameter in parameters):
                depth = index
                break
        above = {id(parameter) for parameters in own[depth:] for parameter in parameters}
        below = {id(parameter): parameter for parameters in (around, *own[:depth]) for parameter in parameters}
        return depth, [parameter for key, parameter in below.items() if key not in above]

    def _problem(self, kwargs: dict[str, Any]) -> str | None:
        """Why no states may be shared in this pass and later ones."""
        if kwargs.get("inputs_embeds") is not None:
            return "the decoder is given embeddings in place of token ids"
        modules = all_modules(self.decoder)
        if _any_is(modules, AuxiliaryTrainingWrapper):
            return "modules_to_save holds a part of the decoder"
        return not_repeatable(self.decoder, modules)

    def _switch_off(self, problem: str) -> None:
        self.off = problem
        self.kept.clear()
        warnings.warn(f"the frozen blocks are run in every pass: {problem}.", stacklevel=2)


def _versions(parameters: list[nn.Parameter]) -> tuple[tuple[int, int], ...]:
    """What tells that a weight was changed or replaced."""
    return tuple((id(p), p._version) for p in parameters)


def _any_is(modules: list[nn.Module], *kinds: type) -> bool:
    return any(issubclass(kind, kinds) for kind in {*map(type, modules)})  # of which a model has few


def not_repeatable(decoder: nn.Module, modules: list[nn.Module] | None = None) -> str | None:
    """Why a pass through a decoder cannot be made in another way beside its own, with the same outcome, or None.

    Args:
        modules: all of it, where they are known.
    """
    modules = modules or all_modules(decoder)
    if _any_is(modules, FSDPModule, FullyShardedDataParallel):
        return "FSDP gathers the weights of every block"
    if any(is_partitioned(parameter) for module in modules for parameter in module._parameters.values()):
        return "DeepSpeed ZeRO-3 gathers the weights of every block"
    return _random_part(decoder, modules) if decoder.training else None


def draws(decoder: nn.Module) -> bool:
    """Whether passes in training mode draw random numbers, as dropout does."""
    return _random_part(decoder, all_modules(decoder), any_mode=True) is not None


def _random_part(decoder: nn.Module, modules: list[nn.Module], any_mode: bool = False) -> str | None:
    """Why passes of a decoder in its mode, or in training mode, draw random numbers."""
    for index, names in _rates(decoder, modules):
        module, values = modules[index], map(vars(modules[index]).get, names)
        rates = [module.p] if isinstance(module, _DropoutNd) else [v for v in values if isinstance(v, float)]
        if (module.training or any_mode) and (rate := max(rates, default=0.0)) > 0:
            return f"a {type(module).__name__} is random in training (by {rate:g})"
    return None


_Rates = list[tuple[int, list[str]]]
_RATES: WeakKeyDictionary[nn.Module, tuple[list[tuple[int, type, int]], _Rates]] = WeakKeyDictionary()


def _rates(decoder: nn.Module, modules: list[nn.Module]) -> _Rates:
    """Which modules have attributes that may be shares of what they drop, or of their noise, and their names. Asked in
    every pass, and looked for where modules or the number of their attributes are others than last time."""
    state = [(id(module), type(module), len(vars(module))) for module in modules]  # an identity may come back
    if (known := _RATES.get(decoder)) is None or known[0] != state:
        found = [(i, [name for name in vars(module) if _may_be_rate(name)]) for i, module in enumerate(modules)]
        kept = [(i, names) for i, names in found if names or isinstance(modules[i], _DropoutNd)]
        _RATES[decoder] = known = state, kept
    return known[1]


def _may_be_rate(name: str) -> bool:
    return any(part in name for part in RANDOM)
