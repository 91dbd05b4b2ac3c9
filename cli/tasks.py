"""`onelayer tasks` and `onelayer algorithms`: what there is to train on, and to train with.

--json prints objects of the formats "onelayer-tasks-1" and "onelayer-algorithms-1".
"""

from __future__ import annotations

import ast
import importlib.util
from importlib.resources import files
from typing import Annotated

import typer

from ._errors import user_error
from ._options import Json
from ._output import print_json, print_line, print_table


def tasks(as_json: Json = False) -> None:
    """List the tasks for --task, and how to bring one of your own."""
    from peft_onelayer.tasks import EXTRA, TASKS

    rows = []
    for name in TASKS:
        source = (files("peft_onelayer.tasks") / f"{name}.py").read_text(encoding="utf-8")
        about = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].replace("\n", " ")
        needs = "" if name not in EXTRA or importlib.util.find_spec(name) else "pip install 'peft-onelayer[tasks]'"
        rows.append({"name": name, "about": about, "install": needs})
    if as_json:
        print_json({"format": "onelayer-tasks-1", "tasks": rows})
        return
    for row in rows:
        print_line(f"{row['name']}" + (f"   ({row['install']})" if row["install"] else ""))
        print_line(f"  {row['about']}")
    print_line("Your own: --task my_task.py with rows(split, n, seed) and one function whose name holds reward, or")
    print_line("--dataset problems.csv --reward my_reward.py:function (JSONL, CSV, Parquet, or a Hub data set).")


def algorithms(
    name: Annotated[str | None, typer.Argument(help="One of them, to print its settings.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the algorithms for --algorithm with their data, trainer and paper, or print the settings of one."""
    from peft_onelayer.rl.algorithms import ALGORITHMS, load_algorithm

    with user_error(ValueError):
        chosen = list(ALGORITHMS.values()) if name is None else [load_algorithm(name)]
    if as_json:
        rows = [
            {
                "name": each.name,
                "data": each.data,
                "trainer": each.trainer,
                "paper": each.source,
                "settings": dict(each.settings),
                "note": each.note,
            }
            for each in chosen
        ]
        print_json({"format": "onelayer-algorithms-1", "algorithms": rows})
        return
    print_table(
        "",
        ["algorithm", "trains on", "trainer", "arXiv"],
        [[each.name, each.data, each.trainer.rpartition(".")[2], each.source] for each in chosen],
    )
    if name is not None:
        for field, value in chosen[0].settings.items():
            print_line(f"--set {field}={value}")
        if chosen[0].note:
            print_line(chosen[0].note)
    else:
        print_line(
            "task: prompts and a reward, online; all others are offline data. onelayer algorithms NAME has more."
        )
