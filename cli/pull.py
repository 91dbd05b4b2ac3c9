"""`onelayer pull`: an adapter from the Hub, checked before it is in place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._hub import hub_session
from ._output import print_json, print_line, status


def pull(
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the adapter.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit. [default: main]", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Fetch an adapter of this method from the Hub into a new FOLDER, and check every tensor."""
    with status("loading ..."), hub_session():
        from peft_onelayer.hub.pull import pull_adapter

    with status(f"pulling {repo_id} ..."), hub_session():
        pulled = pull_adapter(repo_id, folder, revision=revision)
    adapter = pulled.adapter
    found = {
        "repo_id": repo_id,
        "folder": str(folder),
        "base_model": adapter.config.get("base_model_name_or_path"),
        "layers": adapter.layers,
        "num_layers": adapter.config["num_layers"],
        "tensors": len(adapter.names),
        "encoding": adapter.encoding,
        "commit": pulled.commit,
        "values_checked": pulled.values_checked,
        "files": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
    }
    if as_json:
        print_json(found)
        return
    block = "Block" if len(adapter.layers) == 1 else "Blocks"
    checked = (
        "every value checked"
        if pulled.values_checked
        else "every tensor read; its digests are compared with the base when it is loaded"
    )
    print_line(
        f"{block} {', '.join(map(str, adapter.layers))} of {found['num_layers']} of {found['base_model']}, "
        f"{adapter.encoding}: {checked}."
    )
    print_line(f"Written to {folder}: {', '.join(found['files'])}")
