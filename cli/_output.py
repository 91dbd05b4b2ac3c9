"""Where commands print: results on stdout (a table, or JSON with --json), progress and warnings on stderr."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from peft_onelayer.records.text import printable
from peft_onelayer.runs import progress

LINE = 4000  # characters of a printed line
TABLES = 4  # that a wide one becomes at most
EVERY = 30.0  # seconds between two lines where there is no terminal

# The first of the processes that torchrun or accelerate started, or the only one, speaks.
err = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")


def note(message: str) -> None:
    """A line about what is going on."""
    err.print(plain(message), markup=False, soft_wrap=True)


def status(message: str) -> AbstractContextManager[object]:
    """Shows `message` on a terminal while the block runs, and leaves nothing; without one, a line every `EVERY` s."""
    if err.is_terminal:
        return err.status(Text(plain(message)))
    began = time.monotonic()
    return _every_so_often(lambda: f"{message} {duration(time.monotonic() - began)}")


@contextmanager
def _every_so_often(line: Callable[[], str]) -> Iterator[None]:
    """Print `line()` every `EVERY` seconds while the block runs."""
    ended = threading.Event()

    def speak() -> None:
        while not ended.wait(EVERY):
            note(line())

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(42), duration(200), duration(7300)
    ('42 s', '3 min', '2 h 2 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], piped: int = 1000) -> None:
    """A table of plain text on stdout; all columns but the first are aligned right. What is wider than the terminal
    becomes a few tables with the first column in each; nothing is cut.

    Args:
        piped: columns where there is no terminal; many, since a program there wants a row in one line.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = piped
    parts: list[list[int]] = [[]]
    for i in range(1, len(header)):
        if parts[-1] and _width(console, _table(header, rows, [*parts[-1], i])) > console.width:
            parts.append([])
        parts[-1].append(i)
    tables = [_table(header, rows, part) for part in parts]
    if len(tables) > TABLES or any(_width(console, table) > console.width for table in tables):
        _print_rows(title, header, rows)
        return
    if title:
        console.print(Text(plain(title), style="bold"), soft_wrap=True)
    for table in tables:
        console.print(table)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int]) -> Table:
    """The first column and these."""
    table = Table(show_header=any(header))
    for i in (0, *columns):
        table.add_column(Text(plain(header[i])), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(plain(row[i])) for i in (0, *columns)))
    return table


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def _print_rows(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that is much wider than the terminal: a line for each cell that says something, below its row's name."""
    print_line(title)
    for name, *cells in rows:
        print_line(name)
        for column, cell in zip(header[1:], cells, strict=True):
            if cell:
                print_line(f"  {column}: {cell}" if column else f"  {cell}")


def print_next(*commands: Sequence[str]) -> None:
    """What to do next, in commands that can be copied."""
    print_line("Next:")
    for words in commands:
        print_line(f"  {shlex.join(words)}")


def common_prefix(names: Sequence[str]) -> str:
    """What the names of a block's tensors share ("model.layers.5."), to be said once instead of in every row."""
    shared = os.path.commonprefix(list(names))  # noqa: RUF071  these are no paths
    return shared[: shared.rfind(".") + 1]


def print_card(card: str) -> None:
    """A model card, and what it lacks that only a person knows."""
    for line in card.splitlines():
        print_line(line)
    if not re.search(r"^license:", card, re.MULTILINE):
        note("the card names no license; give one with --license, such as apache-2.0")


def print_line(message: str = "") -> None:
    print(plain(message))


def plain(text: str) -> str:
    """One line without what could steer the terminal, and not endless: names and records may come from a stranger."""
    return printable(text, LINE)


class Bar:
    """One progress bar; without a terminal, a line when it starts and every `EVERY` seconds."""

    def __init__(self, description: str, total: int, unit: str = "") -> None:
        self.description, self.total, self.unit = description, total, unit
        self.completed, self.detail = 0, ""
        self.first: tuple[int, float] | None = None  # done at the first update, and when: a resumed run starts late
        self.each: float | None = None  # seconds
        self.progress = Progress(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[detail]}", markup=False),
            console=err,
            disable=not err.is_terminal,
        )
        self.task = self.progress.add_task(plain(description), total=total, detail="", left="")

    def update(self, completed: int, detail: str = "", *, typical: bool = True) -> None:
        """
        Args:
            typical: whether what was done last took about as long as what is left; if not, no time left is told by it.
        """
        now = time.monotonic()
        self.completed, self.detail = completed, detail
        if self.first is None or not typical:
            self.first, self.each = (completed, now), None
        elif completed > self.first[0]:
            self.each = (now - self.first[1]) / (completed - self.first[0])
        self.progress.update(self.task, completed=completed, detail=plain(detail), left=self.left())

    def left(self) -> str:
        return "" if self.each is None else f"{duration(self.each * (self.total - self.completed))} left"

    def line(self) -> str:
        """In a line: "training block 5: step 12 of 150, reward 0.3, 2.1 s per step, 5 min left"."""
        pace = f"{self.each:.3g} s per {self.unit}" if self.unit and self.each is not None else ""
        done = f"{self.unit} {self.completed} of {self.total}".strip()
        return f"{self.description}: " + ", ".join(part for part in (done, self.detail, pace, self.left()) if part)


@contextmanager
def progress_bar(description: str, total: int, unit: str = "") -> Iterator[Bar]:
    bar = Bar(description, total, unit)
    if err.is_terminal:
        with bar.progress:
            yield bar
    else:
        note(f"{description} ...")
        with _every_so_often(bar.line):
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
    def bar(self, description: str, total: int, unit: str = "") -> Iterator[progress.Update]:
        with progress_bar(description, total, unit) as shown:
            yield shown.update


def command_line() -> str:
    """The command as it was typed, for the records."""
    return shlex.join(["onelayer", *sys.argv[1:]])
