"""`onelayer export`: an adapter in another form, for plain PEFT, for LoRA servers or for other tools.

--json prints an object of the format "onelayer-export-1": the fields of `Exported`, of which `encoding` is --format's.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from peft_onelayer.records.locate import check_output_last

from ._errors import user_error
from ._hub import quiet_hub
from ._options import AllowOtherBase, Json
from ._output import common_prefix, note, print_json, print_line, print_table, status


def export(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder for the exported adapter.")],
    format: Annotated[
        Literal["peft", "lora", "dense", "sparse", "flat"],
        typer.Option(
            help="peft (LN_TUNING: plain PEFT loads it), lora, dense, sparse, or flat (indices and values).",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: a folder or a Hub id. [default: where needed, what the adapter was trained on]",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every tensor, for lora.", show_default=False)] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="For lora, the share of each change's squared norm to keep. [default: 0.99]",
            show_default=False,
        ),
    ] = None,
    allow_other_base: AllowOtherBase = False,
    as_json: Json = False,
) -> None:
    """Write ADAPTER in another form to OUT."""
    with user_error(ValueError):
        check_output_last(adapter, out, shlex.join(["onelayer", "export", str(out), adapter]))
    with status("loading ..."), quiet_hub():
        from peft_onelayer.adapter.export import export_adapter

    with user_error(ValueError), quiet_hub(), status(f"writing {out} ..."):
        exported = export_adapter(
            adapter, out, format, base=base, rank=rank, energy=energy, allow_other_base=allow_other_base
        )
    if as_json:
        print_json(exported.to_json())
        return
    prefix = common_prefix([t.name for t in exported.tensors])
    if format == "lora":
        rows = [
            [
                t.name.removeprefix(prefix),
                "left out" if t.rank is None else str(t.rank),
                f"{t.error:.4f}",
                f"{t.change:.4g}",
                str(t.bytes),
            ]
            for t in exported.tensors
        ]
        print_table(f"LoRA of {adapter}: {prefix}*", ["tensor", "rank", "error", "change", "bytes"], rows)
        print_line(
            f"Error: Frobenius norm of what is lost, relative to the tensor's change. All in all {exported.lost:.4f}."
        )
        if exported.left_out:
            note(f"LoRA has no place for norms and biases: {exported.left_out:.2%} of the change's norm is left out")
    elif format == "flat":
        rows = [[t.name.removeprefix(prefix), str(t.changed), str(t.bytes)] for t in exported.tensors]
        print_table(f"changed entries of {adapter}: {prefix}*", ["tensor", "changed", "bytes"], rows)
    print_line(f"{out}: {format}, {exported.bytes:,} bytes")
