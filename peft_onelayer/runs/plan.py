"""What a run's settings come to before a model is loaded: task, recipe, configuration; or one line why not."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from peft_onelayer.records.adapter_config import MaskRecord
from peft_onelayer.rl.algorithms import Algorithm, load_algorithm
from peft_onelayer.rl.boost import parse_boost
from peft_onelayer.rl.preferences import OfflineData, load_preferences
from peft_onelayer.rl.recipe import Recipe, make_recipe, refuse_fields, refuse_without_effect
from peft_onelayer.rl.sampling import PAIRS_OPTIONS, sampling_of_run, with_given
from peft_onelayer.rl.training import generation_steps, prompts_needed, rows_of_step, steps_of_epochs
from peft_onelayer.rollouts.prompts import Shape, check_prompt, shown_rows
from peft_onelayer.rollouts.sampling import check_room
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task, open_task
from peft_onelayer.tuner.mask import Mask

from .reporting import reporters
from .settings import GENERATE, STEPS, TRAINING_OPTIONS, TrainingSettings

SAMPLES_PER_PAIR = 8


class TrainingPlan:
    """What `settings` come to.

    Attributes:
        task: prompts and rewards; None where an offline algorithm reads its data.
        data: that data, or None.
        algorithm: and the `recipe` with it, as `make_recipe` has it.
        config: of the trainer.
        boost: blocks and factor of their learning rate, where everything trains; None for none.
        mask: record of the entries that train; None for all of the blocks'.
        sampling: of a ranking or of pairs, as the run itself samples; None where neither is wanted and vLLM samples.

    Raises:
        ValueError: settings that cannot work, in one line.
    """

    def __init__(self, settings: TrainingSettings, checkpoints: Path) -> None:
        self.settings, self.checkpoints = settings, checkpoints
        self.task = _open_task(settings)
        if self.task is not None:
            self.task.rows("train", 1, settings.seed)  # what raises there is said once, and before the model is loaded
        self.recipe = self._recipe(self.task)
        self.algorithm: Algorithm = self.recipe.algorithm
        check_task(self.algorithm, self.task)
        if self.task is not None:
            shown_rows(self.task, settings.shots)
        elif settings.system or settings.shots:
            raise ValueError("--system and --shots are of a task's prompts; the rows of --dataset hold their own")
        self.config = self._config()
        self.sampling = self._sampling()
        self.data: OfflineData | None = None
        if settings.dataset and self.task is None:
            self.data = load_preferences(settings.dataset, self.algorithm.data)
        self.boost = None if settings.boost is None else parse_boost(settings.boost)
        self.mask = None if settings.mask is None else MaskRecord(**Mask.read(settings.mask).record())

    def _recipe(self, task: Task | None) -> Recipe:
        own = TRAINING_OPTIONS
        if self.settings.top_entropy is not None:
            own = {**own, "top_entropy_quantile": "--top-entropy"}
        refuse_fields(self.settings.config, own)
        refuse_without_effect(self.settings.config, load_algorithm(self.settings.algorithm))
        return make_recipe(
            self.settings.algorithm,
            task,
            self.settings.config,
            prompts=self.settings.prompts,
            completions=self.settings.completions,
            learning_rate=self.settings.learning_rate,
            top_entropy=self.settings.top_entropy,
        )

    def _config(self) -> TrainingArguments:
        settings, given = self.settings, self.recipe.given
        defaults: dict[str, Any] = {"logging_steps": 1, "disable_tqdm": True, "save_total_limit": 2}
        defaults["save_steps"] = 0.1  # of all steps
        if settings.full:  # TRL loads the reference model anew
            if settings.revision:
                defaults["model_init_kwargs"] = {"revision": settings.revision}
            if settings.trust_remote_code:
                defaults["trust_remote_code"] = True
        fixed: dict[str, Any] = {
            "output_dir": str(self.checkpoints),
            "seed": settings.seed,
            "max_steps": settings.steps or (STEPS if self.algorithm.online else -1),
        }
        fixed["report_to"] = reporters(settings.report_to)
        make = partial(self.recipe.config, **{k: v for k, v in defaults.items() if k not in given})
        if self.algorithm.online and "num_train_epochs" in given:
            fixed["max_steps"] = self._steps_of_epochs(make(**fixed | {"max_steps": 1}))
        config = make(**fixed)
        if config.max_steps > 0:
            self.save_between_generations(config, config.max_steps)
        return config

    def save_between_generations(self, config: TrainingArguments, steps: int) -> None:
        """Of a run of so many steps round the default `save_steps` up to steps that end with a generation, where some
        do not: elsewhere it cannot be resumed as it was."""
        every = generation_steps(config)
        if every > 1 and config.save_steps < 1 and "save_steps" not in self.recipe.given:
            config.save_steps = math.ceil(config.save_steps * steps / every) * every

    def _steps_of_epochs(self, config: TrainingArguments) -> int:
        """The optimizer steps of `num_train_epochs` over the task's train split, all of which is then drawn."""
        assert self.task is not None
        size = self.task.train_size
        if size is None:
            raise ValueError(
                f"num_train_epochs needs data with an end, and task {self.task.name} draws prompts without one; use "
                "--steps"
            )
        size -= self.settings.shots or 0  # those that are shown are not trained on
        steps = steps_of_epochs(self.algorithm, config, size) if size > 0 else 0
        if steps < 1:
            raise ValueError(
                f"{size} prompts, num_train_epochs={config.num_train_epochs:g}: no step; use more epochs or a smaller "
                "--set per_device_train_batch_size"
            )
        return steps

    def _sampling(self) -> Sampling | None:
        """How the ranking or the pairs are sampled, as the run itself is; None where neither is wanted."""
        settings = self.settings
        if not (settings.pairs_from_task or (settings.layer == "auto" and not settings.full)):
            # What vLLM alone understands is no fault of a run that samples with it.
            return None if self.config.to_dict().get("use_vllm") else sampling_of_run(self.algorithm, self.config)
        own = sampling_of_run(self.algorithm, self.config)
        own = replace(own, samples=SAMPLES_PER_PAIR, seed=settings.seed, batch_size=self.generate)
        return with_given(own, settings.sampling, PAIRS_OPTIONS)

    @property
    def generate(self) -> int:
        """Completions at a time where there are no gradients."""
        return max(GENERATE, self.config.per_device_train_batch_size)

    @property
    def shape(self) -> Shape:
        """How prompts are given."""
        kwargs = self.sampling.chat_template_kwargs if self.sampling else self.recipe.given.get("chat_template_kwargs")
        return Shape(self.settings.chat, self.settings.system, self.settings.shots or 0, kwargs)

    def check_prompts(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> None:
        """Refuse prompts that are too few for a step, that the tokenizer cannot write, or that leave no room for a
        completion in the context of `model`; without it this is not looked at."""
        assert self.task is not None
        rows = rows_of_step(self.task, self.recipe, self.config, self.settings.seed)
        plays = self.task.environment_factory is not None
        check_prompt(rows[0], tokenizer, self.settings.model, self.shape.template_kwargs, plays=plays)
        generates = self.algorithm.online and not self.config.to_dict().get("use_vllm")  # vLLM looks for itself
        if model is not None and generates:
            check_room(model, tokenizer, self.task, rows, sampling_of_run(self.algorithm, self.config))

    def rows(self) -> list[dict[str, Any]]:
        """What is trained on, in its order."""
        if self.data is not None:
            return self.data.rows
        assert self.task is not None
        needed = prompts_needed(self.algorithm, self.config)
        if "num_train_epochs" in self.recipe.given and self.task.train_size:
            needed = self.task.train_size
        return self.task.rows("train", needed, self.settings.seed)


def _open_task(settings: TrainingSettings) -> Task | None:
    """The task that prompts and rewards come from; None where an offline algorithm reads its data."""
    if load_algorithm(settings.algorithm).online or settings.pairs_from_task:
        return open_task(settings.task, settings.dataset, settings.reward, unsafe=settings.unsafe)
    return None


def check_task(algorithm: Algorithm, task: Task | None) -> None:
    """Refuse a task that the algorithm cannot train on."""
    if task is not None and task.environment_factory is not None and not algorithm.environments:
        raise ValueError(
            f"task {task.name} plays through an environment, which {algorithm.name} cannot; use grpo or gigpo"
        )
    if algorithm.needs_environment and (task is None or task.environment_factory is None):
        raise ValueError(f"{algorithm.name} needs a task with an environment, such as textworld")
