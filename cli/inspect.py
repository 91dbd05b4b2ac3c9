"""`onelayer inspect`: what is in an adapter and where it comes from, without its base.

--json prints an object of the format "onelayer-inspect-1": the fields of `Inspection`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from peft_onelayer.records.locate import base_elsewhere, path_to
from peft_onelayer.records.text import name_blocks, printable
from peft_onelayer.sparse.base import in_words

from ._errors import user_error
from ._hub import quiet_hub
from ._options import AllowOtherBase, Json, refuse_given
from ._output import common_prefix, print_json, print_line, print_table, status


def inspect(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a Hub id.")],
    base: Annotated[
        str | None,
        typer.Option(help="Base model to measure the change against: a folder or a Hub id.", show_default=False),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the adapter.", show_default=False)] = None,
    allow_other_base: AllowOtherBase = False,
    as_json: Json = False,
) -> None:
    """Show ADAPTER's blocks, tensors, encoding, sizes and provenance; with --base also how much changed."""
    if base is None:
        with user_error(ValueError):
            refuse_given(context, ("allow_other_base",), "is of --base; give that too, or leave it out")
    with status("loading ..."), quiet_hub():
        from peft_onelayer.adapter.inspection import inspect_adapter

    with user_error(ValueError), quiet_hub(), status(f"reading {adapter} ..."):
        found = inspect_adapter(adapter, base, revision=revision, allow_other_base=allow_other_base)
    if as_json:
        print_json(found.to_json())
        return

    def number(value: float | None, form: str) -> str:
        return "?" if value is None else format(value, form)

    prefix = common_prefix([t.name for t in found.tensors])
    columns = {
        "tensor": [t.name.removeprefix(prefix) for t in found.tensors],
        "shape": [" x ".join(map(str, t.shape)) for t in found.tensors],
        "dtype": [t.dtype for t in found.tensors],
        "encoding": [t.encoding for t in found.tensors],
        "bytes": [str(t.bytes) for t in found.tensors],
    }
    measured = {
        "density": [number(t.density, ".2%") for t in found.tensors],
        "change": [number(t.change, ".4g") for t in found.tensors],
        "relative": [number(t.relative, ".2e") for t in found.tensors],
    }
    columns |= {name: cells for name, cells in measured.items() if any(cell != "?" for cell in cells)}
    depth = "" if found.num_layers is None else f" of {found.num_layers}"
    blocks = f"{name_blocks(found.layers)}{depth}, " if found.layers else ""
    print_table(
        f"{adapter}: {blocks}{prefix}*",
        list(columns),
        list(zip(*columns.values(), strict=True)),
    )
    print_line(f"{found.encoding}, {found.bytes:,} bytes")
    if found.density is not None:
        print_line(f"density: {found.density:.2%}")
    if found.change is not None:
        print_line(f"norm of the change: {found.change:.4g}")
    elif found.num_layers is not None and not found.quantized:
        elsewhere = base_elsewhere(found.folder)
        named = path_to(elsewhere) if elsewhere else found.base["name"] or "BASE"
        print_line(f"how much changed: onelayer inspect {adapter} --base {named}")
    commit = f" at {found.base['revision']}" if found.base["revision"] else ""
    print_line(f"base: {found.base['name'] or 'not recorded'}{commit}")
    if found.quantized:
        print_line(f"{len(found.quantized)} of its {len(found.tensors)} tensors were quantized in the base")
    if found.stages:
        print_line(f"trained after: {found.stages}")
    if found.beside:
        shown = ", ".join(found.beside[:5]) + (f" and {len(found.beside) - 5} more" if len(found.beside) > 5 else "")
        print_line(f"also holds: {shown}")
    if found.unchecked:
        print_line(f"not compared with the base: {in_words(found.unchecked)}")
    for name, value in found.provenance.items():
        print_line(f"{name}: {printable(_told(value), 500)}")


def _told(value: Any) -> str:
    """A value of a record without braces and without digests, which --json has."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_told(v)}" for k, v in value.items() if k != "sha256" and v not in (None, "", {}, []))
    return value if isinstance(value, str) else json.dumps(value)
