"""How `onelayer train --dry-run` prints what a run would hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._output import print_line, print_table

if TYPE_CHECKING:
    from peft_onelayer.runs.dry_run import DryRun

ROWS = {
    "weights": "weights",
    "masters": "float32 masters",
    "reference": "reference model",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations and logits of a pass",
    "prefix": "kept hidden states",
    "cache": "generation: keys and values",
    "sampling": "generation: the rest",
    "peak": "peak",
    "peak_without_state": "peak with --set optim=sgd",
    "adapter": "file, float32 adapter or model",
}


def size(count: int) -> str:
    """
    >>> size(532), size(2_500_000), size(12_340_000_000)
    ('532 bytes', '2.5 MB', '12.3 GB')
    """
    for unit, of in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= of:
            return f"{count / of:.1f} {unit}"
    return f"{count} bytes"


def print_memory(found: DryRun) -> None:
    """A table of what each way of training holds, with what the run passes through its model in the title."""
    given, estimates = found.batches, found.estimates
    rows = [["parameters trained", *(f"{one.trained:,}" for one in estimates)]]
    rows += [[label, *(size(getattr(one, name)) for one in estimates)] for name, label in ROWS.items()]
    for share in next((one.sparse for one in estimates if one.sparse), {}):
        cells = [size(one.sparse[share]) if one.sparse else "" for one in estimates]
        rows.append([f"sparse, {share:.0%} of the entries changed by one step", *cells])
    title = (
        f"{found.model}: passes of {given.rows} x ({given.prompt} + {given.completion}) tokens, {given.passes} a step"
    )
    if given.generated:
        title += f"; generations of {given.generated}"
    print_table(title, ["", *(one.what for one in estimates)], rows)
    print_line("Not counted: Python and libraries, the allocator's rounding, buffers inside a device's kernels.")
