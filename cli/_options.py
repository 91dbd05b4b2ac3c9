"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import typer

from . import _completion


def rate_or_auto(text: str) -> float | None:
    """The value of --learning-rate: a number, or None for "auto", a rate that is found."""
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise typer.BadParameter(
            f"expected a number such as 1e-5, or auto for one that is found; got {text!r}"
        ) from None


def was_given(context: typer.Context, name: str) -> bool:
    """Whether the command line has the option of the parameter `name`."""
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


def refuse_given(context: typer.Context, names: Collection[str], why: str) -> None:
    """Raise ValueError if the command line has an option of the parameters `names`, which would have no effect.

    Args:
        why: follows the option in the message.
    """
    for option in context.command.params:
        if option.name in names and was_given(context, option.name):
            typed = option.secondary_opts if context.params[option.name] is False else option.opts
            raise ValueError(f"{typed[0]} {why}")


def refuse_two_rates(context: typer.Context, fields: Collection[str]) -> None:
    """Raise ValueError if --learning-rate, which may be auto, and --set learning_rate are both given."""
    if "learning_rate" in fields and was_given(context, "learning_rate"):
        raise ValueError("--learning-rate and --set learning_rate say the same; give one of them")


Algorithm = Annotated[
    str, typer.Option(help="grpo, dr_grpo, gigpo, rloo, dpo, ...", autocompletion=_completion.algorithms)
]
ModelName = Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="arithmetic, gsm8k, reasoning_gym:chain_sum, ... or a file.py.",
        show_default=False,
        autocompletion=_completion.tasks,
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="A JSONL, CSV or Parquet file, or a Hub data set, with prompts, for --reward.", show_default=False
    ),
]
Reward = Annotated[
    str | None,
    typer.Option("--reward", help="Reward for the prompts of --dataset: file.py:function.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Any field of the TRL config; repeatable.",
        autocompletion=_completion.fields,
    ),
]
Prompts = Annotated[
    int | None,
    typer.Option("--prompts", min=1, help="Prompts of an optimizer step. [default: 8]", show_default=False),
]
Completions = Annotated[
    int | None,
    typer.Option("--completions", min=2, help="Completions of each prompt. [default: 8]", show_default=False),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate",
        parser=rate_or_auto,
        metavar="NUMBER|auto",
        help="auto for one that is found: a first step moves the policy far enough. [default: auto]",
        show_default=False,
    ),
]
Method = Annotated[
    str, typer.Option("--method", help="Of a ranking: auto (race and depth prior), race, prior (free), or profile.")
]
Budget = Annotated[
    float, typer.Option("--budget", help="Of a ranking: tokens to spend, as a share of those of the training run.")
]
Sampling = Annotated[
    list[str] | None,
    typer.Option(
        "--sampling",
        metavar="FIELD=VALUE",
        help='How to sample: top_p=0.9, chat_template_kwargs={"enable_thinking": false}, ...; repeatable.',
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        metavar="TASK",
        help="Another task to measure, for what was kept of it; repeatable.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of data, sampling and training.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--plain",
        help="Give prompts as user messages. [default: if the tokenizer has a chat template]",
        show_default=False,
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        "--system",
        metavar="TEXT",
        help="System message of every prompt; plain prompts begin with it.",
        show_default=False,
    ),
]
Shots = Annotated[
    int | None,
    typer.Option(
        "--shots",
        min=0,
        help="Show so many problems of the train split with their solutions in every prompt.",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Hub revision of the base model.", show_default=False)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the base model.")
]
Unsafe = Annotated[bool, typer.Option("--unsafe", help="Let the model's code run without a full sandbox.")]
License = Annotated[
    str | None,
    typer.Option(
        "--license",
        help="Of the adapter: apache-2.0, mit, ... [default: the card's, or the base's]",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Take a base that the adapter was not trained on, if the shapes fit.")
]
