"""One training run: a trainer of TRL, its data, and the blocks to train."""

from __future__ import annotations

import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from packaging.version import Version
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_onelayer.records.figures import CompletionStatistics
from peft_onelayer.sparse.base import OtherBaseError
from peft_onelayer.tasks import Task
from peft_onelayer.tuner import SingleLayerConfig

from .algorithms import Algorithm
from .ema import TEACHER, copy_adapter
from .packing import packed_prompts
from .prefix import shared_prefix
from .prompts import shared_prompts
from .recipe import BATCH_FIELDS, GENERATION_FIELDS, PASSES_FIELD, Recipe, demo_recipe, of_full_training
from .rows import NO_ANSWER, graded_by_row, numbered, reset_by_row
from .scored import scored_positions

OnStep = Callable[[int, float], None]
OnLog = Callable[[int, Mapping[str, float]], None]
Share = Callable[[Trainer], object]
EQUALS_BASE = r"every weight of the adapter .* equals the base model's"  # how the warning of saving begins


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves.

    Attributes:
        model: the trained model, wrapped unless everything was trained.
        rewards: the mean reward at every log that has one, which is by default every step that begins with a
            generation; empty for offline algorithms.
        reward_steps: the steps of these logs.
        losses: the loss at every log.
        steps: optimizer steps, those before a resumption counted.
        tokens_generated: tokens of all completions of the run; 0 for offline algorithms, and where TRL logs no lengths.
        tokens_trained: prompt and completion tokens that the trainer counted; 0 where it counts none.
        completions: what the completions looked like; None where the trainer does not say.
        equal_rewards: share of the prompts whose completions all got one reward; None where the trainer does not say.
    """

    model: PeftModel | PreTrainedModel
    rewards: list[float]
    reward_steps: list[int]
    losses: list[float]
    steps: int
    tokens_generated: int
    tokens_trained: int
    completions: CompletionStatistics | None = None
    equal_rewards: float | None = None


class _Progress(TrainerCallback):
    """Reports every log of a step, and the last reward or, where none is logged, the loss."""

    def __init__(self, on_step: OnStep, on_log: OnLog) -> None:
        self.on_step, self.on_log_of_step = on_step, on_log
        self.reward: float | None = None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and ("reward" in logs or "loss" in logs):
            self.on_log_of_step(state.global_step, logs)
            self.reward = logs.get("reward", self.reward)
            self.on_step(state.global_step, logs["loss"] if self.reward is None else self.reward)


class _NoPickle(TrainerCallback):
    """Takes the pickled configuration out of every checkpoint: it may hold secrets, and nothing reads it."""

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)


def train_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    config: TrainingArguments,
    rows: Sequence[dict[str, Any]],
    *,
    layers: int | str | list[int] | PeftConfig | None,
    task: Task | None = None,
    resume_from: Path | None = None,
    init_adapter: Path | None = None,
    save_to: Path | None = None,
    on_step: OnStep = lambda step, value: None,
    on_log: OnLog = lambda step, logs: None,
    callbacks: Sequence[TrainerCallback] = (),
    mask: str | None = None,
    boost: tuple[list[int], float] | None = None,
    at_end: Callable[[nn.Module], None] = lambda model: None,
    share: Share = shared_prefix,
) -> TrainingResult:
    """Train `layers` of `model` on `rows` with the trainer of the recipe's algorithm.

    `model` is wrapped in place. On the same machine the same arguments give the same weights, and a run resumed from a
    checkpoint those of an uninterrupted one.

    Args:
        config: `recipe.config(...)`.
        rows: the training data, in the columns that the algorithm takes.
        layers: what `SingleLayerConfig` takes, None to train every parameter of the model, or the configuration of
            another PEFT method to compare with.
        task: gives an online algorithm its reward and, for agents, its environments.
        resume_from: a checkpoint of an interrupted run.
        init_adapter: folder of an adapter of the same blocks to start from, an EMA teacher too. A reference model
            stays the base.
        save_to: folder for what `Trainer.save_model` writes: the adapter in float32, or the model in its own dtype.
        on_step: called at every log with the step and the last mean reward that was logged, or the loss where none is.
        on_log: called before it with the step and all that the trainer logged.
        callbacks: for the trainer.
        mask: file of the entries of these layers that train, as `SingleLayerConfig` takes it.
        boost: of full training: blocks, and the factor of their learning rate.
        at_end: is given the trained model before it is saved.
        share: is given the trainer of blocks before it trains, and shares the work of the frozen ones.
    """
    algorithm = recipe.algorithm
    trainer_class = algorithm.trainer_class(adapter=layers is not None)
    if recipe.top_entropy:
        from .entropy import TopEntropyMixin

        trainer_class = type(trainer_class.__name__, (TopEntropyMixin, trainer_class), {})
    if boost is not None:
        from .boost import boosted

        trainer_class = boosted(trainer_class, *boost)
    dtype = model.dtype
    if layers is None:
        model = model.float()  # as a block's: bfloat16 drops most updates of RL's size
        config = of_full_training(config, recipe, dtype)
    rows = list(rows)
    arguments: dict[str, Any] = {}
    if algorithm.online and task is not None:
        arguments["train_dataset"] = numbered(rows)
        arguments["reward_funcs"] = graded_by_row(task.reward, rows, task.answer)
        if task.environment_factory is not None:
            arguments["environment_factory"] = reset_by_row(task.environment_factory, rows)
    else:
        arguments["train_dataset"] = Dataset.from_list(rows)
    if layers is not None:
        peft_config = (
            layers
            if isinstance(layers, PeftConfig)
            else SingleLayerConfig(layer=layers, mask=mask, task_type="CAUSAL_LM")
        )
        if algorithm.takes_peft_config:
            arguments["peft_config"] = peft_config
        else:
            model = get_peft_model(model, peft_config)
    trainer = trainer_class(
        model,
        args=config,
        processing_class=tokenizer,
        callbacks=[_Progress(on_step, on_log), *callbacks],
        **arguments,
    )
    if layers is not None and not (isinstance(layers, PeftConfig) and not isinstance(layers, SingleLayerConfig)):
        share(trainer)  # another method has no frozen blocks below a trained one
    if algorithm.online:
        shared_prompts(trainer)
    packed_prompts(trainer)
    scored_positions(trainer)
    trainer.add_callback(_NoPickle())
    trainer.remove_callback(PrinterCallback)  # it prints every log to stdout
    if init_adapter is not None and resume_from is None:
        try:
            set_peft_model_state_dict(trainer.model, load_peft_weights(str(init_adapter), device="cpu"))
        except OtherBaseError as error:
            raise ValueError(error.problem) from error
        if TEACHER in trainer.model.peft_config:
            copy_adapter(trainer.model, "default", TEACHER)
    if resume_from is not None:
        refuse_incomplete_resume(trainer.model)
    with warnings.catch_warnings():
        # A checkpoint early in a run may well hold the base's weights; what is left at the end is saved below.
        warnings.filterwarnings("ignore", EQUALS_BASE)
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    at_end(trained)
    if layers is None:
        trained.to(dtype)
    if save_to is not None:
        trainer.save_model(str(save_to))
    logs = trainer.state.log_history
    return TrainingResult(
        model=trained,
        rewards=[log["reward"] for log in logs if "reward" in log],
        reward_steps=[log["step"] for log in logs if "reward" in log],
        losses=[log["loss"] for log in logs if "loss" in log],
        steps=trainer.state.global_step,
        tokens_generated=_tokens_generated(logs, config),
        tokens_trained=int(trainer.state.num_input_tokens_seen) or _tokens_counted(logs),
        completions=_completions(logs, config),
        equal_rewards=_mean(logs, "frac_reward_zero_std"),
    )


def refuse_incomplete_resume(model: nn.Module) -> None:
    """Raise ValueError if transformers would not load all of the model's adapters from a checkpoint."""
    adapters = list(getattr(model, "peft_config", {}))
    if len(adapters) > 1 and Version(transformers.__version__) < Version("5.23.0.dev0"):
        raise ValueError(
            f"transformers {transformers.__version__} cannot resume a run with the adapters {', '.join(adapters)}: it "
            "would load all but the trained one; install transformers 5.23 or later."
        )


def completions_per_step(config: TrainingArguments) -> int:
    """Rows of an optimizer step over all processes; of an online algorithm, completions."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size


def _generation(config: TrainingArguments) -> tuple[int, int]:
    """Completions of a generation over all processes, and the batches of a process that train on them; of a trainer
    without generations those of a batch, and 1."""
    fields = config.to_dict()
    completions = fields.get("generation_batch_size") or config.per_device_train_batch_size * config.world_size
    return completions, fields.get("steps_per_generation", 1) * fields.get("num_iterations", 1)


def generation_steps(config: TrainingArguments) -> int:
    """Every how many optimizer steps a step and a generation end together; 1 where no step is in the middle of one.

    Elsewhere a run cannot be resumed as it was: no checkpoint holds the completions that are still to be trained on.
    """
    _, batches = _generation(config)
    return math.lcm(batches, config.gradient_accumulation_steps) // config.gradient_accumulation_steps


def completions_generated(config: TrainingArguments, steps: int) -> int:
    """Completions over all processes that so many optimizer steps generate, those of a begun generation in full."""
    completions, batches = _generation(config)
    return math.ceil(steps * config.gradient_accumulation_steps / batches) * completions


def prompts_needed(algorithm: Algorithm, config: TrainingArguments, steps: int | None = None) -> int:
    """How many prompts a run of `steps` (default: `config.max_steps`) draws, in whole generations."""
    group = config.to_dict()[algorithm.group_size] if algorithm.group_size else 1
    return completions_generated(config, steps or config.max_steps) // group


def prompts_of_pass(algorithm: Algorithm, config: TrainingArguments, rows: int) -> int:
    """How many of so many prompts are drawn in a pass: whole generations (trl's RepeatSampler leaves out the rest)."""
    of_one = _generation(config)[0] // config.to_dict()[algorithm.group_size] if algorithm.group_size else 1
    return rows // of_one * of_one


def rows_of_step(task: Task, recipe: Recipe, config: TrainingArguments, seed: int) -> list[dict[str, Any]]:
    """The training rows of a run's first step; of an offline algorithm the first row.

    Raises:
        ValueError: the task has fewer, and the trainer would take no step.
    """
    needed = prompts_needed(recipe.algorithm, config, steps=1) if recipe.algorithm.online else 1
    rows = task.rows("train", needed, seed)
    if len(rows) < needed:
        by_fields = any(name in recipe.given for name in BATCH_FIELDS)
        by_prompts = not by_fields or PASSES_FIELD in recipe.settings.keys() - recipe.given.keys()
        option = "--prompts" if by_prompts else "--set per_device_train_batch_size"
        what, of_step = "step", completions_per_step(config) // config.to_dict().get(recipe.algorithm.group_size, 1)
        if needed > of_step:
            what, given = "generation", [name for name in GENERATION_FIELDS if name in recipe.given]
            option = f"--set {given[0]}"
        raise ValueError(
            f"one {what} draws {needed} prompts and task {task.name} has {len(rows)}; use a smaller {option}"
        )
    return rows


def steps_of_epochs(algorithm: Algorithm, config: TrainingArguments, rows: int) -> int:
    """How many optimizer steps the trainer takes in `config.num_train_epochs` over so many rows."""
    if algorithm.group_size:
        completions, batches_of_one = _generation(config)
        of_pass = prompts_of_pass(algorithm, config, rows) * config.to_dict()[algorithm.group_size]
        batches = of_pass // completions * batches_of_one
    else:
        rounded = math.floor if config.dataloader_drop_last else math.ceil
        batches = rounded(rows / (config.per_device_train_batch_size * config.world_size))
    return math.ceil(math.ceil(batches / config.gradient_accumulation_steps) * config.num_train_epochs)


def _tokens_generated(logs: list[dict[str, float]], config: TrainingArguments) -> int:
    """The sum of completion lengths; TRL logs their mean over the generations since the log before."""
    tokens, counted = 0.0, 0
    for log in logs:
        if "completions/mean_length" in log:
            generated = completions_generated(config, int(log["step"]))
            tokens += log["completions/mean_length"] * (generated - counted)
            counted = generated
    return round(tokens)


def _tokens_counted(logs: list[dict[str, float]]) -> int:
    """What an offline trainer counted, which begins at 0 again when a run is resumed."""
    total = last = 0.0
    for log in logs:
        if "num_tokens" in log:
            total, last = total + (last if log["num_tokens"] < last else 0.0), log["num_tokens"]
    return round(total + last)


def _completions(logs: list[dict[str, float]], config: TrainingArguments) -> CompletionStatistics | None:
    """What the completions looked like, from what TRL logs of them."""
    length, cut = _mean(logs, "completions/mean_length"), _mean(logs, "completions/clipped_ratio")
    if length is None or cut is None:
        return None
    generated = completions_generated(config, max(int(log["step"]) for log in logs))
    return CompletionStatistics(generated, round(length, 2), cut, _mean(logs, NO_ANSWER))


def _mean(logs: list[dict[str, float]], name: str) -> float | None:
    values = [log[name] for log in logs if name in log]
    return statistics.fmean(values) if values else None


def train_layer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    layer: int | str | list[int] | PeftConfig | None,
    *,
    steps: int,
    seed: int,
    recipe: Recipe | None = None,
    on_step: OnStep = lambda step, reward: None,
    share: Share = shared_prefix,
) -> TrainingResult:
    """Train `layer` of `model`, or with None all of it, on `task` for `steps` steps and leave nothing on disk.

    `model` is wrapped in place; the same seed on the same machine gives the same weights.

    Args:
        steps: optimizer steps, at least 1.
        recipe: an online algorithm (default: `demo_recipe`).
        on_step: called after every step with its number and mean reward.
        share: as of `train_rows`.

    Raises:
        ValueError: the task has fewer prompts than a step draws in groups.
    """
    recipe = recipe or demo_recipe(task, steps)
    with tempfile.TemporaryDirectory() as scratch:
        config = recipe.config(
            output_dir=scratch,
            seed=seed,
            max_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        )
        if recipe.algorithm.group_size:  # trl's RepeatSampler leaves out what is no whole batch of groups
            rows_of_step(task, recipe, config, seed)
        rows = task.rows("train", prompts_needed(recipe.algorithm, config), seed)
        return train_rows(model, tokenizer, recipe, config, rows, layers=layer, task=task, on_step=on_step, share=share)
