"""The entry point: the Typer application, and how every command ends.

Exit codes: 0 done, 1 an error in one line, 2 wrong usage in one line, 130 after Ctrl-C. ONELAYER_DEBUG=1 shows
tracebacks.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_onelayer.records.privacy import without_secrets
from peft_onelayer.records.text import one_line

from . import (
    analyze,
    card,
    combine,
    compare,
    demo,
    doctor,
    entropy,
    eval,
    export,
    generate,
    inspect,
    merge,
    probe,
    pull,
    push,
    recipes,
    report,
    search,
    sweep,
    tasks,
    train,
    vote,
)
from ._errors import LIMIT, UserError
from ._examples import EXAMPLES
from ._other_names import (
    arguments_of,
    as_typed,
    command_among,
    for_an_extra_argument,
    other_names,
    refuse_pasted_dashes,
    with_our_command,
)

app = typer.Typer(
    name="onelayer",
    help="Train one transformer block with reinforcement learning, and see what it is worth.",
    invoke_without_command=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"onelayer {version('peft-onelayer')}")
        raise typer.Exit


@app.callback()
def _onelayer(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command("demo")(demo.demo)
app.command("probe")(probe.probe)
app.command("train")(train.train)
app.command("recipes")(recipes.recipes)
app.command("eval")(eval.evaluate)
app.command("generate")(generate.generate)
app.command("sweep")(sweep.sweep)
app.command("inspect")(inspect.inspect)
app.command("analyze", epilog=analyze.EXAMPLES)(analyze.analyze)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("entropy")(entropy.entropy)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("card")(card.card)
app.command("combine", epilog=combine.EXAMPLES)(combine.combine)
app.command("vote")(vote.vote)
app.command("push")(push.push)
app.command("pull")(pull.pull)
app.command("report")(report.report)
app.command("tasks")(tasks.tasks)
app.command("algorithms")(tasks.algorithms)
app.command("doctor")(doctor.doctor)
app.command("search")(search.search)
for command in app.registered_commands:
    assert command.callback is not None and command.callback.__doc__ is not None
    command.short_help = command.callback.__doc__.partition("\n\n")[0]  # whole: Typer would cut it at the line's end
    command.epilog = command.epilog or f"Examples:\n\n\b{EXAMPLES[str(command.name)]}"


def _terminate(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)  # unwinds, so that nothing half-written is left


def _one_line_of_a_warning(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    return f"warning: {one_line(str(message), LIMIT)}\n"  # no path, and no line of somebody's code


def _of_the_hubs_folder(error: Exception) -> str:
    """What to do about an error that comes from an HF_HOME that is no folder."""
    home = os.environ.get("HF_HOME", "")
    if not home or home not in str(error):
        return ""
    there = next(path for path in (Path(home), *Path(home).parents) if path.exists())
    return "" if there.is_dir() else f"; HF_HOME is {home}: set it to a folder"


def _with_what_was_given(error: typer.TyperException) -> str:
    """The message. Typer leaves values to pydantic since 0.29, which says only what it wants of them."""
    cause: Any = error.__cause__
    if type(cause).__name__ != "ValidationError":
        return str(error.message)
    message, given = error.message.removeprefix("Value error, "), repr(cause.errors()[0]["input"])
    return message if given in message else f"{message}, got {given}"


@functools.cache
def program() -> Any:
    """The group of the commands; making it takes a tenth of a second."""
    return typer.main.get_command(app)


def main() -> None:
    signal.signal(signal.SIGTERM, _terminate)
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, _terminate)  # of a terminal that was closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or a pipe of another encoding than UTF-8
            stream.reconfigure(errors="backslashreplace")
    # Nothing that a user of this command could change: peft and trl use names that transformers 5 renamed, torchao and
    # bitsandbytes, which peft imports where they are installed, report the kernels that they cannot load, and Python
    # remarks on installed sources that it compiles for the first time.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r".*[/\\]site-packages[/\\]", category=SyntaxWarning)
    warnings.formatwarning = _one_line_of_a_warning
    try:
        refuse_pasted_dashes(sys.argv[1:], program())
        code = program()(prog_name="onelayer", standalone_mode=False) or 0
        if code == 130:  # Typer's way of reporting Ctrl-C when it does not end the process itself
            raise KeyboardInterrupt
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)  # only usage errors know their command, and not all of them
        named = command_among(sys.argv[1:], program())
        where = context.command_path if context else " ".join(filter(None, ["onelayer", named]))
        if context and hasattr(error, "possibilities"):  # no such option
            option = getattr(error, "option_name", "")
            typed = as_typed(option, sys.argv[1:])
            error.message = error.message.replace(option, typed)
            error.possibilities = other_names(typed, context) or error.possibilities
        error.message = with_our_command(_with_what_was_given(error))
        said = error.format_message()  # a missing choice is listed over several lines
        if context and said.startswith("Missing argument"):  # the one that is named may be another than was left out
            said = f"{said.rstrip('.')}; it takes {arguments_of(context)}"
        if context and (
            extra := re.fullmatch(r"Got unexpected extra arguments? \((\S+)\)\.?", said.replace("(s)", ""))
        ):
            said = f"{said.rstrip('.')}; {for_an_extra_argument(context, extra[1])}"
        message = one_line(without_secrets(said), LIMIT)
        print(f"{where}: {message.rstrip('.')}; see '{where} --help'.", file=sys.stderr)
        code = 2
    except (UserError, OSError, ImportError) as error:
        if os.environ.get("ONELAYER_DEBUG"):
            raise
        print(f"onelayer: {without_secrets(one_line(error, LIMIT))}{_of_the_hubs_folder(error)}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("onelayer: interrupted.", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
