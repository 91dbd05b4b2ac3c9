"""`onelayer combine`: one adapter made of several that were trained on one base.

--json prints an object of the format "onelayer-combine-1": the fields of `Combined`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_onelayer.records.locate import check_output_last

from ._errors import user_error
from ._hub import quiet_hub
from ._options import AllowOtherBase, Chat, Json, LearningRate, Revision, refuse_given
from ._output import TerminalProgress, late_bar, note, print_json, print_line, status

EXAMPLES = """Examples:

\b
  onelayer combine block-3 block-8 both                     adapters of different blocks
  onelayer combine math code both --method ties             of one block, by a formula
  onelayer combine math code both --method cpi --core .01   CPI-FT, the last stage last"""


def combine(
    context: typer.Context,
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Two or more: folders or Hub ids.")],
    out: Annotated[Path, typer.Argument(help="New folder for the adapter.")],
    method: Annotated[str, typer.Option(help="stack, sum, average, slerp, ties, dare or cpi.")] = "stack",
    base: Annotated[
        str | None,
        typer.Option(help="Base model: a folder or a Hub id. [default: of the first adapter]", show_default=False),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Of ties and dare: share of each change that is kept. [default: .2, .5]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of dare and --stage-four.")] = 0,
    core: Annotated[float, typer.Option(help="Of cpi: share of the entries in a core region.")] = 0.01,
    overlap: Annotated[float, typer.Option(help="Of cpi: overlap from which on tasks are of one group.")] = 0.1,
    mask_out: Annotated[
        Path | None,
        typer.Option(
            help="Of cpi: also write the mask of what no core holds, for train --mask: .safetensors.",
            show_default=False,
        ),
    ] = None,
    stage_four: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS",
            help="Of cpi: train on these tasks afterwards, with the core regions frozen: gsm8k,sort.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of --stage-four.")] = 20,
    learning_rate: LearningRate = None,
    chat: Chat = None,
    revision: Revision = None,
    allow_other_base: AllowOtherBase = False,
    as_json: Json = False,
) -> None:
    """Make one adapter of several of one base: of different blocks, or of one block by a formula."""
    with user_error(ValueError):
        check_output_last(adapters[0], out, shlex.join(["onelayer", "combine", *adapters[1:], str(out), adapters[0]]))
        if method != "cpi":
            refuse_given(context, ("core", "overlap"), "is of --method cpi; give that too, or leave it out")
        if method not in ("ties", "dare"):
            refuse_given(context, ("density",), "is of --method ties and dare; give one of them, or leave it out")
        if stage_four is None:
            of_training = ("steps", "learning_rate", "chat")
            refuse_given(context, of_training, "is of --stage-four; give that too, or leave it out")
            if method != "dare":
                why = "is of --method dare and --stage-four; give one of them, or leave it out"
                refuse_given(context, ("seed",), why)
    with status("loading ..."), quiet_hub():
        from peft_onelayer.adapter.combine import combine_adapters
        from peft_onelayer.records.text import name_blocks

    options: dict[str, Any] = {"base": base, "core": core, "overlap": overlap, "revision": revision}
    options["allow_other_base"] = allow_other_base
    if stage_four is not None:
        with user_error(ValueError, OSError, ImportError):
            if method != "cpi" or mask_out is not None:
                raise ValueError("--stage-four is of --method cpi, without --mask-out.")
            with status("loading ..."):
                from peft_onelayer.runs.stage_four import combine_with_stage_four

            found = combine_with_stage_four(
                adapters,
                out,
                stage_four.split(","),
                steps=steps,
                learning_rate=learning_rate,
                training_seed=seed,
                chat=chat,
                progress=TerminalProgress(),
                **options,
            )
    else:
        with user_error(ValueError, OSError, ImportError), quiet_hub(), late_bar("combining") as on_progress:
            found = combine_adapters(
                adapters,
                out,
                method,
                density=density,
                seed=seed,
                mask_out=mask_out,
                on_progress=on_progress,
                **options,
            )
    if stage_four is not None:
        note(f"trained on {stage_four} for {steps} steps; the figures are those of the fusion before")
    if mask_out is not None:
        note(f"mask of what no core region holds written to {mask_out}")
    if as_json:
        print_json(found.to_json())
        return
    print_line(
        f"{out}: {name_blocks(found.layers)}, {found.tensors} tensors, {method} of {len(found.adapters)} adapters"
    )
    for name, changed in zip(found.adapters, found.changed, strict=True):
        print_line(f"{name}: {_part(changed, found.entries)} of the entries changed")
    conflicts = "" if found.conflict_share is None else f", {found.conflict_share:.2%} of these in different directions"
    print_line(f"changed by several: {_part(found.changed_by_several, found.entries)}{conflicts}")
    print_line(f"changed in the result: {_part(found.result_changed, found.entries)}")
    if found.groups is not None and found.cores is not None and found.overlaps is not None:
        groups = "; ".join(" with ".join(found.adapters[i] for i in group) for group in found.groups)
        print_line(f"core regions: {', '.join(f'{size:,}' for size in found.cores)} entries; groups: {groups}")
        pairs = [(i, j) for j in range(len(found.cores)) for i in range(j)]
        for i, j in pairs:
            print_line(
                f"overlap of the cores of {found.adapters[i]} and {found.adapters[j]}: {found.overlaps[i][j]:.3f}"
            )


def _part(count: int, of: int) -> str:
    return f"{count:,} ({count / of:.2%})" if of else "0"
