"""As in the run: what evaluations, votes and measurements of a model take from the run.json beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peft_onelayer.records.fields import read
from peft_onelayer.records.files import RUN, read_fields
from peft_onelayer.records.run import RunRecord
from peft_onelayer.records.text import one_line
from peft_onelayer.rl.algorithms import load_algorithm
from peft_onelayer.rl.sampling import OWN_OPTIONS, sampling_of, with_given
from peft_onelayer.rollouts.prompts import Shape, shown_rows
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task

from .progress import Progress
from .settings import EntropySettings, EvaluationSettings, VoteSettings

Asked = EvaluationSettings | VoteSettings | EntropySettings


def run_in(folder: Path) -> RunRecord | None:
    """The run that left its run.json in a folder; None where there is none of ours."""
    try:
        fields = read_fields(folder / RUN)
    except ValueError:  # not there, or no JSON
        return None
    return RunRecord.from_dict(fields, str(folder / RUN)) if fields.get("format") == RunRecord.FORMAT else None


def as_in_run(run: RunRecord | None, task: Task, asked: Asked, progress: Progress) -> tuple[Shape, Sampling]:
    """How prompts are given and completions sampled: as asked for, else as in the run, else by default.

    Args:
        run: that made the model.
        task: that is measured; system text, shots and the limit of a completion hold for the run's own task, and for
            data sets, which have none.
        asked: its fields go before the run's.
        progress: is told what of the run is not the default.

    Raises:
        ValueError: in one line: what cannot be of `Sampling`, or shots that the task cannot show.
    """
    sampling = _sampling(run, task, asked, progress)
    chat, system, shots = asked.chat, asked.system, asked.shots
    if run is not None:
        source = run.settings.source
        chat = source.chat if chat is None else chat
        if _fits(run, task, asked):
            system = source.system if system is None else system
            shots = source.shots if shots is None else shots
            inherited = [f"{shots} shots"] if shots and asked.shots is None else []
            inherited += [f"system text {one_line(system, 60)!r}"] if system and asked.system is None else []
            if inherited:
                progress.note(f"prompts as in the run: {', '.join(inherited)}")
    shown_rows(task, shots)
    return Shape(chat, system, shots or 0, sampling.chat_template_kwargs), sampling


def _sampling(run: RunRecord | None, task: Task, asked: Asked, progress: Progress) -> Sampling:
    own = Sampling()
    if run is not None:
        settings, fields = run.settings, dict(run.settings.config)
        if "generation_kwargs" in asked.sampling:  # those of the run may be vLLM's, which cannot be followed
            fields["generation_kwargs"] = None
        own = sampling_of(load_algorithm(settings.algorithm), fields, "run.json: settings.config")
        own = read(Sampling, {**own.shape, **(settings.sampling or {})}, "run.json: settings.sampling")
        if not _fits(run, task, asked):
            own = replace(own, max_completion_tokens=None)
    shown = {name: value for name, value in own.changed.items() if name not in asked.sampling}
    if shown.get("max_completion_tokens") == task.max_completion_tokens:
        del shown["max_completion_tokens"]
    if shown:
        progress.note(f"sampled as in the run: {', '.join(f'{name}={value}' for name, value in shown.items())}")
    own = replace(own, samples=asked.samples, seed=asked.seed, batch_size=asked.batch_size)
    return with_given(own, asked.sampling, OWN_OPTIONS)


def _fits(run: RunRecord, task: Task, asked: Asked) -> bool:
    """Whether a run was trained on the task, or on its data; any data set may be its own."""
    source = run.settings.source
    return task.name == source.name or bool(task.data and dict(task.data) == source.data) or asked.dataset is not None
