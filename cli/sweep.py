"""`onelayer sweep`: measure what each block contributes, by training every one of them. Resumes what was stopped."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ._errors import user_error
from ._options import (
    Chat,
    Completions,
    Dataset,
    Json,
    ModelName,
    Prompts,
    Revision,
    Reward,
    Set,
    Shots,
    System,
    TaskName,
    TrustRemoteCode,
    Unsafe,
    rate_or_auto,
)
from ._output import Bar, note, print_line, progress_bar, status
from ._profile import print_profile


def sweep(
    model: ModelName,
    task: TaskName = None,
    dataset: Dataset = None,
    reward: Reward = None,
    out: Annotated[Path, typer.Option(help="Folder for the rows and the profile; goes on with what is in it.")] = Path(
        "onelayer-sweep"
    ),
    layers: Annotated[str, typer.Option(help="Blocks to measure: all, or such as 0,5,8-11, mid-5.")] = "all",
    algorithm: Annotated[str, typer.Option(help="grpo, dr_grpo, gigpo, rloo, ...: an online one.")] = "grpo",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of every run.")] = 150,
    seeds: Annotated[str, typer.Option(help="Seeds of training: 0 or 0,1,2.")] = "0",
    prompts: Prompts = None,
    completions: Completions = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            parser=rate_or_auto,
            metavar="NUMBER|auto",
            help="Of the runs of one block; auto for one that is found, by a first step of the middle block. "
            "[default: auto]",
            show_default=False,
        ),
    ] = None,
    full_learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Of the full-parameter runs. [default: --learning-rate; with auto, found likewise]", show_default=False
        ),
    ] = None,
    search_learning_rates: Annotated[
        str | None,
        typer.Option(
            metavar="RATES",
            help="Choose both rates among these, by runs of the middle block and of all parameters: 1e-6,5e-6,2e-5.",
            show_default=False,
        ),
    ] = None,
    regimes: Annotated[
        bool,
        typer.Option(
            "--regimes",
            help="With --search-learning-rates: C at equal rates (--learning-rate, or the blocks' tuned one), with the "
            "full run's tuned, and with both tuned.",
        ),
    ] = False,
    settings: Set = None,
    problems: Annotated[int, typer.Option(min=2, help="Held-out problems to evaluate on.")] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Sampled completions per problem.")] = 4,
    greedy: Annotated[bool, typer.Option("--greedy", help="Evaluate greedily too.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions at a time in the evaluation.")] = 64,
    engine: Annotated[str, typer.Option(help="Where the runs are executed: local, shared, ray or slurm.")] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at a time. [default: one per GPU or, without, per core; with shared 8]",
            show_default=False,
        ),
    ] = None,
    early_stop: Annotated[
        bool, typer.Option("--early-stop", help="With ray: stop blocks that fall behind in training (ASHA).")
    ] = False,
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="With slurm: a parameter of submitit; repeatable."),
    ] = None,
    chat: Chat = None,
    system: System = None,
    shots: Shots = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    unsafe: Unsafe = False,
    as_json: Json = False,
) -> None:
    """Measure the layer contribution of MODEL's blocks: base, full and one run per block, on the same problems."""
    from peft_onelayer.rl.settings import parse_settings
    from peft_onelayer.sweep.early import check_engine, check_sweep, check_target
    from peft_onelayer.sweep.settings import SWEEP_OPTIONS, SweepSettings

    with user_error(ValueError, OSError):
        asked = SweepSettings(
            model=model,
            task=task,
            dataset=dataset,
            reward=reward,
            layers=layers,
            algorithm=algorithm,
            steps=steps,
            seeds=_numbers("--seeds", seeds, int),
            prompts=prompts,
            completions=completions,
            learning_rate=learning_rate,
            full_learning_rate=full_learning_rate,
            search_learning_rates=_numbers("--search-learning-rates", search_learning_rates or "", float),
            regimes=regimes,
            config=parse_settings(settings or []),
            problems=problems,
            samples=samples,
            greedy=greedy,
            batch_size=batch_size,
            chat=chat,
            system=system,
            shots=shots,
            revision=revision,
            trust_remote_code=trust_remote_code,
            unsafe=unsafe,
        )
        check_sweep(asked)
        check_target(out)
        check_engine(engine)
        options = _engine_options(engine, early_stop, slurm or [])
    with status("loading ..."):
        from peft_onelayer.report.plots import plot_profile
        from peft_onelayer.rl.recipe import config_from_text
        from peft_onelayer.sweep.engines import RunsFailedError
        from peft_onelayer.sweep.sweep import sweep_layers

    # Ray and Ray Tune report on stdout, which is for the result.
    with user_error(ValueError, OSError, RunsFailedError), redirect_stdout(sys.stderr):
        asked = replace(asked, config=config_from_text(algorithm, settings or [], SWEEP_OPTIONS))
        with ExitStack() as stack:  # the bar appears when all checks are done
            shown: list[Bar] = []
            unlearnable: list[str] = []  # completions that teach nothing
            there = {path.stem for path in out.glob("rows/*.json")}  # digests of runs that are not run again
            done_so_far = "done" + (
                f", the steps of those under way are in {out / 'logs'}" if engine == "local" else ""
            )

            def start(total: int) -> None:
                note(f"{total} runs go to {out}")
                shown.append(stack.enter_context(progress_bar(f"sweep of {model}", total, "run")))
                shown[0].detail = done_so_far

            def show(done: int, total: int, spec: Any, row: dict[str, Any]) -> None:
                unlearnable[:] = row.get("shown", unlearnable)
                told, result = shown[0].progress.disable, f"{spec}: {_result(row)}"
                detail = done_so_far if told else result
                shown[0].update(done, detail, typical=bool(row["steps"]) and row["digest"] not in there)
                if told or "found" in row:
                    note(f"{done}/{total} {result}")

            try:
                profile = sweep_layers(
                    asked,
                    out=out,
                    engine=engine,
                    workers=workers,
                    engine_options=options,
                    on_start=start,
                    on_note=note,
                    on_row=show,
                )
            except BaseException:
                for line in unlearnable:
                    note(line)
                if shown and not unlearnable and (rows := len(list(out.glob("rows/*.json")))):
                    note(f"{rows} finished runs are kept in {out / 'rows'}; the same command goes on with the others")
                raise
    if as_json:
        print(profile.to_json(), end="")
    else:
        print_profile(profile)
    with user_error(ValueError, OSError):  # behind the result, which a full disk does not take away
        plot_profile(profile, out / "layer_profile.png", f"{algorithm} on {profile.task}, {steps} steps")
    if not as_json:
        print_line(f"Written to {out}: rows/, layer_profile.json, layer_profile.csv, layer_profile.png")


def _result(row: dict[str, Any]) -> str:
    from peft_onelayer.probe.rate import FoundRate

    if "found" in row:
        return FoundRate(**row["found"]).describe()
    if "nothing" in row:
        return "there is nothing to learn from"
    return f"stopped after {row['stopped']} steps" if "stopped" in row else f"score {row['mean']:.4f}"


def _engine_options(engine: str, early_stop: bool, slurm: list[str]) -> dict[str, Any]:
    """Arguments of the engine's own, from the options that belong to it."""
    from peft_onelayer.rl.settings import parse_settings

    if early_stop and engine != "ray":
        raise ValueError(f"--early-stop is done by Ray Tune; use it with --engine ray, not {engine}")
    if slurm and engine != "slurm":
        raise ValueError(f"--slurm sets parameters of --engine slurm, not of {engine}")
    options: dict[str, Any] = {"early_stop": True} if early_stop else {}
    if slurm:
        parameters = parse_settings(slurm)
        options["parameters"] = {k: int(v) if v.isdigit() else v for k, v in parameters.items()}
    return options


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.replace(",", " ").split()]
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} takes {numbers} separated by commas, got {text!r}") from None
