"""What `train` measures beside training: held-out problems before, during and after, and the verdict that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from peft_onelayer.records.figures import Measured
from peft_onelayer.rl.algorithms import Algorithm
from peft_onelayer.rl.sampling import PAIRS_OPTIONS, sampling_of_run, with_given
from peft_onelayer.rl.training import TrainingResult, completions_generated, completions_per_step
from peft_onelayer.rollouts.completions import compare_completions
from peft_onelayer.rollouts.evaluation import Evaluation
from peft_onelayer.rollouts.prompts import Shape, shaped, shown_rows
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task, open_task

from .heldout import FEWEST, PROBLEMS, SAMPLES, SHARE, HeldOut, Watch, held_out, sharded
from .measuring import Timed, measured
from .progress import Progress
from .settings import TrainingSettings
from .verdict import same_completions, verdict


class Judge:
    """The measurements of one run, in the order of its methods.

    Args:
        settings: of the run.
        algorithm: its.
        config: of its trainer.
        task: the run's own; None for data without one.
        batch_size: completions at a time.
        progress: is told what goes on.

    Raises:
        ValueError: options that cannot work, or a task or a test split that is not there.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        algorithm: Algorithm,
        config: TrainingArguments,
        task: Task | None,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self.settings, self.algorithm, self.config, self.progress = settings, algorithm, config, progress
        self.batch_size = batch_size
        for option, value, least in (("problems", settings.eval_problems, 0), ("every", settings.eval_every, 1)):
            if value is not None and value < least:
                raise ValueError(f"--eval-{option} must be at least {least}, got {value}")
        if task is None and (settings.eval_every or settings.eval_problems or settings.show):
            raise ValueError(
                "--eval-problems, --eval-every and --show need a task with a reward; data alone has none (--also does)"
            )
        if sharded(config) and (settings.eval_every or settings.eval_problems or settings.also):
            raise ValueError(
                "a model that is sharded over processes cannot be measured while it trains; leave --eval-problems, "
                "--eval-every and --also out and use onelayer eval"
            )
        self.also = [open_task(name, unsafe=settings.unsafe) for name in settings.also]
        names = [own.name for own in ([task] if task else []) + self.also]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"--also {twice[0]} is measured already; name other tasks")
        for own in self.also:
            own.rows("test", 1, settings.seed)
            shown_rows(own, settings.shots)
        self.problems = self._problems(task)
        if task is not None and self.problems:
            self.problems = self._with_test_split(task)
        self.tasks: list[HeldOut] = []
        self.base: list[Timed] = []
        self.watched: Timed | None = None
        self.watch = Watch(Path())

    def _problems(self, task: Task | None) -> int:
        """Held-out problems of the run's own task."""
        settings = self.settings
        if task is None or sharded(self.config):
            return 0
        if settings.eval_problems is not None:
            return settings.eval_problems
        if settings.eval_every or settings.also:
            return PROBLEMS
        if settings.pairs_from_task:
            completions = settings.pairs_from_task * 8
        else:
            completions = completions_generated(self.config, max(self.config.max_steps, 0))
        problems = min(PROBLEMS, completions // SHARE)
        if settings.show:
            return max(problems, FEWEST)
        return problems if problems >= FEWEST else 0

    def _with_test_split(self, task: Task) -> int:
        """`problems`, or 0 where the task has no test split and nobody asked for it."""
        asked = self.settings.eval_problems or self.settings.eval_every or self.settings.show
        try:
            task.rows("test", 1, self.settings.seed)
            self._sampling()
        except ValueError as error:
            if asked:
                raise
            self.progress.note(f"no verdict at the end: {error}")
            return 0
        return self.problems

    def _sampling(self) -> Sampling:
        """As the run samples."""
        own = sampling_of_run(self.algorithm, self.config)
        own = with_given(own, self.settings.sampling, PAIRS_OPTIONS)
        return replace(own, samples=SAMPLES, seed=self.settings.seed, batch_size=self.batch_size)

    def before(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task | None, shape: Shape
    ) -> None:
        """Measure the base; `task` is the run's own, its prompts in `shape`, which those of other tasks get too."""
        settings, self.tokenizer = self.settings, tokenizer
        if task is not None and self.problems:
            own = held_out(
                task, self.problems, settings.seed, self._sampling(), watched=settings.eval_every is not None
            )
            self.tasks.append(own)
        if self.also:
            sampling = replace(self._sampling(), max_completion_tokens=None)  # the run's limit is its own task's
            for other in self.also:
                as_given, _ = shaped(other, tokenizer, shape)
                self.tasks.append(held_out(as_given, self.problems or PROBLEMS, settings.seed, sampling))
        if not self.tasks:
            return
        names = ", ".join(f"{len(own.rows)} of {own.task.name}" for own in self.tasks)
        count = 2 * SAMPLES * sum(len(own.rows) for own in self.tasks)
        self.progress.note(
            f"held-out problems: {names}; {count:,} completions before and after; --eval-problems sets another number"
        )
        self.base = [own.measure(base, tokenizer, self.progress, "base") for own in self.tasks]
        if self.problems:
            self.progress.note(f"base on held-out problems: {self.base[0][0].mean:.4f}")
            if watched := self.tasks[0].watched:
                self.watched = self.tasks[0].measure(base, tokenizer, self.progress, "base, to watch", watched)

    def during(self, folder: Path, main: bool) -> Sequence[TrainerCallback]:
        """What watches the training; it keeps what it needs in `folder`."""
        every = self.settings.eval_every
        base = self.watched[0] if self.watched else None
        start = self.base[0][0] if self.problems else None
        self.watch = Watch(folder, self._score, base, start=start, every=every, main=main)
        return [self.watch]

    def _score(self, model: Any) -> Evaluation:
        own = self.tasks[0]
        found, _ = own.measure(model, self.tokenizer, Progress(), "trained so far", own.watched)  # beside the bar
        self.progress.note(f"on {found.n} held-out problems: {found.mean:.4f} ± {found.standard_error:.4f}")
        return found

    def choose(self, model: nn.Module) -> None:
        """Give the model its best state, if that is what is to be kept."""
        if self.watch.stopped:
            self.progress.note(self.watch.stopped)
        if self.kept is not None:
            PartialState().wait_for_everyone()  # until the first process has written it
            self.watch.restore(model)
            self.progress.note(f"kept: the state after step {self.kept}, which scored best on held-out problems")

    @property
    def kept(self) -> int | None:
        """The step that was chosen."""
        return self.watch.best if self.settings.keep == "best" else None

    def after(self, result: TrainingResult, full: bool) -> dict[str, Any]:
        """The fields of `RunResults` that the measurements fill."""
        found: dict[str, Any] = {
            "completions": result.completions,
            "evaluations": self.watch.scores or None,
            "kept_step": self.kept,
            "stopped": self.watch.stopped,
        }
        if not self.tasks:
            return found
        # without the autocast of training, which generation of the base has not
        model = extract_model_from_parallel(result.model, keep_fp32_wrapper=False) if full else result.model
        trained = [own.measure(model, self.tokenizer, self.progress, "trained") for own in self.tasks]
        figures: dict[str, Measured] = {
            own.task.name: measured(before, after)
            for own, before, after in zip(self.tasks, self.base, trained, strict=True)
        }
        if self.problems:
            own, before, after = self.tasks[0], self.base[0][0], trained[0][0]
            found["held_out"] = figures.pop(own.task.name)
            self._show(own.task, before, after)
            difference = found["held_out"].difference
            assert difference is not None
            found["verdict"] = verdict(
                difference,
                after.n,
                same=same_completions(before, after),
                prompts=self._prompts(),
                equal=result.equal_rewards,
            )
            if self.settings.init_adapter is not None:
                found["verdict"] += "; against the base, so with what the adapter had gained that the run started from"
        return found | {"also": figures or None}

    def _prompts(self) -> int | None:
        """Prompts of an optimizer step."""
        group = self.config.to_dict().get(self.algorithm.group_size) if self.algorithm.group_size else None
        return completions_per_step(self.config) // group if group and self.algorithm.online else None

    def _show(self, task: Task, before: Evaluation, after: Evaluation) -> None:
        for i in range(min(self.settings.show, before.n)):
            self.progress.note("")
            pair = {"base": before.rollouts[i][0], "trained": after.rollouts[i][0]}
            for line in compare_completions(pair, task):
                self.progress.note(line)
