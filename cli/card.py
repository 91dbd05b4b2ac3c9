"""`onelayer card`: write the model card of an adapter's folder, and show it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._errors import user_error
from ._options import License
from ._output import note, print_card, status


def card(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            help="What onelayer eval --out wrote. [default: eval.json beside the adapter, if any]",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of a base that was a local folder in training.", show_default=False)
    ] = None,
    license: License = None,
) -> None:
    """Write README.md of ADAPTER from its records and show it; text that a person wrote around our parts is kept."""
    with status("loading ..."):
        from peft_onelayer.hub.local_card import write_card

    with user_error(ValueError, OSError), status(f"writing the card of {adapter} ..."):
        text = write_card(adapter, evaluation=evaluation, base_model=base_model, license=license)
    print_card(text)
    note(f"Written to {adapter / 'README.md'}")
