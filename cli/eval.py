"""`onelayer eval`: how good a model is on a task and, with an adapter, how much better than its base."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_onelayer.records.locate import holds_adapter, is_local

from ._errors import user_error
from ._figures import print_completions, score
from ._options import (
    AllowOtherBase,
    Also,
    Chat,
    Dataset,
    Json,
    Revision,
    Reward,
    Sampling,
    Shots,
    System,
    TaskName,
    TrustRemoteCode,
    Unsafe,
    refuse_given,
)
from ._output import TerminalProgress, command_line, print_json, print_line, print_table, status

if TYPE_CHECKING:
    from peft_onelayer.records.evaluation import EvaluationRecord
    from peft_onelayer.records.figures import Measured


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Base model, a folder or a Hub id; or an adapter's folder.")],
    adapter: Annotated[
        str | None, typer.Option(help="Adapter to compare with the base: a folder or a Hub id.", show_default=False)
    ] = None,
    task: TaskName = None,
    dataset: Dataset = None,
    reward: Reward = None,
    split: Annotated[str, typer.Option(help="Problems of which split: test or train.")] = "test",
    problems: Annotated[int, typer.Option(min=1, help="Number of problems; fewer where the split is smaller.")] = 256,
    samples: Annotated[int, typer.Option(min=0, help="Sampled completions per problem; 0 for greedy alone.")] = 4,
    greedy: Annotated[bool, typer.Option("--greedy/--no-greedy", help="Decode greedily too.")] = True,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Temperature of sampling, above 0. [default: the run's, else 1]", show_default=False
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Sample among the likeliest tokens of this probability.", show_default=False
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample among so many tokens; 0 for all.", show_default=False)
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Sample among tokens at least this share as likely as the likeliest.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Where a completion is cut. [default: the run's or the task's]", show_default=False),
    ] = None,
    sampling: Sampling = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Sample as a recipe evaluates: a name of onelayer recipes.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Sample as `evaluation` in a YAML file says. Options go before it.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions at a time; the samples depend on it.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the problems and of sampling.")] = 0,
    chat: Chat = None,
    system: System = None,
    shots: Shots = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    unsafe: Unsafe = False,
    allow_other_base: AllowOtherBase = False,
    also: Also = None,
    show: Annotated[
        int, typer.Option(min=0, help="Print so many problems with completions, answer found and reward.")
    ] = 0,
    save_completions: Annotated[
        Path | None, typer.Option(help="JSONL file for every completion with its reward.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the figures and every problem's score.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure MODEL on a task, sampled as its run was and greedy, and an adapter against its base."""
    from peft_onelayer.rl.sampling import sampling_from_text
    from peft_onelayer.runs.early import check_evaluation
    from peft_onelayer.runs.recipes import decoding_of, recipe_or_config
    from peft_onelayer.runs.settings import EvaluationSettings

    def show_result(record: EvaluationRecord) -> None:
        if as_json:
            print_json({name: value for name, value in record.to_dict().items() if name not in ("scores", "problems")})
        else:
            _print_report(record)
        sys.stdout.flush()

    with user_error(ValueError, OSError, ImportError):
        if adapter is None and not (is_local(model) and holds_adapter(model)):
            refuse_given(context, ("allow_other_base",), "is of --adapter; give that too, or leave it out")
        source = recipe_or_config(recipe, config, "how to sample")
        asked = EvaluationSettings(
            model=model,
            adapter=adapter,
            task=task,
            dataset=dataset,
            reward=reward,
            split=split,
            problems=problems,
            samples=samples,
            greedy=greedy,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_completion_tokens=max_tokens,
            batch_size=batch_size,
            seed=seed,
            chat=chat,
            system=system,
            shots=shots,
            revision=revision,
            trust_remote_code=trust_remote_code,
            unsafe=unsafe,
            allow_other_base=allow_other_base,
            also=also or (),
            show=show,
            out=out,
            completions=save_completions,
        )
        check_evaluation(asked)
        given = sampling_from_text(sampling or [])
        decoding = decoding_of(source) if source else {}
        with status("loading ..."):
            from peft_onelayer.runs.evaluation import evaluate as run_evaluation
        for name in ("temperature", "top_p", "top_k", "min_p", "max_completion_tokens"):
            if getattr(asked, name) is not None:
                decoding.pop(name, None)
        run_evaluation(
            replace(asked, sampling=decoding | given),
            command=command_line(),
            progress=TerminalProgress(),
            on_measured=show_result,
        )


def _print_report(record: EvaluationRecord) -> None:
    from peft_onelayer.records.figures import about_watched

    labels = {"sampled": f"avg@{record.samples}", "greedy": "greedy"}

    def rows(results: dict[str, Measured]) -> list[list[str]]:
        return [
            [labels[mode], str(m.n), score(m.base), score(m.adapter), score(m.difference, "+")]
            for mode, m in results.items()
        ]

    header = ["", "n", "base", "adapter", "difference"]
    shown = len(header) if record.adapter else 3
    tables = {f"{record.task.name}, {record.split} split": record.results}
    tables |= {f"{name}, test split": results for name, results in (record.also or {}).items()}
    for title, results in tables.items():
        print_table(title, header[:shown], [row[:shown] for row in rows(results)])
        described = {
            f"{labels[mode]}, {name}": figures.completions
            for mode, m in results.items()
            for name, figures in (("base", m.base), ("adapter", m.adapter))
            if figures is not None
        }
        print_completions(described)
        if said := about_watched({labels[mode]: measured for mode, measured in results.items()}):
            print_line(said)
    paired = ", paired by problem" if record.adapter else ""
    print_line(f"Mean reward ± its standard error over the n problems{paired}.")
