"""Where commands print: results on stdout (a table, or JSON with --json), progress and warnings on stderr."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from peft_onelayer.records.text import printable
from peft_onelayer.runs import progress

LINE = 4000  # characters of a printed line

# The first of the processes that torchrun or accelerate started, or the only one, speaks.
err = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")


def note(message: str) -> None:
    """A line about what is going on."""
    err.print(plain(message), markup=False, soft_wrap=True)


def status(message: str) -> AbstractContextManager[object]:
    """Shows `message` on a terminal while the block runs, and leaves nothing behind."""
    return err.status(Text(plain(message)))


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of plain text on stdout; all columns but the first are aligned right."""
    table = Table(title=Text(plain(title)), title_justify="left", title_style="bold", show_header=any(header))
    for i, name in enumerate(header):
        table.add_column(Text(plain(name)), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # of which it takes what it needs: a reader in a pipe wants whole names
    console.print(table)


def common_prefix(names: Sequence[str]) -> str:
    """What the names of a block's tensors share ("model.layers.5."), to be said once instead of in every row."""
    shared = os.path.commonprefix(list(names))  # noqa: RUF071  these are no paths
    return shared[: shared.rfind(".") + 1]


def print_line(message: str = "") -> None:
    print(plain(message))


def plain(text: str) -> str:
    """One line without what could steer the terminal, and not endless: names and records may come from a stranger."""
    return printable(text, LINE)


class Bar:
    """One progress bar; without a terminal, one line when it starts."""

    def __init__(self, description: str, total: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=err,
            disable=not err.is_terminal,
        )
        self.task = self.progress.add_task(plain(description), total=total, detail="")

    def update(self, completed: int, detail: str = "") -> None:
        self.progress.update(self.task, completed=completed, detail=plain(detail))


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Bar]:
    bar = Bar(description, total)
    if not err.is_terminal:
        note(f"{description} ...")
    with bar.progress:
        yield bar


@contextmanager
def late_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of per cent that appears when the function it yields is first called, with what is done and the total: an
    error before that stands alone."""
    with ExitStack() as stack:
        shown: list[Bar] = []

        def update(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(progress_bar(description, 100)))
            shown[0].update(100 * done // max(total, 1), f"{done / 1e6:.0f} of {total / 1e6:.0f} million entries")

        yield update


class TerminalProgress(progress.Progress):
    """What a library call tells, on stderr."""

    def note(self, message: str) -> None:
        note(message)

    def status(self, message: str) -> AbstractContextManager[object]:
        return status(message)

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[progress.Update]:
        with progress_bar(description, total) as shown:
            yield shown.update


def command_line() -> str:
    """The command as it was typed, for the records."""
    return shlex.join(["onelayer", *sys.argv[1:]])
