"""What other tools call an option, and how they write it: an unknown one is answered with ours."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from peft_onelayer.records.files import CONFIG

# Hyphens, dashes and the minus sign that are not "-", before or behind it.
DASHES = "-*[\u2010-\u2015\u2212\ufe58\ufe63\uff0d][-\u2010-\u2015\u2212\ufe58\ufe63\uff0d]*"
# The first that the command has is named; "--set FIELD" stands for a field of TRL's configuration.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("--lr", "--rate"), ("--learning-rate",)),
    **dict.fromkeys(("--max-steps", "--num-steps", "--train-steps"), ("--steps",)),
    **dict.fromkeys(("--num-generations", "--group-size", "--rollouts"), ("--completions", "--samples")),
    **dict.fromkeys(("--batch-size", "--prompts-per-step"), ("--prompts",)),
    "--per-device-train-batch-size": ("--prompts", "--batch-size"),
    "--train-batch-size": ("--prompts",),
    **dict.fromkeys(
        ("--out", "--output-dir", "--output", "--save-dir", "--out-dir", "--outdir"), ("--out", "OUT", "FOLDER")
    ),
    **dict.fromkeys(("--model", "--model-name", "--model-name-or-path", "--model-path"), ("MODEL", "--base", "BASE")),
    **dict.fromkeys(("--base", "--base-model", "--base-model-name-or-path"), ("--base", "BASE", "MODEL")),
    **dict.fromkeys(("--adapter", "--adapters", "--adapter-path", "--peft-model"), ("--adapter", "ADAPTER")),
    **dict.fromkeys(("--dataset-name", "--data", "--dataset-path", "--train-file"), ("--dataset",)),
    **dict.fromkeys(("--reward-funcs", "--reward-function", "--reward-fn", "--reward-func"), ("--reward",)),
    **dict.fromkeys(("--layer", "--block", "--blocks", "--layers-to-transform"), ("--layer", "--layers")),
    **dict.fromkeys(("--max-new-tokens", "--max-length", "--max-completion-tokens"), ("--max-tokens",)),
    "--resume-from-checkpoint": ("--resume",),
    "--system-prompt": ("--system",),
    **dict.fromkeys(("--few-shot", "--num-fewshot", "--fewshot"), ("--shots",)),
    **dict.fromkeys(("--trainer", "--algo", "--method"), ("--method", "--algorithm")),
    **dict.fromkeys(("--n", "--limit", "--num-samples", "--num-problems"), ("--problems",)),
    **dict.fromkeys(("--repo-id", "--hub-model-id"), ("REPO_ID",)),
    **dict.fromkeys(("--epochs", "--num-epochs"), ("--set num_train_epochs",)),
}
COMMANDS: dict[str, str] = {
    "resume": "train --resume --out RUN",
    **dict.fromkeys(("finetune", "fine-tune", "fit", "run"), "train"),
    **dict.fromkeys(("evaluate", "test", "benchmark"), "eval"),
    **dict.fromkeys(("chat", "infer", "predict"), "generate"),
    **dict.fromkeys(("rank", "layers"), "probe"),
    **dict.fromkeys(("upload", "publish"), "push"),
    **dict.fromkeys(("download", "fetch"), "pull"),
    **dict.fromkeys(("show", "info"), "inspect"),
    "diff": "analyze",
}
# Fields of TRL's configurations that are often given as options.
FIELDS = {
    *("beta", "bf16", "fp16", "epsilon", "gradient_accumulation_steps", "gradient_checkpointing", "learning_rate"),
    *("logging_steps", "loss_type", "lr_scheduler_type", "max_completion_length", "max_grad_norm", "num_iterations"),
    *("num_train_epochs", "optim", "per_device_train_batch_size", "save_steps", "save_strategy", "scale_rewards"),
    *("temperature", "top_k", "top_p", "use_vllm", "warmup_ratio", "warmup_steps", "weight_decay"),
}


def other_names(given: str, context: typer.Context) -> Sequence[str]:
    """The command's own name for an option that it does not have, as other tools call it; nothing where none is known.

    A name with underscores is one with dashes, and one with a single dash has two.
    """
    parameters = context.command.get_params(context)  # --help among them
    options = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    arguments = {
        str(parameter.name).removesuffix("s").upper()
        for parameter in parameters
        if parameter.param_type_name == "argument"
    }
    dashed = f"--{given.lstrip('-')}".replace("_", "-")
    field = dashed.removeprefix("--").replace("-", "_")
    for name in (dashed, *OTHER_NAMES.get(dashed, ()), *([f"--set {field}"] if field in FIELDS else [])):
        if name.startswith("--set ") and "--set" in options:
            return [f"{name}=VALUE"]
        if name in options:
            return [name]
        if name in arguments:
            return [f"{name}, which is written without an option"]
    if given.startswith("--"):
        return []
    if len(given) == 2:
        return sorted(name for name in options if name.startswith(dashed))
    return difflib.get_close_matches(dashed, sorted(options), 1)


def arguments_of(context: typer.Context) -> str:
    """The command's arguments in their order, such as "BASE ADAPTER... OUT"."""
    parameters = context.command.get_params(context)
    return " ".join(
        parameter.metavar or str(parameter.name).upper()
        for parameter in parameters
        if parameter.param_type_name == "argument"
    )


def for_an_extra_argument(context: typer.Context, extra: str) -> str:
    """What to type in place of a command with one argument too many: an adapter there is given by an option."""
    given = [str(context.params[str(p.name)]) for p in context.command.params if p.param_type_name == "argument"]
    names = [*given, extra]
    adapters = [name for name in names if (Path(name).expanduser() / CONFIG).is_file()]
    options = {option for parameter in context.command.params for option in parameter.opts}
    option = next((option for option in ("--adapter", "--init-adapter") if option in options), None)
    if option and len(names) == 2 and len(adapters) == 1:
        (base,) = set(names) - set(adapters)
        return (
            f"an adapter goes behind {option}: {shlex.join([*context.command_path.split(), base, option, *adapters])}"
        )
    taken = arguments_of(context)
    return f"it takes {taken}, and all else by options" if taken else "it takes none"


def as_typed(option: str, arguments: Sequence[str]) -> str:
    """What was typed where the parser names one letter of it: -lr is read as -l and -r.

    >>> as_typed("-l", ["train", "m", "-lr=1e-4"]), as_typed("--lr", ["train", "m", "--lr"])
    ('-lr', '--lr')
    """
    typed = (argument.partition("=")[0] for argument in arguments if re.match("-[a-zA-Z]", argument))
    return option if option.startswith("--") else next((name for name in typed if option[1:] in name), option)


class PastedDash(typer.TyperException):
    """An option that begins with a dash of another kind than "-", which the parser would take for an argument."""

    def __init__(self, typed: str, context: typer.Context) -> None:
        name = re.sub(DASHES, "", typed)
        option = f"--{name}" if len(name) > 1 else f"-{name}"
        ours = next(iter(other_names(option, context)), option)
        super().__init__(f"{typed} begins with a dash that is not '-', as web pages write it; type {ours}")
        self.ctx = context


def command_among(arguments: Sequence[str], program: Any) -> str | None:
    """The command that was typed, if one was."""
    return next((argument for argument in arguments if argument in program.commands), None)


def refuse_pasted_dashes(arguments: Sequence[str], program: Any) -> None:
    """Raise `PastedDash` for the first word that is written as an option with such a dash; an option's value may be.

    Args:
        program: the group of the commands.
    """
    named = command_among(arguments, program)
    context = typer.Context(program, info_name="onelayer", **program.context_settings)
    if named:
        context = typer.Context(program.commands[named], context, info_name=named)
    parameters = context.command.get_params(context)
    taking = {name for parameter in parameters if not getattr(parameter, "is_flag", True) for name in parameter.opts}
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before not in taking and (found := re.match(rf"({DASHES}[a-zA-Z][\w-]*)(=|$)", argument)):
            raise PastedDash(found[1], context)


def with_our_command(message: str) -> str:
    """The parser's message about an unknown command with what is ours, where it goes by another name elsewhere.

    >>> with_our_command("No such command 'resume'.")
    "No such command 'resume'; here it is onelayer train --resume --out RUN"
    """
    found = re.match(r"No such command '([\w-]+)'", message)
    return f"{found[0]}; here it is onelayer {COMMANDS[found[1]]}" if found and found[1] in COMMANDS else message
