"""`onelayer search`: the adapters on the Hub, by base, task and block.

--json prints {"format": "onelayer-search-1", "adapters": [...]}, of each the fields of `FoundAdapter`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ._hub import hub_session
from ._options import Json
from ._output import note, print_json, print_table, status


def search(
    base: Annotated[str | None, typer.Option(help="Hub id of the base model.", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help="Task that was trained on.", show_default=False)] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="A block that was trained, counted from 0.", show_default=False)
    ] = None,
    sort: Annotated[
        Literal["downloads", "likes", "created_at", "last_modified", "trending_score"],
        typer.Option(help="What decides the order."),
    ] = "downloads",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: Json = False,
) -> None:
    """List the adapters of this method on the Hub."""
    with status("loading ..."), hub_session():
        from peft_onelayer.hub.search import search_adapters

    with status("searching ..."), hub_session():
        found = search_adapters(base=base, task=task, layer=layer, sort=sort, limit=limit)
    if as_json:
        print_json({"format": "onelayer-search-1", "adapters": [adapter.to_json() for adapter in found]})
        return
    if not found:
        note("No adapter on the Hub carries these tags; leave out an option to see more.")
        return
    rows = [[a.repo_id, a.base or "", ", ".join(map(str, a.layers)), a.task or "", f"{a.downloads:,}"] for a in found]
    print_table("", ["adapter", "base", "block", "task", "downloads"], rows)
