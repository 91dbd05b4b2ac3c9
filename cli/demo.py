"""`onelayer demo`: the whole job on the embedded model, in under three minutes on two cores.

Evaluate the base, rank the blocks, train the best one with TRL's GRPO, evaluate again, save the adapter, reload it in
a fresh process, and say what came of it.
"""

from __future__ import annotations

import json
import shlex
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import UserError, user_error
from ._model import limit_threads, load_causal_lm
from ._options import Json
from ._output import note, print_json, print_line, print_table, progress_bar, status
from ._ranking import pick_layers, rank_blocks

if TYPE_CHECKING:
    from peft_onelayer.records.ranking import LayerRanking
    from peft_onelayer.tasks import Task

FORMAT = "onelayer-demo-1"
FILES = {"adapter", "demo.json", "ranking.png", "reward.png"}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
ADAPTER_FILES |= {"layer_profile.json", "run.json", "eval.json"}
TASKS = ("arithmetic", "sort")
PROBLEMS = 1024
SAMPLES = 4


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapter, the figures and the plots.")] = Path(
        "onelayer-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of data, sampling and training.")] = 0,
    task: Annotated[str, typer.Option(help="Task to train on: arithmetic or sort.")] = "arithmetic",
    layer: Annotated[
        str, typer.Option(help="Block to train (5, -1, 3-5, middle, mid-5), or auto to rank the blocks first.")
    ] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="GRPO steps, each of 24 prompts x 8 completions.")] = 150,
    model: Annotated[
        str | None, typer.Option(help="Another base model for the task: a folder or a Hub id.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch one block get chosen, trained with GRPO and saved as an adapter (under 3 minutes on 2 cores)."""
    start = time.perf_counter()
    with status("loading ..."):
        from peft_onelayer.records.files import check_folder, staged_directory
        from peft_onelayer.tasks import load_task
        from peft_onelayer.tuner import find_decoder_stack, resolve_layers

    with user_error(ValueError):
        check_folder(out, _is_ours)
        if task not in TASKS:
            raise UserError(f"the demo knows the tasks {' and '.join(TASKS)}, not {task!r}; onelayer train takes all.")
        the_task = load_task(task)
    base, tokenizer = load_causal_lm(str(files("peft_onelayer") / "demo_model") if model is None else model)
    with user_error(ValueError):
        num_layers = len(find_decoder_stack(base).blocks)
        layers = None if layer == "auto" else resolve_layers(layer, num_layers)
    prompt = the_task.rows("test", 1, seed)[0]["prompt"]
    if tokenizer.decode(tokenizer(prompt, add_special_tokens=False).input_ids) != prompt:
        raise UserError(f"the tokenizer of {model} cannot write the task's prompts, such as {prompt!r}.")
    command = ["onelayer", "demo", "--seed", str(seed), "--task", task, "--layer", layer, "--steps", str(steps)]
    command += ["--model", model] if model else []

    with staged_directory(out, _is_ours) as folder:
        summary = _run(base, tokenizer, the_task, layers, steps, seed, folder, shlex.join(command))
        summary["seconds"] = round(time.perf_counter() - start, 1)
        (folder / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary, out)


def _run(base, tokenizer, task, layers: list[int] | None, steps: int, seed: int, folder: Path, command: str) -> dict:
    """Do the work and write everything but demo.json to `folder`; returns what demo.json holds."""
    from peft import get_peft_model_state_dict

    from peft_onelayer.adapter.reload import fingerprint, fingerprint_in_fresh_process
    from peft_onelayer.hub.card import model_card
    from peft_onelayer.report.plots import plot_ranking, plot_rewards
    from peft_onelayer.rl.training import LEARNING_RATE, train_layer
    from peft_onelayer.rollouts.evaluation import evaluate, paired_difference
    from peft_onelayer.runs.describe import describe_model
    from peft_onelayer.tuner import find_decoder_stack

    num_layers = len(find_decoder_stack(base).blocks)
    model = describe_model(base)
    parameters = model["parameters"]
    limit_threads(base)
    rows = task.rows("test", PROBLEMS, seed)

    def measure(model, greedy: bool):
        return evaluate(model, tokenizer, task, rows, samples=SAMPLES, seed=seed, greedy=greedy)

    note(f"{task.name} on {PROBLEMS} held-out problems, such as {rows[0]['prompt']} -> {rows[0]['answer']}")
    with status("evaluating the base ..."):
        before = {mode: measure(base, greedy=mode == "greedy") for mode in ("sampled", "greedy")}
    note(f"base: {_percent(before['sampled'].mean)} sampled, {_percent(before['greedy'].mean)} greedy")

    ranking: LayerRanking | None = None
    if layers is None:
        ranking = rank_blocks(base, tokenizer, task, seed=seed, training_steps=steps)
        layers, why = pick_layers(ranking)
        note(why)
        plot_ranking(ranking, folder / "ranking.png", f"what each block gained in the race, {task.name}")
    else:
        why = "chosen by the user"
    name = ", ".join(map(str, layers))

    with progress_bar(f"training block {name}", steps) as bar:
        result = train_layer(
            base,
            tokenizer,
            task,
            layers,
            steps=steps,
            seed=seed,
            on_step=lambda step, reward: bar.update(step, f"reward {reward:.2f}"),
        )
    plot_rewards(result.rewards, folder / "reward.png", f"GRPO on block {name} of {num_layers}, {task.name}")

    trained = result.model
    with status("evaluating the adapter ..."):
        after = {mode: measure(trained, greedy=mode == "greedy") for mode in before}
    differences = {mode: paired_difference(after[mode], before[mode]) for mode in before}
    trained_parameters = sum(
        t.numel() for t in get_peft_model_state_dict(trained, save_embedding_layers=False).values()
    )

    note("saving the adapter and reloading it in a fresh process ...")
    adapter = folder / "adapter"
    trained.save_pretrained(str(adapter))
    token_ids = tokenizer([row["prompt"] for row in rows[:16]]).input_ids
    here = fingerprint(trained, token_ids)
    with user_error(RuntimeError):
        equal = fingerprint_in_fresh_process(adapter, token_ids) == here
    summary: dict[str, Any] = {
        "format": FORMAT,
        "task": task.name,
        "model": base.name_or_path,
        "num_layers": num_layers,
        "layers": layers,
        "why": why,
        "problems": PROBLEMS,
        "samples": SAMPLES,
        "results": {
            mode: {
                "base": before[mode].mean,
                "adapter": after[mode].mean,
                "difference": differences[mode][0],
                "standard_error": differences[mode][1],
            }
            for mode in before
        },
        "parameters": parameters,
        "trained_parameters": trained_parameters,
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "reload_bit_equal": equal,
        "sha256": here["weights"],
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "seed": seed,
        "rewards": result.rewards,
        "probe_cost": ranking.cost if ranking else None,
        "versions": {
            package: version(package) for package in ("peft-onelayer", "peft", "trl", "transformers", "torch")
        },
        "command": command,
    }
    summary["verdict"] = _verdict(summary)
    if ranking is not None:
        (adapter / "layer_profile.json").write_text(ranking.to_json())
    measured = {
        mode: {
            "n": e.n,
            "samples": e.samples,
            "base": {"mean": e.mean, "standard_error": e.standard_error},
            "adapter": {"mean": after[mode].mean, "standard_error": after[mode].standard_error},
            "difference": dict(zip(("mean", "standard_error"), differences[mode], strict=True)),
        }
        for mode, e in before.items()
    }
    run, evaluation = _records(summary, model, task, adapter, measured)
    for name, record in (("run.json", run), ("eval.json", evaluation)):
        (adapter / name).write_text(json.dumps(record, indent=2) + "\n")
    config = json.loads((adapter / "adapter_config.json").read_text())
    card = model_card(config, run, evaluation, parameters=trained_parameters, local_base=bool(model["sha256"]))
    (adapter / "README.md").write_text(card)
    if not equal:
        raise UserError(
            "the adapter reloaded in a fresh process is not bit-equal to the trained one; nothing was kept."
        )
    return summary


def _is_ours(folder: Path) -> bool:
    """Whether an earlier demo wrote everything in `folder`, so that nothing is lost by replacing it."""
    try:
        written = json.loads((folder / "demo.json").read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False
    adapter = folder / "adapter"
    return (
        written
        and {p.name for p in folder.iterdir()} <= FILES
        and adapter.is_dir()
        and {p.name for p in adapter.iterdir()} <= ADAPTER_FILES
    )


def _verdict(summary: dict[str, Any]) -> str:
    """What the sampled accuracy, which GRPO optimises, says; a gain counts beyond three standard errors."""
    sampled = summary["results"]["sampled"]
    difference, error = sampled["difference"], sampled["standard_error"]
    change = f"{100 * difference:+.1f} points of sampled accuracy, standard error {100 * error:.1f}"
    block = "block" if len(summary["layers"]) == 1 else "blocks"
    where = f"{block} {', '.join(map(str, summary['layers']))}"
    if difference > 3 * error:
        return f"RL on {where} helped: {change}."
    if difference < -3 * error:
        return f"RL on {where} made the model worse: {change}."
    return f"RL on {where} did not help measurably: {change}, within three standard errors of zero."


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _result_rows(summary: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"{mode} accuracy",
            _percent(r["base"]),
            _percent(r["adapter"]),
            f"{100 * r['difference']:+.1f}",
            f"{100 * r['standard_error']:.1f}",
        ]
        for mode, r in summary["results"].items()
    ]


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    print_table(
        f"{summary['task']}, {summary['problems']} held-out problems",
        ["", "base", "adapter", "difference (points)", "standard error"],
        _result_rows(summary),
    )
    share = summary["trained_parameters"] / summary["parameters"]
    blocks = ", ".join(map(str, summary["layers"]))
    print_table(
        f"block {blocks} of {summary['num_layers']}",
        ["", ""],
        [
            ["trained parameters", f"{summary['trained_parameters']:,} of {summary['parameters']:,} ({share:.1%})"],
            ["adapter", f"{summary['adapter_bytes']:,} bytes"],
            ["reloaded in a fresh process", "bit-equal"],
            ["time", f"{summary['seconds']:.0f} s"],
        ],
    )
    print_line(summary["verdict"])
    print_line(f"Written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))


def _records(
    summary: dict[str, Any], model: dict[str, Any], task: Task, adapter: Path, measured: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """run.json and eval.json of the adapter, in the form of `onelayer train` and `eval`, for `onelayer push`."""
    from peft_onelayer.hub.card import EVALUATION_FORMAT
    from peft_onelayer.rl.recipe import demo_recipe
    from peft_onelayer.runs import describe as record

    algorithm = demo_recipe(task, summary["steps"]).algorithm
    data = {"name": task.name, "data": dict(task.data), "chat": False}
    run = {
        "format": record.FORMAT,
        "command": summary["command"],
        "settings": {
            "model": model,
            "algorithm": algorithm.name,
            "trainer": algorithm.trainer,
            "task": data,
            "seed": summary["seed"],
            "config": {"learning_rate": summary["learning_rate"]},
        },
        "machine": record.describe_machine(),
        "layers": summary["layers"],
        "why": summary["why"],
        "results": {name: summary[name] for name in ("steps", "rewards", "verdict")},
        "status": "finished",
    }
    evaluation = {
        "format": EVALUATION_FORMAT,
        "command": summary["command"],
        "model": model,
        "adapter": {
            "name": adapter.name,
            "peft_type": "SINGLE_LAYER",
            "layers": summary["layers"],
            "sha256": record.file_digest(adapter / "adapter_model.safetensors"),
        },
        "task": data,
        "split": "test",
        "n": PROBLEMS,
        "samples": SAMPLES,
        "temperature": 1.0,
        "max_completion_tokens": task.max_completion_tokens,
        "seed": summary["seed"],
        "results": measured,
    }
    return run, evaluation
