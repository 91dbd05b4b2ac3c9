"""`onelayer report`: what runs, rankings and sweeps came to, as one HTML page, or as bars in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._errors import user_error
from ._output import note, print_line, status

if TYPE_CHECKING:
    from peft_onelayer.report.page import Subject


def report(
    subjects: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, sweeps or demos, or JSON files of rankings.")
    ],
    html: Annotated[
        Path | None,
        typer.Option(help="HTML page to write; it needs no network. [default: bars here]", show_default=False),
    ] = None,
) -> None:
    """Show every RUN: layer profile, curves, where the change sits, costs, completions, and how to repeat it."""
    from peft_onelayer.records.files import check_file, output, write_whole

    with user_error(ValueError, OSError):
        if html is not None:
            if html.suffix not in (".html", ".htm"):
                raise ValueError(f"--html takes a file such as report.html, not {html}")
            check_file(html, _is_report)
        with status("reading ..."):
            from peft_onelayer.runs.report import read_subject

            found = [read_subject(name) for name in subjects]
        if html is None:
            for subject in found:
                _print(subject)
            print_line("--html report.html has the curves, the completions and the rest")
            return
        with output(html), status("drawing ..."):
            from peft_onelayer.report.page import report_page

            write_whole(html, report_page(found))
    note(f"Written to {html}")


def _is_report(file: Path) -> bool:
    with file.open(encoding="utf-8", errors="replace") as text:
        return "<title>onelayer: " in text.read(1000)


def _print(subject: Subject) -> None:
    from peft_onelayer.records.figures import about_watched
    from peft_onelayer.records.text import name_blocks
    from peft_onelayer.report.drawing import terminal_bars
    from peft_onelayer.report.plots import shown

    print_line(subject.name)
    if subject.ranking:
        ranking = subject.ranking
        what, values, errors = shown(ranking)
        print_line(f"  {ranking.method} on {ranking.task}: {what}")
        for line in terminal_bars(values, errors):
            print_line(f"  {line}")
    results = subject.run.results if subject.run else None
    if subject.run and results:
        settings = subject.run.settings
        blocks = "all blocks" if subject.run.layers is None else name_blocks(subject.run.layers)
        print_line(f"  {settings.algorithm} on {settings.source.name}, {blocks}, {results.steps} steps")
        if results.verdict:
            print_line(f"  {results.verdict}")
    for mode, measured in (subject.evaluation.results if subject.evaluation else {}).items():
        trained = f" -> {measured.adapter.mean:.4f}" if measured.adapter else ""
        print_line(f"  {mode}: {measured.base.mean:.4f}{trained}")
        if said := about_watched({mode: measured}):
            print_line(f"  {said}")
