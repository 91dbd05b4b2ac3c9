"""Several adapters of one base vote on the answers to a task's problems, with one base model in memory."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from peft_onelayer.records.figures import Figures
from peft_onelayer.records.files import CONFIG, output, read_fields, write_whole
from peft_onelayer.records.locate import adapter_folder, check_base_of
from peft_onelayer.records.run import DataSource
from peft_onelayer.records.vote import Ballot, VoteRecord
from peft_onelayer.rollouts.prompts import check_prompt, shaped
from peft_onelayer.rollouts.sampling import Rollout, sample_rollouts
from peft_onelayer.tasks import Task, completion_text, open_task
from peft_onelayer.tuner import SingleLayerConfig

from .as_run import as_in_run, run_in
from .describe import describe_model
from .early import check_vote
from .heldout import watched_among
from .models import check_model_name, load_adapter, load_causal_lm, quiet_logs, to_device, without_progress_bars
from .progress import Progress, Update
from .settings import VoteSettings


def vote(settings: VoteSettings, *, command: str | None = None, progress: Progress | None = None) -> VoteRecord:
    """Complete each problem with every adapter and take the answer that most completions give; beside it as many
    samples of one adapter.

    All adapters complete a problem in one batch on one base: what lies below the lowest block that one of them trains
    runs once for all, the pass over the prompt and its cache included. Prompts are given and completions sampled as by
    the run of the first adapter, unless the settings say otherwise; which runs did otherwise is told.

    Args:
        settings: what is asked for.
        command: for the record.
        progress: is told what goes on.

    Returns:
        The figures; `settings.out` holds the same.

    Raises:
        ValueError: in one line: fewer than two adapters, another kind of adapter, other bases, data that are not there.
        TargetError: `settings.out` may not be used.
    """
    progress = progress or Progress()
    check_vote(settings)
    with ExitStack() as stack:
        if settings.out is not None:
            stack.enter_context(output(Path(settings.out)))
        stack.enter_context(without_progress_bars())
        record = _vote(settings, command, progress)
        if settings.out is not None:
            write_whole(Path(settings.out), record.to_json())
        return record


def _vote(settings: VoteSettings, command: str | None, progress: Progress) -> VoteRecord:
    names = list(settings.adapters)
    with quiet_logs():
        folders = [adapter_folder(name) for name in names]
    configs = [read_fields(folder / CONFIG) for folder in folders]
    for name, config in zip(names, configs, strict=True):
        if config.get("peft_type") != "SINGLE_LAYER" or not config.get("layer_indices"):
            raise ValueError(f"{name} is no adapter of this method, and these alone share a base in one batch.")
    model = settings.model or str(configs[0].get("base_model_name_or_path") or "")
    if not model:
        raise ValueError(f"{names[0]} does not name its base model; give it with --base.")
    if not settings.model:
        check_base_of(folders[0], "onelayer vote ... --base {base}")
    revision = settings.revision or (configs[0].get("revision") if not settings.model else None)
    check_model_name(model, settings.revision)
    task = open_task(settings.task, settings.dataset, settings.reward, unsafe=settings.unsafe)
    if task.environment_factory is not None:
        raise ValueError(f"task {task.name} plays through an environment and has no answer to vote on.")
    task.rows(settings.split, 1, settings.seed)  # a split that is not there, before the model is loaded
    runs = [run_in(folder) for folder in folders]
    shape, sampling = as_in_run(runs[0], task, settings, progress)
    own = {
        name: as_in_run(run, task, settings, Progress())
        for name, run in zip(names, runs, strict=True)
        if run is not None
    }
    with progress.status(f"loading {model} ..."):
        base, tokenizer = load_causal_lm(model, revision, trust_remote_code=settings.trust_remote_code)
    to_device(base)
    watched = watched_among(runs, task, settings.split, settings.problems, settings.seed)
    task, chat = shaped(task, tokenizer, shape)
    first = replace(shape, chat=chat), sampling
    chats = tokenizer.chat_template is not None
    otherwise = [
        name
        for name, (own_shape, how) in own.items()
        if (replace(own_shape, chat=chats and own_shape.chat is not False), how) != first
    ]
    if otherwise:
        progress.note(f"all are prompted and sampled as the first; otherwise in their runs: {', '.join(otherwise)}")
    rows = task.rows(settings.split, settings.problems, settings.seed)
    check_prompt(rows[0], tokenizer, model, settings.sampling.get("chat_template_kwargs"))
    description = describe_model(base)
    policy = load_adapter(base, folders[0], settings.allow_other_base)
    labels = ["default", *(f"adapter{i}" for i in range(1, len(names)))]
    for label, folder in zip(labels[1:], folders[1:], strict=True):
        config = SingleLayerConfig.from_pretrained(str(folder), allow_other_base=settings.allow_other_base)
        policy.add_adapter(label, config)
        policy.load_adapter(str(folder), label)
    policy.eval()
    count = len(names) * settings.samples
    sampling = replace(sampling, greedy=False, samples=count, batch_size=max(settings.batch_size, count))
    groups = []
    for what, members in (("the adapters", labels), ("one adapter", [labels[settings.against]])):
        with progress.bar(what, len(rows) * count, "completion") as update:
            report = partial(_report, update)
            groups.append(
                sample_rollouts(policy, tokenizer, task, rows, sampling, adapters=members, on_progress=report)
            )
    together, alone = groups
    votes = [[voted(group, task) for group in each] for each in groups]
    differences = [a - b for a, b in zip(*votes, strict=True)]
    others = [a for a, seen in zip(differences, watched, strict=True) if not seen] if any(watched) else []
    own_rewards = [[_mean([r.reward for r in group[i :: len(names)]]) for group in together] for i in range(len(names))]
    return VoteRecord(
        model=description,
        adapters=names,
        against=names[settings.against],
        task=DataSource(task.name, dict(task.data), chat, shape.system or None, shape.shots or None),
        split=settings.split,
        n=len(rows),
        samples=count,
        seed=settings.seed,
        of_adapters=_ballot(together, votes[0]),
        of_one=_ballot(alone, votes[1]),
        averages=[_figures(rewards) for rewards in own_rewards],
        difference=_figures(differences),
        shared_blocks=min(index for config in configs for index in config["layer_indices"]),
        command=command,
        watched=sum(watched) or None,
        unwatched=_figures(others) if others else None,
    )


def voted(rollouts: Sequence[Rollout], task: Task) -> float:
    """The reward of the answer that most completions of a problem give; 0 where none holds an answer.

    Of equally many the answer that was given first. Where the task does not say what an answer is, it is the text.
    """
    answers = [_answer(rollout, task) for rollout in rollouts]
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0.0
    winner = counts.most_common(1)[0][0]  # which keeps the order of equal counts
    return rollouts[answers.index(winner)].reward


def _answer(rollout: Rollout, task: Task) -> str | None:
    text = completion_text(rollout.completion) or ""
    return text.strip() or None if task.answer is None else task.answer(text)


def _ballot(groups: Sequence[Sequence[Rollout]], votes: Sequence[float]) -> Ballot:
    rewards = [[rollout.reward for rollout in group] for group in groups]
    return Ballot(_figures(votes), _figures([_mean(own) for own in rewards]), _figures([max(own) for own in rewards]))


def _figures(values: Sequence[float]) -> Figures:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Figures(_mean(values), error)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _report(update: Update, done: int) -> None:
    update(done, "")
