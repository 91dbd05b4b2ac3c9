"""`onelayer eval`: how good a model is on a task and, with an adapter, how much better than its base.

Both are measured on the same problems with the same sampling seed, so that their difference is paired.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import UserError, user_error
from ._model import find_adapter, load_adapter, load_causal_lm, quiet_hub, read_adapter_config, to_device
from ._options import Chat, Json, Revision, Reward, TaskName, Unsafe
from ._output import note, print_json, print_line, print_table, progress_bar, status
from ._task import as_asked, check_writable, open_task

if TYPE_CHECKING:
    from peft_onelayer.rollouts.evaluation import Evaluation

FORMAT = "onelayer-eval-1"


def evaluate(
    model: Annotated[str, typer.Argument(help="Base model, a folder or a Hub id; or an adapter's folder.")],
    adapter: Annotated[
        str | None, typer.Option(help="Adapter to compare with the base: a folder or a Hub id.", show_default=False)
    ] = None,
    task: TaskName = None,
    dataset: Annotated[
        str | None, typer.Option(help="A JSONL file or a Hub data set with prompts, for --reward.", show_default=False)
    ] = None,
    reward: Reward = None,
    split: Annotated[str, typer.Option(help="Problems of which split: test or train.")] = "test",
    problems: Annotated[int, typer.Option(min=1, help="Number of problems; fewer where the split is smaller.")] = 256,
    samples: Annotated[int, typer.Option(min=0, help="Sampled completions per problem; 0 for greedy alone.")] = 4,
    greedy: Annotated[bool, typer.Option("--greedy/--no-greedy", help="Decode greedily too.")] = True,
    temperature: Annotated[float, typer.Option(min=0.0, help="Temperature of sampling, above 0.")] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Where a completion is cut. [default: the task's own]", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions at a time; the samples depend on it.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the problems and of sampling.")] = 0,
    chat: Chat = None,
    revision: Revision = None,
    unsafe: Unsafe = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the figures and every problem's score.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure MODEL on a task, sampled and greedy, and an adapter against its base on the same problems."""
    start = time.perf_counter()
    with status("loading ..."):
        from peft_onelayer.rollouts.evaluation import evaluate as measure
        from peft_onelayer.rollouts.evaluation import paired_difference
        from peft_onelayer.runs.describe import describe_machine, describe_model, file_digest

    decodings = (["sampled"] if samples else []) + (["greedy"] if greedy else [])
    if not decodings:
        raise UserError("--samples 0 with --no-greedy leaves nothing to measure.")
    if not temperature:
        raise UserError("--temperature must be above 0; for greedy decoding alone use --samples 0.")
    if out is not None:
        _check_out(out)
    if (Path(model).expanduser() / "adapter_config.json").is_file():
        if adapter is not None:
            raise UserError(f"{model} is an adapter itself; give its base model, or leave --adapter out.")
        model, adapter, revision = _base_of(model, revision)
    folder = None if adapter is None else find_adapter(adapter)
    config = {} if folder is None else read_adapter_config(folder)
    with status("loading the task ..."), quiet_hub(), user_error(ValueError, OSError):
        the_task = open_task(task, dataset, reward, unsafe=unsafe)
        the_task.rows(split, 1, seed)  # a split that is not there, before the model is loaded
    base, tokenizer = load_causal_lm(model, revision)
    with user_error(ValueError):
        the_task, is_chat = as_asked(the_task, tokenizer, chat)
        rows = the_task.rows(split, problems, seed)
        check_writable(rows[0], tokenizer, model)
        description = describe_model(base)
    if len(rows) < problems:
        note(f"the {split} split of {the_task.name} has {len(rows)} problems")
    to_device(base)

    def run(policy, name: str) -> dict[str, tuple[Evaluation, float]]:
        measured = {}
        for decoding in decodings:
            started = time.perf_counter()
            count = 1 if decoding == "greedy" else samples
            with progress_bar(f"{name}, {decoding}", len(rows) * count) as bar, user_error(ValueError):
                evaluation = measure(
                    policy,
                    tokenizer,
                    the_task,
                    rows,
                    greedy=decoding == "greedy",
                    samples=count,
                    temperature=temperature,
                    seed=seed,
                    batch_size=batch_size,
                    max_completion_tokens=max_tokens,
                    on_progress=bar.update,
                )
            measured[decoding] = evaluation, round(time.perf_counter() - started, 1)
        return measured

    after = None
    if folder is not None:
        trained_on = config.get("base_model_name_or_path")
        if trained_on and trained_on != base.name_or_path:
            note(f"the adapter was trained on {trained_on}; compared here with {model}")
        after = run(load_adapter(base, folder), "adapter")
        # Some methods of PEFT change the base when they load (PiSSA), so it is measured as it is on disk.
        base, _ = load_causal_lm(model, revision)
        to_device(base)
    before = run(base, "base")

    report: dict[str, Any] = {
        "format": FORMAT,
        "command": shlex.join(["onelayer", *sys.argv[1:]]),
        "model": description,
        "adapter": None
        if folder is None
        else {
            "name": adapter,
            "peft_type": config.get("peft_type"),
            "layers": config.get("layer_indices"),
            "sha256": file_digest(folder / "adapter_model.safetensors"),
        },
        "task": {"name": the_task.name, "data": dict(the_task.data)},
        "split": split,
        "n": len(rows),
        "samples": samples,
        "temperature": temperature,
        "max_completion_tokens": max_tokens or the_task.max_completion_tokens,
        "batch_size": batch_size,
        "chat": is_chat,
        "seed": seed,
        "results": {},
        "machine": describe_machine(),
    }
    for decoding in decodings:
        evaluation = before[decoding][0]
        result = {"n": evaluation.n, "samples": evaluation.samples, "base": _figures(*before[decoding])}
        if after is not None:
            result["adapter"] = _figures(*after[decoding])
            result["difference"] = _mean_and_error(*paired_difference(after[decoding][0], evaluation))
        report["results"][decoding] = result
    report["seconds"] = round(time.perf_counter() - start, 1)
    if out is not None:
        measured = {"base": before} | ({} if after is None else {"adapter": after})
        scores = {name: {mode: list(e.scores) for mode, (e, _) in modes.items()} for name, modes in measured.items()}
        listed = [json.loads(problem) for problem in before[decodings[0]][0].problems]
        _write(out, {**report, "scores": scores, "problems": listed})
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _base_of(adapter: str, revision: str | None) -> tuple[str, str, str | None]:
    """(base, adapter, revision of the base) of an adapter's folder."""
    config = read_adapter_config(Path(adapter).expanduser())
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter} does not name its base model; give the base and --adapter {adapter}.")
    return base, adapter, revision or config.get("revision")


def _figures(evaluation: Evaluation, seconds: float) -> dict[str, float | None]:
    figures = _mean_and_error(evaluation.mean, evaluation.standard_error)
    return {**figures, "tokens_generated": evaluation.tokens_generated, "seconds": seconds}


def _mean_and_error(mean: float, error: float) -> dict[str, float | None]:
    return {"mean": mean, "standard_error": None if math.isnan(error) else error}  # JSON has no NaN


def _print_report(report: dict[str, Any]) -> None:
    columns = ["base"] + (["adapter", "difference"] if report["adapter"] else [])

    def cell(result: dict[str, Any], column: str) -> str:
        figures, sign = result[column], "+" if column == "difference" else ""
        error = "?" if figures["standard_error"] is None else f"{figures['standard_error']:.4f}"
        return f"{figures['mean']:{sign}.4f} ± {error}"

    labels = {"sampled": f"avg@{report['samples']}", "greedy": "greedy"}
    print_table(
        f"{report['task']['name']}, {report['split']} split",
        ["", "n", *columns],
        [
            [labels[decoding], str(result["n"]), *(cell(result, column) for column in columns)]
            for decoding, result in report["results"].items()
        ],
    )
    paired = ", paired by problem" if report["adapter"] else ""
    print_line(f"Mean reward ± its standard error over the n problems{paired}.")


def _check_out(out: Path) -> None:
    """Refuse, before hours of work, a file that cannot be written or that an evaluation did not write."""
    if out.is_dir():
        raise UserError(f"{out} is a folder; --out takes a file, such as {out / 'eval.json'}.")
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist; create it or choose another file for --out.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise UserError(f"{out.parent} is read-only; choose another file for --out.")
    if out.exists():
        try:
            ours = json.loads(out.read_text()).get("format") == FORMAT
        except (ValueError, AttributeError):
            ours = False
        if not ours:
            raise UserError(f"{out} exists and is no earlier evaluation; choose another file for --out.")


def _write(out: Path, data: dict[str, Any]) -> None:
    """Write the whole file or nothing."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.write_text(json.dumps(data, indent=2) + "\n")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
