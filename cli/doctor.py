"""`onelayer doctor`: what this machine has, what is amiss, and what to do about it.

--json prints an object of the format "onelayer-doctor-1" with a list of `Finding`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._errors import UserError
from ._options import Json
from ._output import print_json, print_line, status


def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder whose runs are looked at.")] = Path(),
    as_json: Json = False,
) -> None:
    """Look at versions, devices, extras, Hub, sandbox and runs; exit with 1 where something will not work."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give the one whose runs are looked at, or nothing for this one")
    with status("looking ..."):
        from peft_onelayer.runs.doctor import examine

        findings = examine(folder)
    if as_json:
        print_json({"format": "onelayer-doctor-1", "findings": [finding.to_json() for finding in findings]})
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            print_line(f"{finding.state:<8} {finding.what:<{width}}  {finding.found}")
            if finding.cure:
                print_line(f"{'':<8} {'':<{width}}  -> {finding.cure}")
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)
