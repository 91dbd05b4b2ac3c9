"""`onelayer probe`: which block to train, before training: a ranking with error bars, what it cost, and what to do."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import UserError, user_error
from ._model import limit_threads, load_causal_lm, quiet_hub, to_device
from ._options import Chat, Json, Revision, Reward, TaskName, Unsafe
from ._output import note, print_line, print_table, status
from ._ranking import POINTS, describe, rank_blocks
from ._recipe import recipe_of
from ._task import as_asked, check_writable, open_task

if TYPE_CHECKING:
    from peft_onelayer.records.ranking import LayerRanking

OWNED = {"output_dir": "nothing: a probe writes only --out", "seed": "--seed", "max_steps": "--steps"}


def probe(
    model: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    task: TaskName = None,
    dataset: Annotated[
        str | None, typer.Option(help="A JSONL file or Hub data set with prompts, for --reward.", show_default=False)
    ] = None,
    reward: Reward = None,
    method: Annotated[
        str, typer.Option(help="auto (race and depth prior), race, prior (free), or profile (with --profile).")
    ] = "auto",
    budget: Annotated[
        float, typer.Option(help="Of a race: tokens to spend, as a share of those of the run of --steps.")
    ] = 0.25,
    profile: Annotated[
        str | None,
        typer.Option(help="A shipped model, layer_profile.json, or an adapter on the Hub.", show_default=False),
    ] = None,
    layers: Annotated[str, typer.Option(help="Blocks to choose from: all, or such as 8-13, mid-5.")] = "all",
    algorithm: Annotated[str, typer.Option(help="Of the run to come: grpo, dr_grpo, gigpo, ...")] = "grpo",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the run to come.")] = 150,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of its TRL config; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of prompts and sampling.")] = 0,
    chat: Chat = None,
    revision: Revision = None,
    unsafe: Unsafe = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the ranking, and a plot beside it.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank MODEL's blocks for a task by short RL within a budget, or by what is known without running anything."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with status("loading ..."):
        from peft_onelayer.hub.profiles import load_profile
        from peft_onelayer.probe.probe import METHODS
        from peft_onelayer.rl.algorithms import load_algorithm
        from peft_onelayer.tuner import find_decoder_stack, resolve_layers

    with user_error(ValueError, OSError, ImportError), quiet_hub():
        if method not in METHODS:
            raise ValueError(f"no probe {method!r}; the methods are {', '.join(METHODS)}")
        if not 0 < budget < math.inf:
            raise ValueError(f"--budget is a share of a training run, above 0, such as 0.25; got {budget}")
        if (method == "profile") != (profile is not None):
            raise ValueError("--profile and --method profile go together; give both, or neither")
        chosen = load_algorithm(algorithm)
        if not chosen.online:
            raise ValueError(
                f"a probe compares blocks by their reward; {algorithm} is offline, choose one such as grpo"
            )
        the_task = open_task(task, dataset, reward, unsafe=unsafe)
        recipe = recipe_of(chosen, the_task, settings or [], OWNED)
        known = load_profile(profile) if profile else None
        if out is not None:
            _check_out(out)
    if known is not None:
        note(f"the profile is of {known.model}: {known.measure}; {known.source}")
    base, tokenizer = load_causal_lm(model, revision)
    to_device(base)
    limit_threads(base)
    with user_error(ValueError):
        num_layers = len(find_decoder_stack(base).blocks)
        blocks = None if layers == "all" else resolve_layers(layers, num_layers)
        the_task, _ = as_asked(the_task, tokenizer, chat)
        check_writable(the_task.rows("train", 1, seed)[0], tokenizer, model)
        ranking = rank_blocks(
            base,
            tokenizer,
            the_task,
            recipe=recipe,
            training_steps=steps,
            seed=seed,
            method=method,
            budget=budget,
            layers=blocks,
            profile=known,
        )
    if out is not None:
        from peft_onelayer.report.plots import plot_ranking

        out.write_text(ranking.to_json())
        plot_ranking(ranking, out.with_suffix(".png"), f"{method}, {the_task.name}")
    if as_json:
        print(ranking.to_json(), end="")
        return
    _print(ranking)
    given = ["--task", task] if task else ["--dataset", str(dataset), "--reward", str(reward)]
    rate = ranking.recommended_rate
    command = ["onelayer", "train", model, *given, "--layer", ranking.choice, "--algorithm", algorithm]
    command += ["--steps", str(steps)]
    command += [
        part for setting in settings or [] if not setting.startswith("learning_rate") for part in ("--set", setting)
    ]
    command += ["--set", f"learning_rate={rate:.2g}"] if rate else []
    print_line(f"Train it: {shlex.join([*command, '--out', 'run'])}")
    if out is not None:
        note(f"Written to {out} and {out.with_suffix('.png')}")


def _check_out(out: Path) -> None:
    if out.suffix != ".json":
        raise UserError(f"--out takes a JSON file, such as ranking.json, not {out}.")
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist; create it or choose another --out.")
    for path in (out, out.with_suffix(".png")):
        if path.exists():
            raise UserError(f"{path} exists; choose another --out (nothing was changed).")


def _print(ranking: LayerRanking) -> None:
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
            "best" if k == ranking.order[0] else "tied" if k in ranking.tied else "",
        ]
        for k in ranking.order
    ]
    print_table(
        f"{ranking.method}, {ranking.task}",
        ["block", "gain (points)" if ranking.measured else "score", "standard error", "learning rate", ""],
        rows,
    )
    for line in describe(ranking):
        print_line(line)
