"""`onelayer merge`: a checkpoint with the adapters' weights in it, made from the files without loading the model.

--json prints an object of the format "onelayer-merge-1": the fields of `Merged`.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from peft_onelayer.records.locate import check_output_last
from peft_onelayer.records.text import name_blocks
from peft_onelayer.sparse.base import in_words

from ._errors import user_error
from ._hub import quiet_hub
from ._options import AllowOtherBase, Json, Revision
from ._output import Bar, note, print_json, print_line, progress_bar, status


def merge(
    base: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Folders or Hub ids; stages in their order.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    revision: Revision = None,
    allow_other_base: AllowOtherBase = False,
    as_json: Json = False,
) -> None:
    """Write BASE with the weights of every ADAPTER to OUT, one file at a time; it loads without this package."""
    with user_error(ValueError):
        check_output_last(base, out, "onelayer merge BASE ADAPTER... OUT")
    with status("loading ..."), quiet_hub():
        from peft_onelayer.adapter.merge import merge_into_checkpoint

    with ExitStack() as stack:  # the bar appears when the first file is copied, after all checks
        shown: list[Bar] = []

        def on_progress(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(progress_bar(f"merging into {out}", 100)))
            shown[0].update(100 * done // total, f"{done / 1e9:.2f} of {total / 1e9:.2f} GB")

        with user_error(ValueError), quiet_hub():
            merged = merge_into_checkpoint(
                base, adapters, out, revision=revision, allow_other_base=allow_other_base, on_progress=on_progress
            )
    if merged.left_out:
        note(f"left out, because they hold the base's unchanged weights: {', '.join(merged.left_out)}")
    if merged.unchecked:
        note(f"{len(merged.unchecked)} tensor(s) of {base} could not be compared: {in_words(merged.unchecked)}")
    if as_json:
        print_json(merged.to_json())
        return
    how = "shared with the base's files until they change" if merged.reflinked else "copied"
    print_line(
        f"{out}: {name_blocks(merged.layers)} of {base} replaced, {len(merged.tensors)} tensors in "
        f"{len(merged.rewritten)} file{'' if len(merged.rewritten) == 1 else 's'}"
    )
    print_line(f"{merged.bytes:,} bytes, {how}")
