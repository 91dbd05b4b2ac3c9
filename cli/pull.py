"""`onelayer pull`: an adapter from the Hub, checked before it is in place.

--json prints an object of the format "onelayer-pull-1": `Pull.to_json` lists its fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_onelayer.records.locate import base_elsewhere, path_to
from peft_onelayer.records.text import name_blocks

from ._errors import UserError
from ._hub import hub_session
from ._options import Json
from ._output import print_json, print_line, print_next, status


def pull(
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the adapter.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit. [default: main]", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch an adapter of this method from the Hub into a new FOLDER, and check every tensor."""
    if Path(repo_id).is_dir() and (repo_id.count("/") != 1 or repo_id.startswith((".", "/"))):
        raise UserError(f"{repo_id} is a folder here; the repository comes first: onelayer pull ORG/NAME FOLDER")
    with status("loading ..."), hub_session():
        from peft_onelayer.hub.pull import pull_adapter

    with status(f"pulling {repo_id} ..."), hub_session():
        pulled = pull_adapter(repo_id, folder, revision=revision)
    if as_json:
        print_json(pulled.to_json())
        return
    adapter = pulled.adapter
    checked = (
        "every value checked"
        if pulled.values_checked
        else "every tensor read; its digests are compared with the base when it is loaded"
    )
    blocks = name_blocks(adapter.layers)
    print_line(
        f"{blocks[0].upper()}{blocks[1:]} of {adapter.config['num_layers']} of "
        f"{adapter.config.get('base_model_name_or_path')}, {adapter.encoding}: {checked}."
    )
    print_line(f"Written to {folder}: {', '.join(pulled.files)}")
    base = base_elsewhere(folder)
    evaluated = [str(folder)] if base is None else [path_to(base), "--adapter", str(folder)]
    print_next(["onelayer", "inspect", str(folder)], ["onelayer", "eval", *evaluated, "--task", "TASK"])
