"""`onelayer analyze`: what training changed in each tensor, block and kind of tensor, read from the files.

--json prints an object of the format "onelayer-analysis-1": the fields of `Analysis`; with --transplant one of the
format "onelayer-transplant-1": those of `TransplantProfile`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_onelayer.records.locate import check_order

from ._errors import user_error
from ._hub import quiet_hub
from ._options import AllowOtherBase, Chat, Json, Revision, Sampling, Shots, System, refuse_given
from ._output import TerminalProgress, common_prefix, late_bar, note, print_json, print_line, print_table, status

if TYPE_CHECKING:
    from peft_onelayer.analysis.change import Analysis, GroupChange
    from peft_onelayer.analysis.measure import TensorChange
    from peft_onelayer.sweep.transplant import TransplantProfile

LISTED = 60  # tensors up to which the table has a line for each
PIPED = 100  # columns: its tables are to be read, and --json is for programs
IMAGES = (".png", ".pdf", ".svg")
OF_TENSORS = ("spectrum", "plot", "mask_out", "share", "random", "seed", "allow_other_base")
OF_TRANSPLANT = ("problems", "samples", "chat", "system", "shots", "sampling")
EXAMPLES = """Examples:

\b
  onelayer analyze Qwen/Qwen3-1.7B-Base run                     an adapter, dense or sparse
  onelayer analyze Qwen/Qwen3-1.7B-Base full-run --json         a whole checkpoint, for a program
  onelayer analyze base tuned --no-spectrum --plot change.png   without ranks, which take the longest
  onelayer analyze base full-run --transplant gsm8k             each block of the full run alone in the base
  onelayer analyze base run --mask-out mask.safetensors --share .05   for train --mask"""


def analyze(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    others: Annotated[
        list[str],
        typer.Argument(metavar="OTHER...", help="A checkpoint, or one or several adapters: folders or Hub ids."),
    ],
    spectrum: Annotated[
        bool, typer.Option("--spectrum/--no-spectrum", help="Measure ranks and singular values too.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="Image to draw: .png, .pdf or .svg.", show_default=False)] = None,
    mask_out: Annotated[
        Path | None,
        typer.Option(
            help="Also write the mask of the changed entries, for train --mask: .safetensors.", show_default=False
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="Of --mask-out: this share of the entries, those that changed most.", show_default=False),
    ] = None,
    random: Annotated[
        float | None,
        typer.Option(help="Of --mask-out: this share of the entries, drawn at random.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of --random.")] = 0,
    transplant: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="Instead, put each block of OTHER, a whole model, into BASE and evaluate it on this task, prompted "
            "and sampled as OTHER's run was, unless --chat, --plain, --system, --shots or --sampling say otherwise.",
            show_default=False,
        ),
    ] = None,
    problems: Annotated[int, typer.Option(min=2, help="Of --transplant: held-out problems.")] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Of --transplant: completions of each.")] = 4,
    chat: Chat = None,
    system: System = None,
    shots: Shots = None,
    sampling: Sampling = None,
    revision: Revision = None,
    allow_other_base: AllowOtherBase = False,
    as_json: Json = False,
) -> None:
    """Show what training changed from BASE to OTHER: sparsity, rank and norm of every tensor's change."""
    with user_error(ValueError):
        check_order(base, others[0], "onelayer analyze {base} {adapter}")
        if transplant is not None:
            why = "is of a comparison of the tensors, and --transplant measures none; leave it out"
            refuse_given(context, OF_TENSORS, why)
            if len(others) > 1:
                raise ValueError(f"--transplant takes one OTHER, and {len(others)} were given; give one alone.")
        else:
            refuse_given(context, OF_TRANSPLANT, "is of --transplant; give that too, or leave it out")
        if mask_out is None:
            refuse_given(context, ("share", "random"), "is of --mask-out; give that too, or leave it out")
        if random is None:
            refuse_given(context, ("seed",), "is of --random; give that too, or leave it out")
    with status("loading ..."), quiet_hub():
        from peft_onelayer.analysis.change import analyze_change
        from peft_onelayer.analysis.mask import make_mask
        from peft_onelayer.records.files import check_file, output
        from peft_onelayer.runs.early import check_task_name

    if transplant is not None:
        with user_error(ValueError):
            check_task_name(transplant)
        from peft_onelayer.rl.sampling import sampling_from_text
        from peft_onelayer.sweep.transplant import transplant_profile

        with user_error(ValueError, OSError), quiet_hub():
            found_blocks = transplant_profile(
                base,
                others[0],
                transplant,
                problems=problems,
                samples=samples,
                chat=chat,
                system=system,
                shots=shots,
                sampling=sampling_from_text(sampling or []),
                revision=revision,
                progress=TerminalProgress(),
            )
        print_json(found_blocks.to_json()) if as_json else _print_blocks(found_blocks)
        return
    with user_error(ValueError):
        if plot is not None:
            if plot.suffix not in IMAGES:
                raise ValueError(f"--plot {plot} is no image: give a file that ends in {', '.join(IMAGES)}.")
            check_file(plot, lambda file: file.suffix in IMAGES)
    if mask_out is not None:
        with user_error(ValueError, OSError), quiet_hub(), late_bar("choosing entries") as on_progress:
            mask = make_mask(
                base,
                others,
                mask_out,
                share,
                random,
                seed,
                revision=revision,
                allow_other_base=allow_other_base,
                on_progress=on_progress,
            )
        part = f"{mask.trained:,} of {mask.entries:,} entries ({mask.trained / mask.entries:.2%})"
        note(f"mask of {part} in {mask.tensors} tensors written to {mask_out}; {mask.changed:,} entries changed")
    with user_error(ValueError), quiet_hub(), late_bar("measuring") as on_progress:
        found = analyze_change(
            base,
            others,
            revision=revision,
            allow_other_base=allow_other_base,
            spectrum=spectrum,
            on_progress=on_progress,
        )
    if plot is not None:
        from peft_onelayer.report.change import plot_change

        with user_error(ValueError), output(plot):
            plot_change(found.to_json(), plot)
        note(f"drawn to {plot}")
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)


def _print_blocks(found: TransplantProfile) -> None:
    def cell(value: float | None, error: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")

    rows = [["base", f"{found.base_score:.4f}", "", ""]]
    rows.append(["full", f"{found.full_score:.4f}", cell(*found.full_gain, sign="+"), ""])
    for k, value in enumerate(found.gains):
        share = "undefined" if found.undefined else cell(found.shares[k], found.share_errors[k])
        rows.append([str(k), f"{found.base_score + value:.4f}", cell(value, found.errors[k], "+"), share])
    print_table(
        f"blocks of {found.full} in {found.base}, each alone, on {found.task}: {found.problems} problems x "
        f"{found.samples}",
        ["block", "score", "gain", "share of full's"],
        rows,
    )
    print_line("± one standard error over the problems, paired.")
    if found.undefined:
        print_line(f"There are no shares: {found.undefined}.")
    else:
        total = sum(share or 0.0 for share in found.shares)
        print_line(f"The shares add up to {total:.2f}; the largest is of block {found.order[0]}.")
    print_line(
        "Nothing was trained: this says where a full run put its gain, not what a block gains when it is trained alone."
    )


def _print(found: Analysis) -> None:
    official = any(t.unchanged != t.unchanged_official for t in found.tensors)
    if len(found.tensors) <= LISTED:
        prefix = common_prefix([t.name for t in found.tensors])
        print_table(
            f"{found.base} to {found.other}: {prefix}*",
            [*_header("tensor", official), "shape", "rows", "columns", "rank", "effective rank"],
            [[*_cells(t.name.removeprefix(prefix), t, official), *_matrix_cells(t)] for t in found.tensors],
            piped=PIPED,
        )
    else:
        for title, groups in (("blocks", found.layers), ("kinds of tensors", found.kinds)):
            moved = [group for group in groups if group.norm]
            print_table(
                f"{found.base} to {found.other}: {title}, {len(groups) - len(moved)} of {len(groups)} equal the base's",
                [*_header(title, official), "tensors", "rank", "effective rank"],
                [[*_cells(group.name, group, official), *_group_cells(group)] for group in moved],
                piped=PIPED,
            )
    total = found.total
    print_line(f"{found.dtypes}; compared in float64")
    for words, shares in (("unchanged", total.unchanged), ("the same in bfloat16", total.unchanged_official)):
        if official or words == "unchanged":
            listed = [f"{_share(shares['0'])} exactly"]
            listed += [f"{_share(share)} within {float(t):.0e}" for t, share in shares.items() if t != "0"]
            print_line(f"{words}: {', '.join(listed)}")
    relative = "" if total.relative is None else f", {total.relative:.2e} of the base's"
    print_line(f"norm of the change: {total.norm:.4g}{relative}")
    if total.rank_share is not None:
        print_line(
            f"rank of the change: {total.rank_share:.1%} of the largest possible "
            f"({total.rank_share_official:.1%} of the difference in bfloat16), "
            f"effective rank {total.effective_rank_share:.1%}; means over the matrices"
        )
    if parts := [t.name for t in found.tensors if t.measured]:
        print_line(f"ranks of {len(parts)} matrices are lower bounds, of 4096 of their rows or columns")
    if found.skipped:
        name, reason = next(iter(found.skipped.items()))
        print_line(f"not compared: {len(found.skipped)} tensors, such as {name} ({reason})")
    print_line(found.summary())
    for line in found.movement.notes():
        print_line(f"note: {line}")


def _header(what: str, official: bool) -> list[str]:
    header = [what, "changed", "unchanged", "<= 1e-8", "<= 1e-5", "<= 1e-4"]
    return [*header, *(["<= 1e-5 in bf16"] if official else []), "norm", "relative"]


def _cells(name: str, change: TensorChange | GroupChange, official: bool) -> list[str]:
    still = not change.changed
    cells = [name, "NOTHING" if still else _share(change.changed / change.entries)]
    cells += [_share(share) for share in change.unchanged.values()]
    cells += [_share(change.unchanged_official["1e-05"])] if official else []
    return [*cells, f"{change.norm:.4g}", "" if change.relative is None else f"{change.relative:.2e}"]


def _matrix_cells(tensor: TensorChange) -> list[str]:
    cells = [" x ".join(map(str, tensor.shape))]
    cells += ["" if touched is None else str(touched) for touched in (tensor.rows, tensor.columns)]
    if tensor.rank is None or tensor.effective_rank is None:
        return [*cells, "", ""]
    bound = ">= " if tensor.measured else ""
    return [*cells, f"{bound}{tensor.rank} of {min(tensor.shape)}", f"{bound}{tensor.effective_rank:.1f}"]


def _group_cells(group: GroupChange) -> list[str]:
    ranks = [group.rank_share, group.effective_rank_share]
    return [str(group.tensors), *("" if share is None else f"{share:.1%}" for share in ranks)]


def _share(share: float) -> str:
    return f"{share:.2%}"
