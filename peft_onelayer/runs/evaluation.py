"""One evaluation, from settings to eval.json: base and adapter on the same problems with the same sampling seed, so
that their difference is paired."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.hub.local_card import write_card
from peft_onelayer.records.evaluation import EvaluationRecord, Example, MeasuredAdapter
from peft_onelayer.records.figures import Measured
from peft_onelayer.records.files import (
    CARD,
    CONFIG,
    EVALUATION,
    WEIGHTS,
    file_digest,
    output,
    read_fields,
    write_whole,
)
from peft_onelayer.records.locate import (
    adapter_folder,
    check_adapter_folder,
    check_base_of,
    check_model_name,
    holds_adapter,
)
from peft_onelayer.records.run import DataSource
from peft_onelayer.rollouts.completions import compare_completions, completion_lines, prompt_as_read, question_and_text
from peft_onelayer.rollouts.evaluation import Evaluation
from peft_onelayer.rollouts.evaluation import evaluate as evaluate_rows
from peft_onelayer.rollouts.prompts import check_prompt, shaped, shown_rows
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task, open_task
from peft_onelayer.tuner.config import SingleLayerPeftType

from .as_run import as_in_run, run_in
from .describe import describe_machine, describe_model
from .early import check_evaluation
from .heldout import watched_among
from .measuring import measured
from .models import (
    fingerprint,
    load_adapter,
    load_causal_lm,
    quiet_logs,
    to_device,
    without_progress_bars,
)
from .progress import Progress, Update
from .settings import EvaluationSettings

EXAMPLES = 8  # problems that eval.json holds to be read
Measurements = dict[str, tuple[Evaluation, float]]  # by decoding mode, with seconds


@dataclass(frozen=True)
class _Problems:
    """What one task measures.

    Attributes:
        task: with prompts as the tokenizer takes them.
        rows: the problems.
        sampling: how they are completed.
        chat: whether prompts are messages.
        watched: of each problem, whether the run chose the step that it kept by it; empty where it chose by none.
    """

    task: Task
    rows: list[dict[str, Any]]
    sampling: Sampling
    chat: bool
    watched: list[bool]


def evaluate(
    settings: EvaluationSettings,
    *,
    command: str | None = None,
    progress: Progress | None = None,
    on_measured: Callable[[EvaluationRecord], None] = lambda record: None,
) -> EvaluationRecord:
    """Measure a model on a task, sampled and greedy, and an adapter against its base on the same problems.

    Completions are sampled as the run sampled that made the adapter (or the model, where `settings.model` is a folder
    of `train --full`), by the run.json beside it, unless the settings say otherwise; greedy decoding takes the run's
    prompts and penalties, and not what shapes sampling alone. Without a run.json the full distribution is sampled.

    One model is in memory: the base is the adapter's model with the adapter switched off, and where loading the
    adapter changed the base (PiSSA) it is loaded anew afterwards.

    Args:
        command: for the record.
        progress: is told what goes on.
        on_measured: is given the figures before a file is written, so that a full disk does not take them.

    Returns:
        The figures; with the scores and the problems where `settings.out` is given, which holds the same.

    Raises:
        ValueError: in one line: settings that cannot work, a model, adapter or data that are not there or do not fit
            (`TargetError` for `settings.out`).
    """
    with ExitStack() as stack:
        for file in (settings.out, settings.completions):
            if file is not None:
                stack.enter_context(output(Path(file)))
        stack.enter_context(without_progress_bars())
        return _Evaluation(settings, command, progress or Progress()).run(on_measured)


class _Evaluation:
    """The steps of `evaluate` in their order, and what they share."""

    def __init__(self, settings: EvaluationSettings, command: str | None, progress: Progress) -> None:
        self.settings, self.command, self.progress = settings, command, progress
        self.start = time.perf_counter()
        self.decodings = (["sampled"] if settings.samples else []) + (["greedy"] if settings.greedy else [])
        self.out = None if settings.out is None else Path(settings.out)
        check_evaluation(settings)
        self.model, self.adapter, self.revision = settings.model, settings.adapter, settings.revision
        if self.adapter is None and holds_adapter(self.model):
            self.model, self.adapter, self.revision = _base_of(self.model, self.revision)
        check_model_name(self.model, settings.revision)
        self.folder: Path | None = None
        self.adapter_config: dict[str, Any] = {}
        if self.adapter is not None:
            with quiet_logs():
                self.folder = adapter_folder(self.adapter)
            check_adapter_folder(self.folder, self.adapter)
            self.adapter_config = read_fields(self.folder / CONFIG)
        self.run_record = run_in(self.folder or Path(self.model).expanduser())
        with progress.status("loading the task ..."), quiet_logs():
            self.task: Task = open_task(settings.task, settings.dataset, settings.reward, unsafe=settings.unsafe)
            self.also = [open_task(name, unsafe=settings.unsafe) for name in settings.also]
            names = [self.task.name, *(task.name for task in self.also)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"--also {twice[0]} is measured already; name other tasks.")
            self.task.rows(settings.split, 1, settings.seed)  # a split that is not there, before the model is loaded
            for task in self.also:
                task.rows("test", 1, settings.seed)
            self.shape, self.sampling = as_in_run(self.run_record, self.task, self._asked(), progress)
            for task in self.also:
                shown_rows(task, self.shape.shots)

    def run(self, on_measured: Callable[[EvaluationRecord], None]) -> EvaluationRecord:
        settings = self.settings
        self.base, tokenizer = self._load()
        main = self._problems(self.task, tokenizer, settings.split, self.sampling)
        limit = settings.max_completion_tokens or settings.sampling.get("max_completion_tokens")
        elsewhere = replace(self.sampling, max_completion_tokens=limit)  # the run's limit is its own task's
        measured_tasks = [main, *(self._problems(task, tokenizer, "test", elsewhere) for task in self.also)]
        description = describe_model(self.base)
        before, after = self._measure_both(tokenizer, measured_tasks)
        results = [self._results(i, problems.watched, before, after) for i, problems in enumerate(measured_tasks)]
        self._show(main.task, tokenizer, before[0], after[0] if after else None)
        record = EvaluationRecord(
            command=self.command,
            model=description,
            adapter=self._measured_adapter(),
            task=DataSource(
                self.task.name,
                dict(self.task.data),
                system=self.shape.system or None,
                shots=self.shape.shots or None,
            ),
            split=settings.split,
            n=len(main.rows),
            samples=settings.samples,
            temperature=self.sampling.temperature,
            max_completion_tokens=self.sampling.max_completion_tokens or self.task.max_completion_tokens,
            seed=settings.seed,
            results=results[0],
            batch_size=settings.batch_size,
            chat=main.chat,
            sampling=self.sampling.shape,
            machine=describe_machine(),
            seconds=round(time.perf_counter() - self.start, 1),
            scores=_scores(before[0], after[0] if after else None) if self.out else None,
            problems=[json.loads(problem) for problem in before[0][self.decodings[0]][0].problems]
            if self.out
            else None,
            also={problems.task.name: result for problems, result in zip(measured_tasks[1:], results[1:], strict=True)}
            or None,
            examples=self._examples(before[0], after[0] if after else None) if self.out else None,
        )
        on_measured(record)
        if self.out is not None:
            write_whole(self.out, record.to_json())
            if self.folder and self.out.resolve() == self.folder.resolve() / EVALUATION and record.adapter:
                self._renew_card(self.folder)
        if settings.completions is not None:
            write_whole(Path(settings.completions), _lines(main.task, before[0], after[0] if after else None))
        return record

    def _problems(self, task: Task, tokenizer: PreTrainedTokenizerBase, split: str, sampling: Sampling) -> _Problems:
        settings = self.settings
        watched = watched_among([self.run_record], task, split, settings.problems, settings.seed)
        task, chat = shaped(task, tokenizer, self.shape)
        rows = task.rows(split, settings.problems, settings.seed)
        given = settings.sampling.get("chat_template_kwargs")
        check_prompt(rows[0], tokenizer, self.model, given, plays=task.environment_factory is not None)
        if len(rows) < settings.problems:
            self.progress.note(f"the {split} split of {task.name} has {len(rows)} problems")
        return _Problems(task, rows, sampling, chat, watched)

    def _results(
        self, i: int, watched: list[bool], before: list[Measurements], after: list[Measurements] | None
    ) -> dict[str, Measured]:
        return {mode: measured(before[i][mode], after[i][mode] if after else None, watched) for mode in self.decodings}

    def _show(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, before: Measurements, after: Measurements | None
    ) -> None:
        """Tell the first problems with a completion of each model."""
        mode = self.decodings[0]
        models = {"base": before} | ({} if after is None else {"adapter": after})
        groups = {name: modes[mode][0].rollouts[: self.settings.show] for name, modes in models.items()}
        if groups["base"] and (read := prompt_as_read(groups["base"][0][0], tokenizer)):
            self.progress.note(read)
        for i in range(len(groups["base"])):
            self.progress.note("")
            for line in compare_completions({name: rollouts[i][0] for name, rollouts in groups.items()}, task):
                self.progress.note(line)

    def _examples(self, before: Measurements, after: Measurements | None) -> list[Example]:
        mode = self.decodings[-1]
        first = [group[0] for group in before[mode][0].rollouts[:EXAMPLES]]
        second = [group[0] for group in after[mode][0].rollouts[:EXAMPLES]] if after else [None] * len(first)
        return [
            Example(
                mode,
                *question_and_text(base),
                base.reward,
                question_and_text(adapter)[1] if adapter else None,
                adapter.reward if adapter else None,
            )
            for base, adapter in zip(first, second, strict=True)
        ]

    def _renew_card(self, folder: Path) -> None:
        """The card beside an evaluation that was put beside the adapter says what it measured."""
        if self.adapter_config.get("peft_type") == SingleLayerPeftType.SINGLE_LAYER.value:
            write_card(folder, draw=False)
            self.progress.note(f"{folder / CARD} says it too")

    def _asked(self) -> EvaluationSettings:
        """The settings with the options of decoding among those of `sampling`."""
        settings = self.settings
        given: dict[str, Any] = {}
        for name in ("temperature", "top_p", "top_k", "min_p", "max_completion_tokens"):
            if (value := getattr(settings, name)) is not None:
                given[name] = value
        if both := given.keys() & settings.sampling.keys():
            raise ValueError(f"{min(both)} is given twice, by its option and by --sampling; give one of them")
        return replace(settings, sampling=given | dict(settings.sampling))

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        with self.progress.status(f"loading {self.model} ..."):
            trust = self.settings.trust_remote_code
            base, tokenizer = load_causal_lm(self.model, self.revision, trust_remote_code=trust)
        to_device(base)
        return base, tokenizer

    def _measure_both(
        self, tokenizer: PreTrainedTokenizerBase, tasks: list[_Problems]
    ) -> tuple[list[Measurements], list[Measurements] | None]:
        """The base's figures of each task, and the adapter's where there is one."""
        if self.folder is None:
            return self._measure(self.base, tokenizer, "base", tasks), None
        trained_on = self.adapter_config.get("base_model_name_or_path")
        if trained_on and trained_on != self.base.name_or_path:
            self.progress.note(f"the adapter was trained on {trained_on}; compared here with {self.model}")
        before = fingerprint(self.base)
        adapted = load_adapter(self.base, self.folder, self.settings.allow_other_base)
        unchanged = before <= fingerprint(self.base)
        after = self._measure(adapted, tokenizer, "adapter", tasks)
        if unchanged:
            with adapted.disable_adapter():
                return self._measure(adapted, tokenizer, "base", tasks), after
        del self.base, adapted
        self.base, _ = self._load()
        return self._measure(self.base, tokenizer, "base", tasks), after

    def _measure(
        self,
        policy: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        tasks: list[_Problems],
    ) -> list[Measurements]:
        return [self._measure_task(policy, tokenizer, name, problems) for problems in tasks]

    def _measure_task(
        self, policy: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, name: str, problems: _Problems
    ) -> Measurements:
        settings, measurements = self.settings, {}
        if problems.task.name != self.task.name:
            name = f"{name}, {problems.task.name}"
        for decoding in self.decodings:
            started = time.perf_counter()
            count = 1 if decoding == "greedy" else settings.samples
            with self.progress.bar(f"{name}, {decoding}", len(problems.rows) * count, "completion") as update:
                evaluation = evaluate_rows(
                    policy,
                    tokenizer,
                    problems.task,
                    problems.rows,
                    replace(problems.sampling, greedy=decoding == "greedy", samples=count),
                    on_progress=partial(_report, update),
                )
            if evaluation.over_limit:
                self.progress.note(f"{name}, {decoding}: {evaluation.over_limit} completions passed the reward's limit")
            measurements[decoding] = evaluation, round(time.perf_counter() - started, 1)
        return measurements

    def _measured_adapter(self) -> MeasuredAdapter | None:
        if self.folder is None:
            return None
        config = self.adapter_config
        digest = file_digest(self.folder / WEIGHTS)
        return MeasuredAdapter(str(self.adapter), config.get("peft_type"), config.get("layer_indices"), digest)


def _report(update: Update, done: int) -> None:
    update(done, "")


def _lines(task: Task, before: Measurements, after: Measurements | None) -> str:
    """The completions of both models, as JSON lines."""
    models = {"base": before} | ({} if after is None else {"adapter": after})
    return "".join(
        json.dumps(line, default=str) + "\n"
        for name, modes in models.items()
        for decoding, (evaluation, _) in modes.items()
        for line in completion_lines(evaluation.rollouts, task, model=name, decoding=decoding)
    )


def _base_of(adapter: str, revision: str | None) -> tuple[str, str, str | None]:
    """(base, adapter, revision of the base) of an adapter's folder."""
    folder = adapter_folder(adapter)
    config = read_fields(folder / CONFIG)
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} does not name its base model; give the base and --adapter {adapter}.")
    check_base_of(folder, f"onelayer eval {{base}} --adapter {adapter}")
    return base, adapter, revision or config.get("revision")


def _scores(before: Measurements, after: Measurements | None) -> dict[str, dict[str, list[float]]]:
    measured = {"base": before} | ({} if after is None else {"adapter": after})
    return {name: {mode: list(e.scores) for mode, (e, _) in modes.items()} for name, modes in measured.items()}
