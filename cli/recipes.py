"""`onelayer recipes`: the recipes that come with the package, and what one of them says."""

from __future__ import annotations

from typing import Annotated

import typer

from ._errors import user_error
from ._output import print_line, print_table, status


def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe, to print its file.", show_default=False)] = None,
) -> None:
    """List the settings of papers for `onelayer train --recipe`, or print one as a file for --config."""
    with status("loading ..."):
        from peft_onelayer.runs.recipes import FULL_RATE, read_recipe, recipe_file, recipe_names

    with user_error(ValueError):
        if name is not None:
            print(recipe_file(name).read_text(encoding="utf-8"), end="")
            return
        rows = []
        for each in recipe_names():
            found = read_recipe(each)
            rates = [str(found[rate]) for rate in ("learning_rate", FULL_RATE)]
            rows.append([each, found["model"], found["algorithm"], str(found["layer"]), *rates])
    print_table("", ["recipe", "model", "algorithm", "block", "its rate", "full rate"], rows)
    print_line("None of them was run by this project; onelayer recipes NAME says where its figures are from.")
