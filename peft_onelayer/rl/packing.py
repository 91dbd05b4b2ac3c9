"""The completions of one prompt share it in a trainer's passes, forward and backward.

A trainer of TRL passes whole rows, so that a group of eight completions passes its prompt eight times. Here the rows
of a group become one: the prompt, and behind it one completion after the other, each of which attends to the prompt
and to itself. What the decoder returns is put back into rows before the LM head.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from peft_onelayer.records.text import one_line
from peft_onelayer.seams import check
from peft_onelayer.tuner.pass_inputs import MADE_FROM, pass_inputs

from .hooks import HooksWhileTraining
from .prefix import not_repeatable

PAYS = 0.9  # of the multiplications of whole rows, at most
ATTENTION = {"sdpa", "eager"}  # implementations that take a mask of every pair of positions
KINDS = {"full_attention", "sliding_attention"}  # of blocks
NOT_GIVEN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)  # of packed rows
ROW = "onelayer_row"  # a row's number, while TRL shuffles


def packed_prompts(trainer: Trainer) -> PackedPrompts:
    """Pass each prompt once for all of its completions, where a trainer scores and trains.

    For trainers of TRL that score with its fused LM head: GRPO, Dr. GRPO, GiGPO, RLOO, DPO, KTO; of any method:
    wrapped, LoRA or in full. Equal completions of one prompt are passed once too. Losses and gradients are those of
    whole rows but for the rounding of another batching. Call it before `trainer.train()`.

    TRL shuffles the rows of a generation before it cuts them into passes. The rows of one optimizer step are put back
    into their order, so that a pass holds whole groups. This changes the order in which a step adds up its gradients,
    and is left out where a pass's own tokens or entropies count (`loss_type="bnpo"`, `top_entropy_quantile`).

    A pass that would not get cheaper is left as it is. Packing ends by itself, with a warning that says why, where it
    would be wrong: dropout in training, an attention without masks (flash attention), blocks with other than full or
    sliding attention, FSDP, DeepSpeed ZeRO-3, compiled models. The rows of one prompt are passed both ways and
    compared the first time, and whenever rows are longer than those that were.

    Args:
        trainer: that will train.

    Returns:
        What does it, already a callback of the trainer.

    Raises:
        ValueError: it was called for this trainer before.
    """
    from trl import GRPOTrainer, RLOOTrainer

    check(__name__)
    fields = trainer.args.to_dict()
    of_a_pass = fields.get("loss_type") == "bnpo" or fields.get("top_entropy_quantile", 1.0) < 1
    packed = PackedPrompts.of_trainer(trainer)
    if isinstance(trainer, GRPOTrainer | RLOOTrainer) and not of_a_pass:
        _keep_groups_together(trainer)
    return packed


def _keep_groups_together(trainer: Any) -> None:
    """Have a trainer that cuts generations into passes put the rows of a step into the order of the generation."""
    score: Callable[..., Any] = trainer._generate_and_score_completions
    prepare: Callable[..., Any] = trainer._prepare_inputs

    def numbered(*args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = score(*args, **kwargs)
        return {**batch, ROW: torch.arange(len(batch["completion_ids"]))}

    def prepared(*args: Any, **kwargs: Any) -> dict[str, Any]:
        before = trainer._buffered_inputs
        inputs = prepare(*args, **kwargs)
        passes, size = trainer._buffered_inputs, trainer.args.gradient_accumulation_steps
        if passes is before or not trainer.model.training:
            inputs.pop(ROW, None)
            return inputs
        for start in range(0, len(passes), size):
            passes[start : start + size] = _in_order(passes[start : start + size])
        return passes[trainer._step % len(passes)]

    trainer._generate_and_score_completions, trainer._prepare_inputs = numbered, prepared


def _in_order(passes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, by their number; the passes as they are where something has not one entry a row (images)."""
    if any(ROW not in each for each in passes):
        return passes  # of a trainer that mixes others in
    numbers = [each.pop(ROW) for each in passes]
    order, sizes = torch.cat(numbers).argsort(stable=True).tolist(), [len(each) for each in numbers]
    single = {k for k, v in passes[0].items() if v is None or (isinstance(v, torch.Tensor) and v.dim() == 0)}
    by_row = passes[0].keys() - single
    if any(len(each[name]) != size for each, size in zip(passes, sizes, strict=True) for name in by_row):
        return passes
    result: list[dict[str, Any]] = [{name: each[name] for name in single} for each in passes]
    for name in by_row:
        parts = [each[name] for each in passes]
        rows: Any = torch.cat(parts)[order] if isinstance(parts[0], torch.Tensor) else None
        if rows is None:
            every = [row for part in parts for row in part]
            rows = [every[i] for i in order]
        start = 0
        for batch, size in zip(result, sizes, strict=True):
            batch[name] = rows[start : start + size]
            start += size
    return result


@dataclass(frozen=True)
class Packing:
    """Rows of a batch put behind their prompts: R packed rows of W columns, of N rows of T.

    Attributes:
        rows, columns: (R, W) int64, where in the batch a packed column comes from; behind a completion that is
            shorter than others, the first column.
        slots: (R, W) int64: 0 of a prompt, from 1 on of a completion, -1 of what nothing attends to.
        places: (N, T) int64, where among the R x W positions that of the batch is; 0 of padding.
        share: of the multiplications of whole rows.
    """

    rows: np.ndarray
    columns: np.ndarray
    slots: np.ndarray
    places: np.ndarray
    share: float


def pack(ids: np.ndarray, mask: np.ndarray, labels: np.ndarray, width: int) -> Packing | None:
    """How rows that begin with one prompt are packed, in the way that needs the fewest multiplications.

    Args:
        ids, mask, labels: (N, T) int64, of tokens; a prompt is what comes before a row's first label (not -100).
        width: of the hidden states.

    Returns:
        None where no prompt is shared, or `PAYS` is not reached.
    """
    total, length = ids.shape
    labelled, real = labels != -100, mask != 0
    ends = length - np.argmax(real[:, ::-1], axis=1)  # behind the last token
    starts = np.minimum(np.where(labelled.any(axis=1), labelled.argmax(axis=1), length), ends)
    groups: dict[tuple, dict[tuple, list[int]]] = {}
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        prompt = (start, ids[row, :start].tobytes(), mask[row, :start].tobytes())
        completion = (ids[row, start:end].tobytes(), mask[row, start:end].tobytes())
        groups.setdefault(prompt, {}).setdefault(completion, []).append(row)
    sizes = [len(completions) for completions in groups.values()]
    if len(sizes) == total:
        return None
    before, behind = int(starts.max()), max(int((ends - starts).max()), 1)

    def needed(count: int, columns: int) -> float:
        """Of a block: 12 W multiplications by weights and 2 by each position for each number of a token."""
        return count * columns * (12 * width + 2 * columns)

    options = []
    for most in range(1, max(sizes) + 1):
        count = sum(math.ceil(size / most) for size in sizes)
        options.append((needed(count, before + most * behind) / needed(total, length), most, count))
    share, most, count = min(options)
    if share > PAYS:
        return None
    columns = before + most * behind
    sources, positions, slots = (np.zeros((count, columns), np.int64) for _ in range(3))
    found = Packing(sources, positions, slots, np.zeros((total, length), np.int64), share)
    found.slots[:] = -1
    packed = 0
    for (start, _, _), completions in groups.items():
        # In the order of their bytes, so that any pass over the same rows makes the same packed ones.
        ordered = [rows for _, rows in sorted(completions.items())]
        for first in range(0, len(ordered), most):
            some = ordered[first : first + most]
            found.rows[packed], found.columns[packed, :start] = some[0][0], np.arange(start)
            found.slots[packed, :start] = np.where(real[some[0][0], :start], 0, -1)
            for slot, rows in enumerate(some):
                end = int(ends[rows[0]])
                here = slice(before + slot * behind, before + slot * behind + end - start)
                found.rows[packed, here], found.columns[packed, here] = rows[0], np.arange(start, end)
                found.slots[packed, here] = np.where(real[rows[0], start:end], slot + 1, -1)
                for row in rows:
                    found.places[row, :start] = packed * columns + np.arange(start)
                    found.places[row, start:end] = packed * columns + np.arange(here.start, here.stop)
            packed += 1
    return found


class PackedPrompts(HooksWhileTraining):
    """Packs the passes of a model while a trainer trains.

    Attributes:
        packed: passes that were packed.
        whole: scoring passes that were not.
        off: why nothing is packed any more, or None.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.packed = self.whole = 0
        self.off: str | None = None
        self._compared = (0, 0)  # tokens of the longest row and of the longest packed one that were passed both ways
        self._labels: torch.Tensor | None = None  # of the scoring pass under way
        self._places: torch.Tensor | None = None  # of the packed pass under way, (N, T)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_labels": None, "_places": None}

    def hooks(self, args: Any) -> list[Any]:
        if not isinstance(self.decoder, PreTrainedModel) or self.decoder is self.model:
            return []
        if args.torch_compile:
            self._switch_off("the model is compiled")
            return []
        return [  # before and behind all else that looks at the decoder's rows
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            self.decoder.register_forward_hook(self._leave, with_kwargs=True, prepend=True, always_call=True),
            self.model.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """End packing."""
        self._labels = self._places = None
        super().remove()

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        scores = kwargs.get("fused_lm_head") and kwargs.get("shift_labels") is None
        if not torch.compiler.is_compiling() and scores and model is self.model and self.off is None:
            self._labels = labels if isinstance(labels, torch.Tensor) else None

    def _end(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._labels = self._places = None

    def _enter(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before a pass: pack its rows."""
        labels, self._labels = self._labels, None
        if torch.compiler.is_compiling() or labels is None or decoder is not self.decoder:
            return None
        if (problem := self._problem()) is not None:
            self._switch_off(problem)
            return None
        inputs = pass_inputs(decoder, args, kwargs)
        tensors = {k: v for k, v in inputs.given.items() if isinstance(v, torch.Tensor)} if inputs else {}
        if inputs is None or set(tensors) != {"input_ids", "attention_mask"}:
            return None
        ids, mask = tensors["input_ids"], tensors["attention_mask"]
        if mask.shape != ids.shape or labels.shape != ids.shape:
            return None
        packing = pack(_numbers(ids), _numbers(mask), _numbers(labels), decoder.config.hidden_size)
        if packing is None:
            self.whole += 1
            return None
        lengths = ids.size(1), packing.slots.shape[1]
        longest = max(lengths[0], self._compared[0]), max(lengths[1], self._compared[1])
        if longest != self._compared and (problem := self._compare(inputs.given, packing)) is not None:
            self._switch_off(problem)
            return None
        self._compared = longest
        self.packed += 1
        self._places = torch.from_numpy(packing.places).to(ids.device)
        return (), {**inputs.given, **packed_arguments(decoder, packing, ids)}

    def _leave(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Behind a pass: put what it returns into rows; after an exception there is nothing."""
        places, self._places = self._places, None
        if places is not None and output is not None:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[places]

    def _compare(self, given: dict[str, Any], packing: Packing) -> str | None:
        """Pass the rows of the fullest packed row both ways, and say what differs."""
        ids, mask = given["input_ids"], given["attention_mask"]
        width = packing.slots.shape[1]
        packed_row = packing.places.max(axis=1) // width  # of each row
        one = int(np.bincount(packed_row).argmax())
        rows = np.flatnonzero(packed_row == one)
        few = Packing(
            np.searchsorted(rows, packing.rows[[one]]),
            packing.columns[[one]],
            packing.slots[[one]],
            np.maximum(packing.places[rows] - one * width, 0),
            packing.share,
        )
        real, places = mask[rows] != 0, torch.from_numpy(few.places).to(ids.device)
        whole = {**given, "input_ids": ids[rows], "attention_mask": mask[rows]}
        devices = [ids.device] if ids.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            expected = self.decoder.forward(**whole).last_hidden_state[real]
            try:
                packed = self.decoder.forward(**{**given, **packed_arguments(self.decoder, few, ids[rows])})
            except NOT_GIVEN as error:
                return f"its blocks cannot be given packed rows ({one_line(str(error), 120)})"
        found = packed.last_hidden_state.flatten(0, 1)[places][real]
        off = float((found - expected).norm() / expected.norm())
        kind = ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else expected.dtype
        # Rounding grows with the depth; what attends to the wrong positions is further off.
        if off <= math.sqrt(torch.finfo(dtype).eps):
            return None
        return f"packed rows gave hidden states that differ from those of whole rows by {off:.1e} of their norm"

    def _problem(self) -> str | None:
        """Why no pass may be packed."""
        return unpackable(self.decoder) or not_repeatable(self.decoder)

    def _switch_off(self, problem: str) -> None:
        self.off = problem
        warnings.warn(f"every completion is passed with its own prompt: {problem}.", stacklevel=2)


def unpackable(decoder: nn.Module) -> str | None:
    """Why the passes of a decoder cannot be packed, in a sentence, or None."""
    config: Any = decoder.config
    if config._attn_implementation not in ATTENTION:
        return f"the attention {config._attn_implementation} takes no mask of every pair of positions"
    if unknown := sorted(_kinds(config)[0] - KINDS):
        return f"it has blocks with {', '.join(unknown)}"
    return None


def packed_arguments(decoder: nn.Module, packing: Packing, ids: torch.Tensor) -> dict[str, Any]:
    """What a decoder is given in place of a batch.

    Args:
        ids: of the batch, (N, T) int64.

    Returns:
        "input_ids" and "position_ids", (R, W) int64; "attention_mask", (R, 1, W, W), or one for each kind of block.
    """
    rows, columns, slots = (
        torch.from_numpy(each).to(ids.device) for each in (packing.rows, packing.columns, packing.slots)
    )
    return {
        "input_ids": ids[rows, columns],
        "position_ids": columns,
        "attention_mask": packed_masks(decoder, columns, slots),
    }


def packed_masks(
    decoder: nn.Module, columns: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask of packed rows, (R, 1, W, W), or one for each kind of block, as a decoder takes it.

    Args:
        columns, slots: (R, W) int64, as of `Packing`.
    """
    kinds, window, several = _kinds(decoder.config)
    same = (slots[:, None, :] == slots[:, :, None]) | (slots[:, None, :] == 0)
    seen = same & (columns[:, None, :] <= columns[:, :, None]) & (slots[:, None, :] >= 0) & (slots[:, :, None] >= 0)
    # What nothing attends to attends to itself: a softmax of nothing is no number.
    itself = torch.eye(slots.size(1), dtype=torch.bool, device=slots.device)
    masks = {}
    for kind in kinds:
        own = seen
        if kind == "sliding_attention" and window is not None:
            own = seen & (columns[:, None, :] > columns[:, :, None] - window)
        masks[kind] = _mask(decoder, own | itself, slots)
    return masks if several else next(iter(masks.values()))


def _mask(decoder: Any, seen: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    mask = seen[:, None]
    if decoder.config._attn_implementation == "eager":  # adds it to the scores
        mask = torch.zeros_like(mask, dtype=decoder.dtype).masked_fill(~mask, torch.finfo(decoder.dtype).min)
    setattr(mask, MADE_FROM, slots)
    return mask


def _kinds(config: Any) -> tuple[set[str], int | None, bool]:
    """The kinds of attention of a decoder's blocks, the window of the sliding one, and whether the decoder takes a mask
    by kind."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if getattr(config, "layer_types", None) is not None:
        kinds = set(config.layer_types)
        return kinds, window, kinds != {"full_attention"}
    return {"full_attention" if window is None else "sliding_attention"}, window, False


def _numbers(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy().astype(np.int64)
