"""`onelayer probe`: which block to train, before training: a ranking with error bars, what it cost, and what to do."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import user_error
from ._options import (
    Algorithm,
    Budget,
    Chat,
    Completions,
    Dataset,
    Json,
    LearningRate,
    Method,
    ModelName,
    Prompts,
    Revision,
    Reward,
    Seed,
    Set,
    Shots,
    System,
    TaskName,
    TrustRemoteCode,
    Unsafe,
    refuse_two_rates,
)
from ._output import TerminalProgress, note, print_line, print_table, status

if TYPE_CHECKING:
    from peft_onelayer.records.ranking import LayerRanking
    from peft_onelayer.runs.settings import ProbeSettings


def probe(
    context: typer.Context,
    model: ModelName,
    task: TaskName = None,
    dataset: Dataset = None,
    reward: Reward = None,
    method: Method = "auto",
    budget: Budget = 0.25,
    profile: Annotated[
        str | None,
        typer.Option(help="A shipped model, layer_profile.json, or an adapter on the Hub.", show_default=False),
    ] = None,
    layers: Annotated[str, typer.Option(help="Blocks to choose from: all, or such as 3,5,8-13, mid-5.")] = "all",
    algorithm: Algorithm = "grpo",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the run to come.")] = 150,
    prompts: Prompts = None,
    completions: Completions = None,
    learning_rate: LearningRate = None,
    settings: Set = None,
    seed: Seed = 0,
    chat: Chat = None,
    system: System = None,
    shots: Shots = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    unsafe: Unsafe = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the ranking, and a plot beside it.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank MODEL's blocks for a task by short RL within a budget, or by what is known without running anything."""
    from peft_onelayer.rl.recipe import config_from_text
    from peft_onelayer.rl.settings import parse_settings
    from peft_onelayer.runs.early import check_probe, plot_beside
    from peft_onelayer.runs.settings import PROBE_OPTIONS, ProbeSettings

    with user_error(ValueError, OSError, ImportError):
        fields = parse_settings(settings or [])
        refuse_two_rates(context, fields)
        asked = ProbeSettings(
            model=model,
            task=task,
            dataset=dataset,
            reward=reward,
            method=method,
            budget=budget,
            profile=profile,
            layers=layers,
            algorithm=algorithm,
            steps=steps,
            prompts=prompts,
            completions=completions,
            learning_rate=learning_rate,
            config=fields,
            seed=seed,
            chat=chat,
            system=system,
            shots=shots,
            revision=revision,
            trust_remote_code=trust_remote_code,
            unsafe=unsafe,
            out=out,
        )
        check_probe(asked)
        with status("loading ..."):
            from peft_onelayer.runs.probing import probe as run_probe

            asked = replace(asked, config=config_from_text(algorithm, settings or [], PROBE_OPTIONS))
        ranking = run_probe(asked, progress=TerminalProgress())
    if as_json:
        print(ranking.to_json(), end="")
        return
    _print(ranking)
    print_line(f"Train it: {train_command(asked, settings or [], ranking)}")
    if out is not None:
        note(f"Written to {out} and {plot_beside(out)}")


def train_command(asked: ProbeSettings, set_options: list[str], ranking: LayerRanking) -> str:
    """The command that trains the ranking's choice in the run that it was ranked for, at the rate that goes with it."""
    command = ["onelayer", "train", asked.model]
    command += ["--dataset", str(asked.dataset), "--reward", str(asked.reward)] if asked.dataset else []
    command += [] if asked.dataset else ["--task", str(asked.task or "TASK")]
    command += ["--layer", ",".join(map(str, ranking.choice)), "--algorithm", asked.algorithm]
    command += ["--steps", str(asked.steps), "--seed", str(asked.seed)]
    command += ["--prompts", str(asked.prompts)] if asked.prompts else []
    command += ["--completions", str(asked.completions)] if asked.completions else []
    command += [part for text in set_options if not _sets_the_rate(text) for part in ("--set", text)]
    if ranking.choice_learning_rate is not None:
        command += ["--learning-rate", repr(ranking.choice_learning_rate)]
    command += [] if asked.chat is None else ["--chat" if asked.chat else "--plain"]
    command += ["--system", asked.system] if asked.system else []
    command += ["--shots", str(asked.shots)] if asked.shots else []
    command += ["--revision", asked.revision] if asked.revision else []
    command += ["--trust-remote-code"] if asked.trust_remote_code else []
    command += ["--unsafe"] if asked.unsafe else []
    return shlex.join([*command, "--out", "run"])


def _sets_the_rate(text: str) -> bool:
    return text.partition("=")[0].strip() == "learning_rate"


def _mark(ranking: LayerRanking, k: int) -> str:
    """What a block is in its ranking: the best one only where it is known to gain."""
    if ranking.pick is None:
        return "choice" if k in ranking.choice else ""
    return "best" if k == ranking.pick else "tied" if k in ranking.tied else ""


def _print(ranking: LayerRanking) -> None:
    from peft_onelayer.runs.ranking import POINTS, describe

    def number(values: list[Any] | None, k: int, scale: float, form: str) -> str:
        value = values[k] if values else None
        return "" if value is None else format(scale * value, form)

    scale = POINTS if ranking.measured else 1
    rows = [
        [
            str(k),
            number(ranking.scores, k, scale, "+.1f" if ranking.measured else ".2f"),
            number(ranking.errors, k, scale, ".1f"),
            number(ranking.learning_rates, k, 1, ".2g"),
            _mark(ranking, k),
        ]
        for k in ranking.order
    ]
    print_table(
        ", ".join(filter(None, (ranking.method, ranking.task))),
        [
            "block",
            *(["gain (points)", "± from the mean"] if ranking.measured else ["score", "standard error"]),
            "learning rate",
            "",
        ],
        rows,
    )
    if ranking.measured:
        print_line("± is the standard error of a block's difference from the mean of all ranked blocks.")
    for line in describe(ranking):
        print_line(line)
