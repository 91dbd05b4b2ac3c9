"""`onelayer train`: one run of any TRL algorithm on the chosen block, or on everything, saved as an adapter."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _completion
from ._errors import user_error
from ._figures import print_run
from ._memory import print_memory
from ._options import (
    Algorithm,
    Also,
    Budget,
    Chat,
    Completions,
    Json,
    LearningRate,
    Method,
    Prompts,
    Revision,
    Reward,
    Sampling,
    Seed,
    Set,
    Shots,
    System,
    TaskName,
    TrustRemoteCode,
    Unsafe,
    refuse_two_rates,
    was_given,
)
from ._output import TerminalProgress, command_line, note, print_json, print_next, status

if TYPE_CHECKING:
    from peft_onelayer.runs.settings import TrainingSettings

# Parameters that say how to run, or are read in another way.
NOT_SETTINGS = {"settings", "sampling", "out", "recipe", "config", "resume", "dry_run", "as_json"}


def train(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Base model: a folder or a Hub id. [default: of --recipe, --config or --resume]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for the adapter, run.json and the checkpoints.", show_default=False),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Settings of a paper, such as qwen3-1.7b-numina:paper; see onelayer recipes.",
            show_default=False,
            autocompletion=_completion.recipes,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Settings from a YAML file, such as run.yaml of a run. Options go before it.", show_default=False
        ),
    ] = None,
    layer: Annotated[
        str,
        typer.Option(
            help="Blocks to train: 14, -1, 3,5, 8-13, middle, mid-5, top-5@ranking.json, worst-5@ranking.json, "
            "full_attention, all, or auto to rank the blocks on the task first."
        ),
    ] = "auto",
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Train only the entries of these blocks where this file holds True; see analyze --mask-out.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train every parameter instead: the baseline.")] = False,
    boost: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCKS:FACTOR",
            help="With --full: these blocks train at so many times the learning rate: top-10@ranking.json:2.0.",
            show_default=False,
        ),
    ] = None,
    task: TaskName = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A file (JSONL, CSV, Parquet) or Hub data set: prompts (with --reward) or, offline, preferences.",
            show_default=False,
        ),
    ] = None,
    reward: Reward = None,
    algorithm: Algorithm = "grpo",
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
    system: System = None,
    shots: Shots = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    init_adapter: Annotated[
        str | None,
        typer.Option(help="Adapter to start from, a folder or a Hub id; its blocks are trained.", show_default=False),
    ] = None,
    prefix_cache: Annotated[
        Path | None,
        typer.Option(
            help="Offline: keep what leaves the frozen blocks in this folder, for later epochs and runs.",
            show_default=False,
        ),
    ] = None,
    prefix_cache_gb: Annotated[float, typer.Option(help="The most that --prefix-cache may hold, in GB.")] = 50.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; nothing else need be given.")
    ] = False,
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
    report_to: Annotated[str, typer.Option(help="TRL's own logging: wandb, trackio, tensorboard, ...")] = "none",
    unsafe: Unsafe = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what the run would hold in memory, beside full training and LoRA; load and write nothing.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one block of MODEL (or several, or all) with an algorithm of TRL; the result is a PEFT adapter."""
    if model is None and not (recipe or config or resume):
        raise typer.BadParameter("MODEL is missing; give it, or --recipe or --config", param_hint="MODEL")
    if out is None and not (config or dry_run):  # which may name it
        what = "--resume needs the run's folder, --out RUN" if resume else "give a new folder, such as --out run"
        raise typer.BadParameter(f"--out is missing; {what}", param_hint="--out")
    given = {
        name: context.params[name] for name in context.params if name not in NOT_SETTINGS and was_given(context, name)
    }
    if "learning_rate" in given and learning_rate is None:
        given["learning_rate"] = "auto"  # goes before a rate in --config or --recipe
    from peft_onelayer.rl.algorithms import load_algorithm
    from peft_onelayer.rl.config_fields import check_names
    from peft_onelayer.rl.recipe import config_from_text, refuse_fields
    from peft_onelayer.rl.settings import parse_settings
    from peft_onelayer.runs.early import check_effect, check_training
    from peft_onelayer.runs.recipes import (
        OPTIONS,
        RUN_YAML,
        merged,
        options_from,
        read_recipe,
        recipe_or_config,
        settings_from,
    )
    from peft_onelayer.runs.settings import TRAINING_OPTIONS, check_rate

    with user_error(ValueError, OSError, ImportError):
        source = recipe_or_config(recipe, config, "what to run")
        if resume and source is None and out is not None and (out / RUN_YAML).exists():
            source = out / RUN_YAML
        if resume and source is None and model is None:
            raise ValueError(f"{out} holds no run to resume; leave out --resume to start one.")
        kept = read_recipe(source) if source else {}
        fields = parse_settings(settings or [])
        refuse_two_rates(context, fields)
        if "learning_rate" in fields:
            check_rate(fields["learning_rate"], "--set learning_rate")
        if sampling:
            given["sampling"] = parse_settings(sampling, "--sampling")
        if dry_run and resume:
            raise ValueError("--dry-run looks at a run that is to begin; leave out --resume")
        if dry_run and out is None:
            out = Path("run")  # is not looked at
        for name, path in (("out", out), ("mask", mask), ("prefix_cache", prefix_cache)):
            if path is not None:
                given[name] = str(path)
        refuse_fields(fields, TRAINING_OPTIONS)
        flat = {
            name: value for name, value in fields.items() if name not in OPTIONS
        }  # others TRL's fields are asked for
        chosen = given.get("algorithm") or kept.get("algorithm") or "grpo"
        if flat and isinstance(chosen, str):  # what is no text in a file is refused below
            check_names(load_algorithm(chosen), flat, TRAINING_OPTIONS)
        early = options_from(merged(kept, flat | given), str(source or "this command"))
        if early.full and given.get("layer") == "auto":  # which no settings tell from the default
            raise ValueError("--full trains every parameter and --layer auto a block; give one of them")
        check_training(early, resume=resume, writes=not dry_run)
        check_effect(given, early)
        with status("loading ..."):
            from peft_onelayer.runs.dry_run import dry_run as run_dry
            from peft_onelayer.runs.training import train as run_training
        # for its messages; the texts are read with those of the file
        config_from_text(chosen, settings or [], TRAINING_OPTIONS)
        asked = settings_from(merged(kept, fields | given), str(source or "this command"))
        if dry_run:
            with status("counting ..."):
                found = run_dry(asked)
            for line in found.notes:
                note(line)
            print_json(found.to_json()) if as_json else print_memory(found)
            return
        with redirect_stdout(sys.stderr):  # stdout is for the result; TRL's log_completions and rewards print there
            run = run_training(
                asked,
                resume=resume,
                command=command_line(),
                progress=TerminalProgress(),
            )
    if not run.is_main_process:
        return
    if as_json:
        print(run.record.to_json(), end="")
    else:
        print_run(run.record, Path(asked.out))
        _print_next(asked)
    if run.record.results and run.record.results.stopped:
        raise typer.Exit(1)


def _print_next(asked: TrainingSettings) -> None:
    out = str(asked.out)
    source = ["--dataset", asked.dataset, "--reward", asked.reward] if asked.dataset and asked.reward else None
    source = source or ["--task", str(asked.task or "TASK")]
    print_next(
        ["onelayer", "report", out, "--html", "report.html"],
        ["onelayer", "eval", out, *source, "--out", str(Path(out) / "eval.json")],
        *([] if asked.full else [["onelayer", "push", out, "ME/NAME", "--dry-run"]]),
    )
