"""`onelayer push`: an adapter becomes a repository on the Hub, in one commit.

--json prints an object of the format "onelayer-push-1": the fields of `Push`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._errors import UserError
from ._hub import hub_session
from ._options import Json, License
from ._output import note, print_card, print_json, print_line, print_table, status

if TYPE_CHECKING:
    from peft_onelayer.hub.push import Push


def push(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter, as onelayer train wrote it.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name; without an owner your own.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository. [default: the account's]", show_default=False),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, created unless it exists. [default: main]", show_default=False)
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.", show_default=False)] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            help="What onelayer eval --out wrote, for the card. [default: eval.json beside the adapter, if any]",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of a base that was a local folder in training.", show_default=False)
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Publish every weight, not only those that differ from the base.")
    ] = False,
    with_peft: Annotated[
        bool, typer.Option("--with-peft", help="Also the form that PEFT loads without this package, in peft/.")
    ] = False,
    license: License = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go up, and send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Publish ADAPTER on the Hub, with a card made from its run.json, layer_profile.json and evaluation."""
    if Path(repo_id).is_dir() and not adapter.is_dir():
        right = shlex.join(["onelayer", "push", repo_id, str(adapter)])
        raise UserError(f"{repo_id} is a folder here and {adapter} is none; the adapter comes first: {right}")
    with hub_session(), status("loading ..."):
        from peft_onelayer.hub.push import push_adapter

    with hub_session(), status(f"preparing {adapter} ..." if dry_run else f"pushing {adapter} to {repo_id} ..."):
        pushed = push_adapter(
            adapter,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=message,
            evaluation=evaluation,
            base_model=base_model,
            dense=dense,
            with_peft=with_peft,
            license=license,
            dry_run=dry_run,
            note=note,
        )
    for line in pushed.notes:
        note(line)
    if as_json:
        print_json(pushed.to_json())
    else:
        _print(pushed, dry_run)


def _print(pushed: Push, dry_run: bool) -> None:
    print_line(f"{pushed.endpoint}/{pushed.repo_id}, branch {pushed.revision}, {pushed.encoding} weights")
    rows = [[name, f"{size:,}"] for name, size in pushed.files.items()]
    rows.append(["all", f"{sum(pushed.files.values()):,}"])
    print_table("", ["file", "bytes"], rows)
    if dry_run:
        print_card(pushed.card)
        print_line("A dry run: nothing was sent. Files of an earlier push that are not listed would be removed.")
    else:
        print_line(f"Pull request: {pushed.pull_request}" if pushed.pull_request else f"Published: {pushed.commit}")
