"""The table of trainers in docs/trainers.md: written from measured outcomes, and read back to be compared with them."""

from __future__ import annotations

import re
from pathlib import Path

from trl_cells import Cell
from trl_runner import WAYS

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
START, END = "<!-- trl-table: written by `make trl-table` -->\n", "<!-- trl-table: end -->"
HEADER = ("trainer", "mode", "`peft_config=`", "`PeftModel`")
Outcomes = dict[tuple[str, str, str], str]  # by the trainer's title, the mode, and the way


def render(cells: list[Cell], outcomes: Outcomes) -> str:
    """One row for each cell, or one for each of its variants where they came out differently."""
    lines = [_row(HEADER), _row(("---",) * len(HEADER))]
    for cell in cells:
        found = {
            cell.label(v): tuple(outcomes[cell.title, cell.label(v), way] for way in WAYS) for v in cell.variants()
        }
        rows = {cell.label(): next(iter(found.values()))} if len(set(found.values())) == 1 else found
        lines += [_row((cell.title, label, *results)) for label, results in rows.items()]
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(cells: list[Cell], outcomes: Outcomes) -> None:
    before, _, after = _sections()
    PAGE.write_text(before + START + render(cells, outcomes) + END + after, encoding="utf-8")


def published(cell: Cell, variant: dict, way: str) -> str:
    """What the page says of one variant, itself or as one of its cell's."""
    rows = [re.split(r"(?<!\\) *\| *", line.strip("| ")) for line in _sections()[1].splitlines()]
    said = {(row[0], row[1]): row[2 + WAYS.index(way)] for row in rows[2:]}
    return said.get((cell.title, cell.label(variant))) or said[cell.title, cell.label()]


def _sections() -> tuple[str, str, str]:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    table, _, after = rest.partition(END)
    return before, table, after
