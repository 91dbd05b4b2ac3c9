"""`onelayer train`: one run of any TRL algorithm on the chosen block, or on everything, saved as an adapter."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._errors import user_error
from ._figures import print_completions, print_held_out
from ._options import (
    Also,
    Budget,
    Chat,
    Completions,
    Json,
    LearningRate,
    Method,
    ModelName,
    Prompts,
    Revision,
    Reward,
    Sampling,
    Seed,
    Set,
    TaskName,
    TrustRemoteCode,
    Unsafe,
)
from ._output import TerminalProgress, command_line, print_line, print_table, status

if TYPE_CHECKING:
    from peft_onelayer.records.run import RunRecord


def train(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="New folder for the adapter, run.json and the checkpoints.")],
    layer: Annotated[
        str,
        typer.Option(
            help="Blocks to train: 14, -1, 3,5, 8-13, middle, mid-5, or auto to rank the blocks on the task first."
        ),
    ] = "auto",
    full: Annotated[bool, typer.Option("--full", help="Train every parameter instead: the baseline.")] = False,
    task: TaskName = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A JSONL file or Hub data set: prompts (with --reward) or, offline, preferences.", show_default=False
        ),
    ] = None,
    reward: Reward = None,
    algorithm: Annotated[str, typer.Option(help="grpo, dr_grpo, dapo, gigpo, rloo, dpo, kto, ...")] = "grpo",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimizer steps. [default: num_train_epochs, if set; else 150, offline TRL's]",
            show_default=False,
        ),
    ] = None,
    prompts: Prompts = None,
    completions: Completions = None,
    learning_rate: LearningRate = None,
    method: Method = "auto",
    budget: Budget = 0.25,
    settings: Set = None,
    top_entropy: Annotated[
        float | None,
        typer.Option(help="Train only this share of the tokens, those of highest entropy: 0.2.", show_default=False),
    ] = None,
    pairs_from_task: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PROMPTS",
            help="Offline: make the data from 8 graded completions of each of so many prompts.",
            show_default=False,
        ),
    ] = None,
    sampling: Sampling = None,
    seed: Seed = 0,
    chat: Chat = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    eval_problems: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Held-out problems to compare base and result on, 4 completions each; 0 for none. [default: 128, "
            "fewer of a short run: a fifth of its completions at most]",
            show_default=False,
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(min=1, help="Measure other held-out problems every so many steps.", show_default=False),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="With --eval-every: put out the state that scored best, or the last.")
    ] = "best",
    also: Also = None,
    show: Annotated[
        int, typer.Option(min=0, help="Print so many held-out problems with completions of base and result.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    report_to: Annotated[str, typer.Option(help="TRL's own logging: wandb, trackio, tensorboard, ...")] = "none",
    unsafe: Unsafe = False,
    as_json: Json = False,
) -> None:
    """Train one block of MODEL (or several, or all) with an algorithm of TRL; the result is a PEFT adapter."""
    with status("loading ..."):
        from peft_onelayer.rl.recipe import config_from_text
        from peft_onelayer.rl.sampling import PAIRS_OPTIONS, sampling_from_text
        from peft_onelayer.runs.settings import TRAINING_OPTIONS, TrainingSettings
        from peft_onelayer.runs.training import train as run_training

    with user_error(ValueError, OSError, ImportError):
        run = run_training(
            TrainingSettings(
                model=model,
                out=out,
                layer=layer,
                full=full,
                task=task,
                dataset=dataset,
                reward=reward,
                algorithm=algorithm,
                steps=steps,
                prompts=prompts,
                completions=completions,
                learning_rate=learning_rate,
                method=method,
                budget=budget,
                config=config_from_text(algorithm, settings or [], TRAINING_OPTIONS),
                top_entropy=top_entropy,
                pairs_from_task=pairs_from_task,
                sampling=sampling_from_text(sampling or [], PAIRS_OPTIONS),
                seed=seed,
                chat=chat,
                revision=revision,
                trust_remote_code=trust_remote_code,
                report_to=report_to,
                eval_problems=eval_problems,
                eval_every=eval_every,
                keep=keep,  # type: ignore[arg-type]  # checked there
                also=also or (),
                show=show,
                unsafe=unsafe,
            ),
            resume=resume,
            command=command_line(),
            progress=TerminalProgress(),
        )
    if not run.is_main_process:
        return
    if as_json:
        print(run.record.to_json(), end="")
    else:
        _print_summary(run.record, out)
    if run.record.results and run.record.results.stopped:
        raise typer.Exit(1)


def _print_summary(run: RunRecord, out: Path) -> None:
    settings, results = run.settings, run.results
    assert results is not None
    blocks = "all" if run.layers is None else ", ".join(map(str, run.layers))
    print_table(
        f"{settings.algorithm} on {settings.source.name}",
        ["", ""],
        [
            ["blocks trained", f"{blocks} of {settings.model.num_layers}"],
            ["steps", str(results.steps)],
            _progress("reward", results.rewards) if results.rewards else _progress("loss", results.losses),
            ["tokens generated, trained on", f"{results.tokens_generated:,}, {results.tokens_trained:,}"],
            ["time", f"{results.seconds:.0f} s"],
        ],
    )
    if results.completions:
        print_completions({"in training": results.completions})
    held_out = {settings.source.name: results.held_out} if results.held_out else {}
    print_held_out(held_out | (results.also or {}))
    if results.kept_step is not None:
        print_line(f"Kept: the state after step {results.kept_step}, which scored best on held-out problems.")
    if results.verdict:
        print_line(f"Verdict: {results.verdict}.")
    if results.stopped:
        print_line(f"The run {results.stopped}.")
    print_line(f"Written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))


def _progress(name: str, values: list[float]) -> list[str]:
    """What the first and the last tenth of the run had on average."""
    tenth = max(1, len(values) // 10)
    first, last = statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])
    return [f"mean {name} in training", f"{first:.3g} -> {last:.3g} (first and last {tenth} of {len(values)} logs)"]
