"""`onelayer train`: one run of any TRL algorithm on the chosen block, or on everything, saved as an adapter."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import UserError, user_error
from ._model import ADAPTER_FILES, load_causal_lm, quiet_hub, to_device
from ._options import Chat, Json, Revision, Reward, TaskName, Unsafe
from ._output import is_main_process, note, print_json, print_line, print_table, progress_bar, status
from ._ranking import pick_layers, rank_blocks
from ._recipe import LEARNING_RATE
from ._task import as_asked, check_writable, open_task

if TYPE_CHECKING:
    from peft_onelayer.rl.algorithms import Algorithm
    from peft_onelayer.rl.preferences import OfflineData
    from peft_onelayer.rl.training import Recipe
    from peft_onelayer.runs.folder import RunFolder
    from peft_onelayer.tasks import Task

DEFAULT_STEPS = 150
SAMPLES_PER_PAIR = 8
GENERATE = 64  # completions at a time, at least, where there are no gradients
OWNED = {
    "output_dir": "--out",
    "seed": "--seed",
    "max_steps": "--steps",
    "report_to": "--report-to",
    "resume_from_checkpoint": "--resume",
}


def train(
    model: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    out: Annotated[Path, typer.Option(help="New folder for the adapter, run.json and the checkpoints.")],
    layer: Annotated[
        str,
        typer.Option(help="Block to train: 14, -1, 8-13, middle, mid-5, or auto to rank the blocks on the task first."),
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
            min=1, help=f"Optimizer steps. [default: {DEFAULT_STEPS}; offline, num_train_epochs]", show_default=False
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the TRL config; repeatable."),
    ] = None,
    top_entropy: Annotated[
        float | None,
        typer.Option(help="Train only this share of the tokens, those of highest entropy: 0.2.", show_default=False),
    ] = None,
    pairs_from_task: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PROMPTS",
            help=f"Offline: make the data from {SAMPLES_PER_PAIR} graded completions of each of so many prompts.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of data, sampling and training.")] = 0,
    chat: Chat = None,
    revision: Revision = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    report_to: Annotated[str, typer.Option(help="TRL's own logging: wandb, trackio, tensorboard, ...")] = "none",
    unsafe: Unsafe = False,
    as_json: Json = False,
) -> None:
    """Train one block of MODEL (or several, or all) with an algorithm of TRL; the result is a PEFT adapter."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # of the algorithms and environments it calls experimental
    with status("loading ..."):
        from datasets import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        from peft_onelayer.rl.algorithms import build_config, load_algorithm
        from peft_onelayer.rl.preferences import load_preferences
        from peft_onelayer.rl.settings import convert_settings, parse_settings
        from peft_onelayer.rl.training import Recipe, device_settings, prompts_needed
        from peft_onelayer.runs import describe as record
        from peft_onelayer.runs.folder import RunFolder
        from peft_onelayer.tuner import find_decoder_stack, resolve_layers

    with user_error(ValueError, OSError, ImportError), quiet_hub():
        chosen = load_algorithm(algorithm)
        overrides = parse_settings(settings or [])
        folder = RunFolder(out, resume, main=is_main_process())
        the_task = _task(chosen, task, dataset, reward, pairs_from_task, unsafe)
        _check_choice(chosen, the_task, layer, full, top_entropy)
        defaults: dict[str, Any] = {
            "output_dir": str(folder.checkpoints),
            "seed": seed,
            "max_steps": steps or (DEFAULT_STEPS if chosen.online else -1),
            "report_to": report_to,
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_steps": 0.1,  # of all steps
            "save_total_limit": 2,
            **device_settings(),
        }
        if chosen.online:
            defaults["learning_rate"] = LEARNING_RATE
        if chosen.completion_length and the_task:
            defaults[chosen.completion_length] = the_task.max_completion_tokens
        if full and revision:  # TRL loads the reference model anew
            defaults["model_init_kwargs"] = {"revision": revision}
        owned = dict(OWNED)
        if top_entropy is not None:
            defaults["top_entropy_quantile"] = top_entropy
            owned["top_entropy_quantile"] = "--top-entropy"
        config = build_config(chosen, defaults, overrides, owned)
        values = {**defaults, **chosen.settings, **convert_settings(chosen.config_class, overrides)}
        recipe = Recipe(chosen, values, top_entropy is not None)
        data = load_preferences(dataset, chosen.data) if dataset and the_task is None else None

    base, tokenizer = load_causal_lm(model, revision)
    disable_progress_bars()
    disable_progress_bar()
    to_device(base)
    is_chat = False
    with user_error(ValueError):
        num_layers = len(find_decoder_stack(base).blocks)
        layers = None if full or layer == "auto" else resolve_layers(layer, num_layers)
        if the_task is not None:
            the_task, is_chat = as_asked(the_task, tokenizer, chat)
            _check_prompts(the_task, recipe, config, tokenizer, model, seed)
    if chosen.note:
        note(f"{chosen.name}: {chosen.note}")
    identity = {
        "model": record.describe_model(base),
        "algorithm": chosen.name,
        "trainer": chosen.trainer,
        "layer": None if full else layer,
        "full": full,
        "top_entropy": top_entropy,
        "task": the_task and {"name": the_task.name, "data": dict(the_task.data), "chat": is_chat},
        "dataset": data and {"name": dataset, "data": dict(data.data)},
        "pairs_from_task": pairs_from_task,
        "seed": seed,
        "config": record.describe_config(config),
    }
    if folder.main and folder.previous and (changed := record.differences(folder.previous["settings"], identity)):
        raise UserError(f"the run in {out} has other settings, so it cannot go on with these: {'; '.join(changed)}.")
    run = {
        "format": record.FORMAT,
        "command": folder.previous["command"] if folder.previous else shlex.join(["onelayer", *sys.argv[1:]]),
        "settings": identity,
        "machine": record.describe_machine(),
    }
    with folder.running(run), user_error(ValueError):
        if pairs_from_task and the_task:
            data = _pairs(folder, base, tokenizer, the_task, chosen, pairs_from_task, seed, config)
        why = "chosen by the user"
        if layers is None and not full and the_task:
            layers, why = _rank(folder, base, tokenizer, the_task, recipe, config, seed)
        run["layers"], run["why"] = layers, "the full-parameter baseline" if full else why
        if data is not None:
            rows = data.rows
        elif the_task is not None:
            rows = the_task.rows("train", prompts_needed(chosen, config), seed)
        _run(folder, run, base, tokenizer, recipe, config, rows, the_task)
    if not folder.main:
        return
    run = json.loads((out / "run.json").read_text())
    if as_json:
        print_json(run)
    else:
        _print_summary(run, out)


def _run(
    folder: RunFolder,
    run: dict[str, Any],
    base: Any,
    tokenizer: Any,
    recipe: Recipe,
    config: Any,
    rows: list[dict[str, Any]],
    task: Task | None,
) -> None:
    """Train `run["layers"]`, and put the result and the finished run.json into the folder."""
    from peft_onelayer.rl.training import train as train_rows
    from peft_onelayer.runs.describe import file_digest

    start = time.perf_counter()
    layers = run["layers"]
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = config.max_steps if config.max_steps > 0 else math.ceil(len(rows) / per_step) * config.num_train_epochs
    checkpoint = folder.last_checkpoint() if folder.previous else None
    if folder.previous and checkpoint:
        note(f"going on from {checkpoint.name}")
        run["resumed_from"] = [*folder.previous.get("resumed_from", []), checkpoint.name]
    what = "all blocks" if layers is None else f"block {', '.join(map(str, layers))}"
    kind = "reward" if recipe.algorithm.online else "loss"
    with folder.publishing(run) as published, tempfile.TemporaryDirectory() as scratch:
        with progress_bar(f"training {what}", steps) as bar:
            result = train_rows(
                base,
                tokenizer,
                recipe.algorithm,
                config,
                rows,
                layers=layers,
                task=task,
                top_entropy=recipe.top_entropy,
                resume_from=checkpoint,
                save_to=Path(scratch),
                on_step=lambda step, value: bar.update(step, f"{kind} {value:.3g}"),
            )
        for file in sorted(Path(scratch).iterdir()):
            # The tokenizer is the base's, and training_args.bin is a pickle of what run.json holds.
            if file.name in ADAPTER_FILES or (layers is None and file.name != "training_args.bin"):
                shutil.move(file, published / file.name)
        run["results"] = {
            "steps": result.steps,
            "rewards": result.rewards,
            "losses": result.losses,
            "tokens_generated": result.tokens_generated,
            "tokens_trained": result.tokens_trained,
            "seconds": round(time.perf_counter() - start, 1),
            "sha256": {file.name: file_digest(file) for file in sorted(published.glob("*.safetensors"))},
        }
        (published / "README.md").write_text(_card(run, published))


def _task(
    chosen: Algorithm, task: str | None, dataset: str | None, reward: str | None, pairs: int | None, unsafe: bool
) -> Task | None:
    """The task that prompts and rewards come from; None where an offline algorithm reads its data."""
    if chosen.online and pairs:
        raise ValueError(f"--pairs-from-task makes data for offline algorithms; {chosen.name} generates its own")
    if chosen.online or pairs:
        return open_task(task, dataset, reward, unsafe=unsafe)
    if task or reward or not dataset:
        raise ValueError(
            f"{chosen.name} is offline and trains on {chosen.data} data: give --dataset alone, or --task with "
            "--pairs-from-task"
        )
    return None


def _check_choice(chosen: Algorithm, task: Task | None, layer: str, full: bool, top_entropy: float | None) -> None:
    """Refuse combinations that cannot train what was asked for."""
    if full and layer != "auto":
        raise ValueError(f"--full trains every parameter and --layer {layer} one block; give one of them")
    if layer == "auto" and not full and not chosen.online:
        raise ValueError(f"--layer auto ranks the blocks with online RL; for {chosen.name} name one, such as mid-5")
    if top_entropy is not None and not (0 < top_entropy < 1 and chosen.takes_entropy):
        raise ValueError(
            f"--top-entropy takes a share between 0 and 1 and works with the losses of GRPOTrainer; got {top_entropy} "
            f"with {chosen.name}"
        )
    if task is not None and task.environment_factory is not None and not chosen.environments:
        raise ValueError(
            f"task {task.name} plays through an environment, which {chosen.name} cannot; use grpo or gigpo"
        )
    if chosen.needs_environment and (task is None or task.environment_factory is None):
        raise ValueError(f"{chosen.name} needs a task with an environment, such as textworld")


def _check_prompts(task: Task, recipe: Recipe, config: Any, tokenizer: Any, model: str, seed: int) -> None:
    """Refuse prompts that are too few for a step or that the tokenizer cannot write."""
    from peft_onelayer.rl.training import prompts_needed

    needed = prompts_needed(recipe.algorithm, config, steps=1) if recipe.algorithm.online else 1
    rows = task.rows("train", needed, seed)
    if len(rows) < needed:
        raise ValueError(
            f"one step draws {needed} prompts and task {task.name} has {len(rows)}; use a smaller "
            "--set per_device_train_batch_size"
        )
    check_writable(rows[0], tokenizer, model)


def _pairs(
    folder: RunFolder, base: Any, tokenizer: Any, task: Task, chosen: Algorithm, prompts: int, seed: int, config: Any
) -> OfflineData:
    """Offline data from graded rollouts of the base, kept in pairs.jsonl so that a resumed run has the same."""
    from peft_onelayer.rl.preferences import OfflineData, pairs_from_rollouts

    kept = folder.path / "pairs.jsonl"
    if kept.exists():
        return OfflineData([json.loads(line) for line in kept.read_text().splitlines()], task.data, {})
    with progress_bar(f"sampling {prompts} prompts", prompts * SAMPLES_PER_PAIR) as bar:
        data = pairs_from_rollouts(
            base,
            tokenizer,
            task,
            task.rows("train", prompts, seed),
            chosen.data,
            samples=SAMPLES_PER_PAIR,
            seed=seed,
            batch_size=max(GENERATE, config.per_device_train_batch_size),
            on_progress=bar.update,
        )
    data = _agreed(data)
    note(", ".join(f"{count} {what}" for what, count in data.counts.items()))
    folder.write("pairs.jsonl", "".join(json.dumps(row) + "\n" for row in data.rows))
    return data


def _rank(
    folder: RunFolder, base: Any, tokenizer: Any, task: Task, recipe: Recipe, config: Any, seed: int
) -> tuple[list[int], str]:
    """Rank the blocks within the default budget, kept in layer_profile.json: the blocks to train, and why."""
    from peft_onelayer.probe.race import NothingToLearnError
    from peft_onelayer.records.ranking import LayerRanking
    from peft_onelayer.tuner import find_decoder_stack, resolve_layers

    kept = folder.path / "layer_profile.json"
    if kept.exists():
        return pick_layers(LayerRanking.from_json(kept.read_text()))
    try:
        ranking = rank_blocks(
            base,
            tokenizer,
            task,
            seed=seed,
            training_steps=config.max_steps,
            recipe=recipe,
            batch_size=max(GENERATE, config.per_device_train_batch_size),
        )
    except NothingToLearnError as error:
        note(f"nothing to rank by: {error}")
        return resolve_layers("mid-5", len(find_decoder_stack(base).blocks)), f"nothing to rank by, so mid-5: {error}"
    ranking = _agreed(ranking)
    folder.write("layer_profile.json", ranking.to_json())
    layers, why = pick_layers(ranking)
    note(why)
    rate = ranking.recommended_rate
    if rate is not None and rate < config.learning_rate:
        note(f"the ranking suggests a lower learning rate for this block: --set learning_rate={rate:.2g}")
    return layers, why


def _agreed(value: Any) -> Any:
    """The first process' value: on a GPU the others may have rounded differently."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _progress(run: dict[str, Any]) -> list[str]:
    """What the first and the last tenth of the run had on average."""
    name, values = (
        ("reward", run["results"]["rewards"]) if run["results"]["rewards"] else ("loss", run["results"]["losses"])
    )
    tenth = max(1, len(values) // 10)
    first, last = statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])
    return [f"mean {name} in training", f"{first:.3g} -> {last:.3g} (first and last {tenth} of {len(values)} logs)"]


def _blocks(run: dict[str, Any]) -> str:
    of = f"of {run['settings']['model']['num_layers']}"
    return f"all {of}" if run["layers"] is None else f"{', '.join(map(str, run['layers']))} {of}"


def _print_summary(run: dict[str, Any], out: Path) -> None:
    settings, results = run["settings"], run["results"]
    print_table(
        f"{settings['algorithm']} on {(settings['task'] or settings['dataset'])['name']}",
        ["", ""],
        [
            ["blocks trained", _blocks(run)],
            ["steps", str(results["steps"])],
            _progress(run),
            ["tokens generated, trained on", f"{results['tokens_generated']:,}, {results['tokens_trained']:,}"],
            ["time", f"{results['seconds']:.0f} s"],
        ],
    )
    print_line(f"Written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))


def _card(run: dict[str, Any], folder: Path) -> str:
    """The model card: what was trained and how to repeat it; results are `onelayer eval`'s, and `push` adds them."""
    from peft_onelayer.hub.card import model_card

    local = bool(run["settings"]["model"]["sha256"])
    if run["layers"] is None:
        return model_card(None, run, local_base=local)
    return model_card(json.loads((folder / ADAPTER_FILES[0]).read_text()), run, local_base=local)
