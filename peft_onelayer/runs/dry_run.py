"""What a run would need of a device, beside the same run on everything and on LoRA, before anything is loaded or
written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_onelayer.layers import resolve_layers
from peft_onelayer.rl.recipe import of_full_training
from peft_onelayer.rl.scored import check_backbone, fused_outputs
from peft_onelayer.rollouts.prompts import shaped
from peft_onelayer.tuner import find_decoder_stack
from peft_onelayer.tuner.stack import layer_kinds

from .early import check_training
from .memory import LORA, Batches, MemoryEstimate, estimate_memory, lora
from .models import build_skeleton, load_config, load_tokenizer
from .plan import TrainingPlan
from .settings import TrainingSettings
from .training import blocks_of_adapter

PROMPTS = 1024  # of a run's, whose longest counts
CHARACTERS = 3  # of a token, where there is no tokenizer
TEXTS = (
    "chosen",
    "rejected",
    "completion",
    "reference",
    "messages",
    "text",
    "privileged_context",
)  # columns behind the prompt


@dataclass(frozen=True)
class DryRun:
    """What a run would hold.

    Attributes:
        model: its base.
        batches: what it passes through the model.
        estimates: of the run itself, and for comparison of everything, the middle block, and LoRA.
        notes: what was taken for what could not be known, one line each.
    """

    model: str
    batches: Batches
    estimates: list[MemoryEstimate]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dry_run(settings: TrainingSettings) -> DryRun:
    """What the run of `settings` would hold in a device's memory. Nothing is written, and no weights are read.

    Of the model its configuration is needed, and its tokenizer if there is one. `settings.out` is not looked at.

    Raises:
        ValueError: as `train`, and as `estimate_memory`.
    """
    check_training(settings, writes=False)
    plan = TrainingPlan(settings, Path(settings.out) / "checkpoints")
    trusted = {"trust_remote_code": settings.trust_remote_code}
    config = load_config(settings.model, settings.revision, **trusted)
    tokenizer = load_tokenizer(settings.model, settings.revision, **trusted)
    skeleton = build_skeleton(settings.model, config, **trusted)
    check_backbone(skeleton, plan.algorithm.trainer_class())
    notes: list[str] = []
    batches = _batches(plan, tokenizer, notes)
    own = _blocks(settings, skeleton, notes)
    middle = resolve_layers("middle", len(find_decoder_stack(skeleton).blocks))
    everything = of_full_training(plan.config, plan.recipe, skeleton.dtype)
    arguments = everything if own is None else plan.config
    found = [estimate_memory(config, own, batches, arguments, mask=settings.mask, **trusted)]
    compared: tuple[tuple[str, Any], ...] = (
        ("one block", middle) if own is None else ("full training", None),
        (LORA, lora()),
    )
    for what, train in compared:
        try:
            arguments = everything if train is None else plan.config
            found.append(
                estimate_memory(config, train, batches, arguments, trust_remote_code=settings.trust_remote_code)
            )
        except ValueError as error:  # a comparison, without which the run can be
            notes.append(f"not compared with {what}: {error}")
    return DryRun(settings.model, batches, found, notes)


def _blocks(settings: TrainingSettings, model: Any, notes: list[str]) -> list[int] | None:
    """The blocks that the run trains, or None for everything."""
    count, kinds = len(find_decoder_stack(model).blocks), layer_kinds(model)
    if settings.full:
        return None
    if settings.init_adapter is not None:
        return blocks_of_adapter(settings, count, kinds)[1]
    if settings.layer == "auto":
        middle = resolve_layers("middle", count)
        notes.append(f"--layer auto ranks the blocks first; block {middle[0]}, the middle one, stands for its choice")
        return middle
    return resolve_layers(settings.layer, count, kinds)


def _batches(plan: TrainingPlan, tokenizer: PreTrainedTokenizerBase | None, notes: list[str]) -> Batches:
    config, fields, algorithm = plan.config, plan.config.to_dict(), plan.algorithm
    if plan.task is not None and tokenizer is not None:
        plan.task, _ = shaped(plan.task, tokenizer, plan.shape)
        plan.check_prompts(tokenizer)
    if tokenizer is None:
        notes.append(f"no tokenizer is there, so {CHARACTERS} characters were taken for a token")
    kinds = [kind.__name__ for kind in algorithm.trainer_class().__mro__]
    outputs = fused_outputs(algorithm.trainer_class())
    rows, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if not algorithm.online:
        return _offline(plan, tokenizer, rows, passes, outputs, kinds, notes)
    assert plan.task is not None
    asked = [row["prompt"] for row in plan.rows()[:PROMPTS]]
    generated = rows * fields.get("steps_per_generation", 1)
    again = fields.get("num_iterations", 1) > 1 or bool(fields.get("beta"))
    if fields.get("use_vllm"):
        notes.append("what vLLM takes is not counted")
    return Batches(
        rows=rows,
        prompt=_longest(asked, tokenizer, plan.shape.template_kwargs),
        completion=fields.get(algorithm.completion_length or "") or plan.task.max_completion_tokens,
        passes=passes,
        generated=0 if fields.get("use_vllm") else max(generated, plan.generate),
        group=fields.get(algorithm.group_size or "") or 1,
        kept=generated if again else generated - rows,
        shared=min(rows, fields.get(algorithm.group_size or "") or 1),
        outputs=outputs,
        reference=bool(fields.get("beta")),
    )


def _offline(
    plan: TrainingPlan,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: int,
    passes: int,
    outputs: tuple[str, ...] | None,
    kinds: Sequence[str],
    notes: list[str],
) -> Batches:
    """A batch of the longest rows, cut where the trainer cuts them."""
    limit = plan.config.to_dict().get("max_length")
    if plan.data is None:  # made from rollouts when the run begins
        assert plan.task is not None
        given = plan.task.rows("train", min(plan.settings.pairs_from_task or 1, PROMPTS), plan.settings.seed)
        prompts = [_longest([row["prompt"]], tokenizer, None) for row in given]
        longest = max(prompts) + plan.task.max_completion_tokens
        notes.append("the data is made first; completions were taken to be as long as they may be")
    else:
        read = plan.data.rows[:PROMPTS]
        prompts = [_longest([row["prompt"]], tokenizer, None) if "prompt" in row else 0 for row in read]
        answers = [max(_longest([v], tokenizer, None) for k, v in row.items() if k in TEXTS) for row in read]
        longest = max(prompt + answer for prompt, answer in zip(prompts, answers, strict=True))
    length = longest if limit is None else min(longest, limit)
    prompt = min(min(prompts), length - 1)  # all behind the shortest is scored
    return Batches(
        rows=rows * (2 if plan.algorithm.data in ("preference", "triple") else 1),  # chosen and rejected together
        prompt=prompt,
        completion=length - prompt,
        passes=passes,
        generated=plan.generate if plan.data is None else 0,
        group=8 if plan.data is None else 1,
        outputs=outputs,
        reference=bool({"DPOTrainer", "KTOTrainer"} & set(kinds)),
    )


def _longest(prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, kwargs: Any) -> int:
    """Tokens of the longest of `prompts`, texts or messages."""
    if tokenizer is None:
        texts = [p if isinstance(p, str) else "".join(str(m.get("content")) for m in p) for p in prompts]
        return max(math.ceil(len(text) / CHARACTERS) for text in texts)
    return max(len(_encoded(prompt, tokenizer, kwargs or {})) for prompt in prompts)


def _encoded(prompt: Any, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> Sequence[int]:
    if not isinstance(prompt, str):
        if tokenizer.chat_template is not None:
            made = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **kwargs)
            return made["input_ids"]
        prompt = "".join(str(message.get("content")) for message in prompt)
    return tokenizer(prompt)["input_ids"]
