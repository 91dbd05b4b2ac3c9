"""Held-out problems around and during training: base and trained model on the same ones, and the best state kept."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from peft_onelayer.records.figures import Figures
from peft_onelayer.records.files import read_fields, write_whole
from peft_onelayer.records.run import HeldOutScore, RunRecord
from peft_onelayer.rollouts.evaluation import Evaluation, evaluate, paired_difference, problem
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task

from .measuring import Timed
from .progress import Progress
from .verdict import below_start, fallen, far_below

PROBLEMS = 128  # at most, where nothing else is asked for
SAMPLES = 4  # completions of each
SHARE = 40  # a problem for so many completions of the run: its evaluation takes a tenth as many as the run at most
FEWEST = 16  # problems that can say something
SCORES = "held_out.json"
BEST = "best.safetensors"


@dataclass(frozen=True)
class HeldOut:
    """Problems of one task that training does not see.

    Attributes:
        task: with prompts as the tokenizer takes them.
        rows: the problems of the verdict.
        watched: the problems that are measured during training, others than `rows`; empty where none are.
        sampling: how they are completed.
    """

    task: Task
    rows: list[dict[str, Any]]
    watched: list[dict[str, Any]]
    sampling: Sampling

    def measure(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
        name: str,
        rows: Sequence[dict[str, Any]] | None = None,
    ) -> Timed:
        """The model on `rows` (default: those of the verdict), with the seconds; torch's random state stays."""
        rows, start = self.rows if rows is None else rows, time.perf_counter()
        with progress.bar(f"{name}, {self.task.name}", len(rows) * self.sampling.samples) as update:
            found = evaluate(
                model, tokenizer, self.task, rows, self.sampling, on_progress=lambda done: update(done, "")
            )
        # of the first process: on a GPU the others may have rounded differently
        found = broadcast_object_list([found])[0]
        return found, round(time.perf_counter() - start, 1)


def held_out(task: Task, problems: int, seed: int, sampling: Sampling, *, watched: bool = False) -> HeldOut:
    """Up to `problems` test problems of the task and, with `watched`, as many others; of a small split half each.

    Raises:
        ValueError: the task has no test split, or too few problems.
    """
    rows = task.rows("test", problems * (2 if watched else 1), seed)
    half = len(rows) // 2 if watched else 0
    if watched and not half:
        raise ValueError(f"--eval-every needs two test problems of {task.name} at least, got {len(rows)}")
    return HeldOut(task, rows[half:], rows[:half], sampling)


def watched_among(runs: Iterable[RunRecord | None], task: Task, split: str, n: int, seed: int) -> list[bool]:
    """Of each of the problems `task.rows(split, n, seed)`, whether one of the runs chose the step whose state it put
    out by it; empty where none did."""
    chosen = {name for run in runs if run for name in _chose_by(run, task)} if split == "test" else set()
    return [problem(row) in chosen for row in task.rows(split, n, seed)] if chosen else []


def _chose_by(run: RunRecord, task: Task) -> list[str]:
    """The problems by which a run chose among several steps, drawn as for the run; none of one that did not, or that
    trained on other data."""
    source, results = run.settings.task, run.results
    if source is None or dict(task.data) != source.data or not (source.data or task.name == source.name):
        return []
    if results is None or results.kept_step is None or len(results.evaluations or ()) < 2 or results.held_out is None:
        return []
    own = held_out(task, results.held_out.n, run.settings.seed, Sampling(), watched=True)
    return [problem(row) for row in own.watched]


def sharded(config: Any) -> bool:
    """Whether each process holds a part of the model alone, so that no one of them can generate."""
    using = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(config.fsdp or config.deepspeed) or any(os.environ.get(name) == "true" for name in using)


class Watch(TrainerCallback):
    """Stops a run whose reward has fallen; every so many steps measures held-out problems and keeps the best state.

    What it knows lies in `folder`, so that a resumed run goes on with it.

    Args:
        folder: for the scores and the best state; the checkpoints' own.
        measure: scores a model on the watched problems.
        base: the base's score on them.
        start: the base's score on the problems of the verdict, sampled as the run samples; None where it has none.
        every: steps between two measurements; None for none.
        main: whether this process writes.

    Attributes:
        stopped: why the run was stopped; None where it was not.
        best: step of the best score, the first of equal ones, whose state is kept; None before the first.
    """

    def __init__(
        self,
        folder: Path,
        measure: Callable[[Any], Evaluation] | None = None,
        base: Evaluation | None = None,
        *,
        start: Evaluation | None = None,
        every: int | None = None,
        main: bool = True,
    ) -> None:
        self.folder, self.measure, self.base, self.every, self.main = folder, measure, base, every, main
        self.start = start
        self.stopped: str | None = None
        self._scores: dict[int, tuple[float, float | None]] = {}
        self.best: int | None = None
        if every and (folder / SCORES).exists() and (folder / BEST).exists():
            kept = read_fields(folder / SCORES)["scores"]
            self._scores = {int(step): (mean, error) for step, (mean, error) in kept.items()}
            with safe_open(folder / BEST, "pt") as file:
                step = int(file.metadata()["step"])
            self.best = step if step in self._scores else None  # of a kill between the two files

    @property
    def scores(self) -> list[HeldOutScore]:
        """The scores by step."""
        return [HeldOutScore(step, mean, error) for step, (mean, error) in sorted(self._scores.items())]

    def on_log(self, args, state, control, **kwargs) -> None:
        """Stop where the reward has fallen."""
        rewards = {log["step"]: log["reward"] for log in state.log_history if "reward" in log}
        reason = fallen(rewards) or (self.start and below_start(rewards, self.start))
        if reason and self.stopped is None:
            self.stopped = f"stopped at step {state.global_step}: {reason}"
            control.should_training_stop = True

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        """Measure, where it is time."""
        step = state.global_step
        if not self.every or (step % self.every and step != state.max_steps):
            return
        assert self.measure is not None and self.base is not None
        found = self.measure(model)
        figures = Figures.of(found.mean, found.standard_error)
        better = self.best in (None, step) or figures.mean > self._scores[self.best][0]
        self._scores[step] = (figures.mean, figures.standard_error)
        if better:
            self.best = step
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            if better:
                tensors = {name: p.detach().cpu().contiguous() for name, p in _trained(model)}
                partial = self.folder / f".{BEST}.partial"
                save_file(tensors, partial, metadata={"step": str(step)})
                os.replace(partial, self.folder / BEST)
            write_whole(self.folder / SCORES, json.dumps({"scores": self._scores}))
        reason = far_below(Figures.of(*paired_difference(found, self.base)), self.base, found)
        if reason and self.stopped is None:
            self.stopped = f"stopped at step {step}: {reason}"
            control.should_training_stop = True

    def restore(self, model: nn.Module) -> None:
        """Give `model` the weights of the best state."""
        tensors = load_file(self.folder / BEST)
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(tensors[name])

    def remove(self) -> None:
        """Remove what lies in the folder."""
        if self.main:
            for name in (SCORES, BEST):
                (self.folder / name).unlink(missing_ok=True)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trained parameters by names that a wrapper of torch.compile does not change."""
    return [(name.replace("_orig_mod.", ""), p) for name, p in model.named_parameters() if p.requires_grad]
