"""The one way from an algorithm, a task and a user's settings to the configuration of a training run."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft_onelayer.records.privacy import without_secrets
from peft_onelayer.records.text import one_line
from peft_onelayer.tasks import Task

from .algorithms import Algorithm, load_algorithm
from .settings import check_fields, convert_settings, parse_settings

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

LEARNING_RATE = 5e-6  # arXiv 2607.01232, Table 8, for one block and for all parameters; where the search for one starts
PROMPTS, COMPLETIONS = 8, 8  # of an optimizer step
PASS = 8  # completions in one pass: TRL's default batch of a device
# Fields that say how large a step is: with one of these given, and no prompts, a step is what TRL makes of them.
PASS_FIELD, PASSES_FIELD = BATCH_FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Fields that say how large a generation is: the first in passes, the second in completions.
GENERATION_FIELDS = ("steps_per_generation", "generation_batch_size")
# What a trainer sends on its own holds optimizer states, a pickle and paths, in a repository called "checkpoints".
HUB_FIELDS = {"push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"}
HUB_FIELDS |= {"hub_revision"}
DEMO_LEARNING_RATE = 3e-3  # for one block of the demo model
DEMO_WARMUP_STEPS = 5

# Fields that a run without an evaluation set does not heed.
OF_EVALUATION = frozenset(
    (
        "batch_eval_metrics",
        "generate_during_eval",
        "greater_is_better",
        "include_for_metrics",
        "load_best_model_at_end",
        "metric_for_best_model",
        "num_generations_eval",
        "per_device_eval_batch_size",
        "prediction_loss_only",
    )
)
NOT_HEEDED = {
    "do_train": "this command trains; leave it out",
    "do_eval": "a run evaluates nothing; use onelayer eval afterwards",
    "do_predict": "a run predicts nothing; use onelayer eval afterwards",
    "reward_model_path": "the reward is the task's; give a task or --reward that asks the model",
}


@dataclass(frozen=True)
class Recipe:
    """An algorithm with the values of its configuration's fields, from which runs of several lengths can be made.

    Attributes:
        algorithm: the algorithm.
        settings: values by field of `algorithm.config_class`.
        top_entropy: whether the loss is divided by the number of tokens that `top_entropy_quantile` selects.
        given: those of the settings that the user gave, for messages.
    """

    algorithm: Algorithm
    settings: Mapping[str, Any]
    top_entropy: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> TrainingArguments:
        """The configuration, with `changes` over the settings.

        Raises:
            ValueError: in one line, what the configuration refuses.
        """
        config_class = self.algorithm.config_class
        try:
            return config_class(**{**self.settings, **changes})
        # ArithmeticError: GRPOConfig divides by num_generations before it looks at it.
        except (ValueError, TypeError, ImportError, ArithmeticError) as error:
            given = ", ".join(f"{k}={v}" for k, v in without_secrets(self.given).items()) or "the settings"
            raise ValueError(f"{config_class.__name__} refused {given}: {one_line(error)}") from error


def make_recipe(
    algorithm: str | Algorithm,
    task: Task | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    prompts: int | None = None,
    completions: int | None = None,
    learning_rate: float | None = None,
    top_entropy: float | None = None,
) -> Recipe:
    """The algorithm's settings for `task`, with the user's `config` over them.

    What neither sets is TRL's default, but for the learning rate of an online algorithm (`LEARNING_RATE`) and its step
    (`PROMPTS` x `COMPLETIONS`, in passes of `PASS`), the length of a completion (the task's), and on a machine without
    a GPU the dtype.

    Args:
        algorithm: a name for `load_algorithm`, or an algorithm.
        task: gives completions their length; None for offline data.
        config: values by field of the algorithm's configuration.
        prompts: of an optimizer step, over all processes; None for `PROMPTS`, or what `BATCH_FIELDS` in `config` say.
        completions: of a prompt; None for what `config` says, or `COMPLETIONS`.
        learning_rate: the same as the field of `config`.
        top_entropy: train on this share of the tokens, those of highest entropy; None for all.

    Raises:
        ValueError: an unknown algorithm or field, with the near ones; a step that cannot be divided, or that is said
            twice; `top_entropy` that is no share, or with an algorithm that does not take it.
    """
    algorithm = load_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
    settings = device_settings()
    given = dict(config or {})
    if learning_rate is not None:
        if "learning_rate" in given:
            raise ValueError("--learning-rate and --set learning_rate say the same; give one of them")
        given["learning_rate"] = learning_rate
    if algorithm.online:
        settings["learning_rate"] = LEARNING_RATE
        settings |= _step(algorithm, given, prompts, completions)
    elif prompts or completions:
        raise ValueError(f"--prompts and --completions are of algorithms that generate; {algorithm.name} is offline")
    if algorithm.completion_length and task is not None:
        settings[algorithm.completion_length] = task.max_completion_tokens
    if top_entropy is not None:
        if not (0 < top_entropy < 1 and algorithm.takes_entropy):
            raise ValueError(
                "--top-entropy takes a share between 0 and 1 and works with the losses of GRPOTrainer; got "
                f"{top_entropy} with {algorithm.name}"
            )
        settings["top_entropy_quantile"] = top_entropy
    check_fields(algorithm.config_class, given)
    return Recipe(algorithm, {**settings, **algorithm.settings, **given}, top_entropy is not None, given)


def _step(
    algorithm: Algorithm, given: Mapping[str, Any], prompts: int | None, completions: int | None
) -> dict[str, Any]:
    """The fields that make a step of so many prompts and completions, in passes that a device has room for."""
    group = algorithm.group_size
    if completions is not None and (group is None or group in given):
        why = f"--set {group} says the same" if group else f"{algorithm.name} has its own number of them"
        raise ValueError(f"--completions {completions}: {why}; leave it out")
    size = 1
    fields: dict[str, Any] = {}
    if group is not None:
        size = given.get(group, completions or COMPLETIONS)
        fields[group] = size
    if prompts is None and any(name in given for name in BATCH_FIELDS):
        return fields
    if PASSES_FIELD in given:
        raise ValueError(f"--prompts {prompts} and --set {PASSES_FIELD} both say how large a step is; give one of them")
    total, processes = (prompts or PROMPTS) * size, int(os.environ.get("WORLD_SIZE", "1"))
    step = f"a step of {prompts or PROMPTS} prompts" + (f" x {size} completions" if group else "")
    each, rest = divmod(total, processes)
    if rest or not each:
        raise ValueError(f"{step} does not divide among {processes} processes; change --prompts or --completions")
    fitting = fitting_pass(each)
    together = given.get(PASS_FIELD) or fitting
    if each % together:
        raise ValueError(
            f"{step} is {each} per process, which passes of {PASS_FIELD}={together} do not divide; give one that does, "
            f"such as --set {PASS_FIELD}={fitting}"
        )
    return {**fields, PASS_FIELD: together, PASSES_FIELD: each // together}


def fitting_pass(completions: int) -> int:
    """Completions in a pass where a process has so many of them in a step: at most `PASS`."""
    return max(n for n in range(1, min(PASS, completions) + 1) if completions % n == 0)


def step_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that say how large a step is: with them as `config`, and neither `prompts` nor
    `completions`, `make_recipe` makes the same step."""
    names = {*BATCH_FIELDS, *GENERATION_FIELDS, recipe.algorithm.group_size}
    return {name: value for name, value in recipe.settings.items() if name in names}


def config_from_text(
    algorithm: str | Algorithm, texts: Sequence[str], own_options: Mapping[str, str]
) -> dict[str, Any]:
    """The values of `--set field=value` texts, by field.

    Args:
        own_options: fields that an option of the command sets, and the option: {"seed": "--seed"}.

    Raises:
        ValueError: in one line: a malformed text, an unknown field (with near ones), a field with an option of its own,
            or a value of another type.
    """
    algorithm = load_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
    parsed = parse_settings(texts)
    refuse_fields(parsed, own_options)
    return convert_settings(algorithm.config_class, parsed)


def refuse_fields(config: Mapping[str, Any], own_options: Mapping[str, str], option: str = "--set or config") -> None:
    """Raise ValueError for a field that something else sets, by what `own_options` says of it, and for `HUB_FIELDS`."""
    for name in config:
        if name in own_options:
            raise ValueError(f"field {name} is set by {own_options[name]}, not by {option}")
        if name in HUB_FIELDS:
            raise ValueError(
                f"field {name} would have the trainer send its checkpoints as they are; train without it, and publish "
                "the finished adapter with onelayer push (push_adapter)"
            )


def refuse_without_effect(config: Mapping[str, Any], algorithm: Algorithm) -> None:
    """Raise ValueError for a field that the user set and no run of ours heeds, with what to do instead."""
    for name, value in config.items():
        if name in OF_EVALUATION or name.startswith("eval_"):
            raise ValueError(f"field {name} has no effect: a run evaluates nothing; use onelayer eval afterwards")
        if name in NOT_HEEDED:
            raise ValueError(f"field {name} has no effect: {NOT_HEEDED[name]}")
        if name == "remove_unused_columns" and value and algorithm.online:
            raise ValueError(f"field {name} would take the columns from the reward; leave it out")


def device_settings() -> dict[str, Any]:
    """Fields of a TRL configuration that depend on the machine: TRL's default bf16 is refused without a GPU."""
    import torch

    return {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}


def of_full_training(config: TrainingArguments, recipe: Recipe, dtype: torch.dtype) -> TrainingArguments:
    """The configuration for all parameters of a base in `dtype`: on a CPU too a bfloat16 base computes in bfloat16, by
    autocast over its float32 weights, as TRL's default does on a GPU and as a block of it does anyway.

    In float32 it would learn from updates that bfloat16 rounds away, and could not be compared with a block. Fields
    `bf16` and `fp16` that the user gave are kept.
    """
    if not config.use_cpu or str(dtype) != "torch.bfloat16" or {"bf16", "fp16"} & recipe.given.keys():
        return config
    config = copy.copy(config)
    config.bf16, config.mixed_precision = True, "bf16"
    return config


def demo_config(steps: int) -> dict[str, Any]:
    """The demo's fields of GRPO's configuration for a run of `steps`: 24 prompts x 8 completions a step, on policy.

    Plain GRPO (arXiv 2402.03300: advantages normalised by the group's standard deviation) without a KL term, AdamW
    without weight decay, gradient norm clipped at 1, linear warm-up and linear decay to 0.
    """
    return {
        "bf16": False,  # the base's own dtype; the trained block is float32 anyway
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 24 * 8,
        "num_generations": 8,
        "temperature": 1.0,
        "top_k": 0,
        "beta": 0.0,
        "learning_rate": DEMO_LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "warmup_steps": min(DEMO_WARMUP_STEPS, steps - 1),
        "adam_beta2": 0.99,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }


def demo_recipe(task: Task, steps: int) -> Recipe:
    """GRPO on `task` with `demo_config`."""
    return make_recipe("grpo", task, demo_config(steps))
