"""Where commands print: results on stdout (a table, or JSON with --json), progress and warnings on stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def is_main_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


err = Console(stderr=True, highlight=False, quiet=not is_main_process())


def note(message: str) -> None:
    """A line about what is going on."""
    err.print(message, markup=False, soft_wrap=True)


def status(message: str) -> AbstractContextManager[object]:
    """Shows `message` on a terminal while the block runs, and leaves nothing behind."""
    return err.status(message)


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; all columns but the first are aligned right."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(header))
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def print_line(message: str = "") -> None:
    print(message)


class Bar:
    """One progress bar; without a terminal, one line when it starts."""

    def __init__(self, description: str, total: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}"),
            console=err,
            disable=not err.is_terminal,
        )
        self.task = self.progress.add_task(description, total=total, detail="")

    def update(self, completed: int, detail: str = "") -> None:
        self.progress.update(self.task, completed=completed, detail=detail)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Bar]:
    bar = Bar(description, total)
    if not err.is_terminal:
        note(f"{description} ...")
    with bar.progress:
        yield bar
