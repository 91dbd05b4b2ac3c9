"""`onelayer compare`: what several runs changed in common, or how far layer profiles agree.

--json prints an object of the format "onelayer-comparison-1": the fields of `Comparison` or `ProfileComparison`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._errors import user_error
from ._hub import hub_session, quiet_hub
from ._options import AllowOtherBase, Json, Revision, refuse_given
from ._output import late_bar, print_json, print_line, print_table, status

if TYPE_CHECKING:
    from peft_onelayer.analysis.compare import Comparison
    from peft_onelayer.analysis.profiles import ProfileComparison

EXAMPLES = """Examples:

\b
  onelayer compare seed-0 seed-1 seed-2                      adapters of one base, which they record
  onelayer compare run-a run-b --base Qwen/Qwen3-1.7B-Base   checkpoints need the base
  onelayer compare math.json code.json                       layer profiles
  onelayer compare --profiles Qwen/Qwen3-1.7B-Base me/qwen3-gsm8k   published ones"""


def compare(
    context: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(metavar="A B...", help="Adapters or checkpoints of one base, or layer profiles (.json files)."),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: a folder or a Hub id. [default: the one that the adapters record]", show_default=False
        ),
    ] = None,
    profiles: Annotated[
        bool, typer.Option("--profiles", help="Compare layer profiles: shipped, in folders, or on the Hub.")
    ] = False,
    revision: Revision = None,
    allow_other_base: AllowOtherBase = False,
    as_json: Json = False,
) -> None:
    """Show what runs on one base changed in common, against chance, or how far layer profiles agree."""
    with user_error(ValueError):
        files = [name for name in runs if Path(name).is_file()]
        if len(runs) < 2:
            raise ValueError(f"compare takes two or more, and {len(runs)} was given.")
        if files and len(files) < len(runs) and not profiles:
            raise ValueError(
                f"{files[0]} is a file and {next(n for n in runs if n not in files)} is not: give layer profiles alone "
                "(--profiles where some are in folders or on the Hub), or adapters and checkpoints alone."
            )
        if files or profiles:
            why = "is of adapters and checkpoints, and layer profiles have no base; leave it out"
            refuse_given(context, ("base", "revision", "allow_other_base"), why)
    if files or profiles:
        with status("loading ..."):
            from peft_onelayer.analysis.profiles import compare_profiles

        with user_error(ValueError), hub_session():
            agreement = compare_profiles(runs)
        if as_json:
            print_json(agreement.to_json())
        else:
            _print_profiles(agreement)
        return
    with status("loading ..."), quiet_hub():
        from peft_onelayer.analysis.compare import compare_adapters

    with user_error(ValueError), quiet_hub(), late_bar("comparing") as on_progress:
        found = compare_adapters(
            runs,
            base,
            revision=revision,
            allow_other_base=allow_other_base,
            on_progress=on_progress,
        )
    if as_json:
        print_json(found.to_json())
    else:
        _print_runs(found)


def _print_runs(found: Comparison) -> None:
    rows = []
    for pair in found.pairs:
        for one, other, overlap, chance, by_tensor, changed in (
            (pair.a, pair.b, pair.overlap_a, pair.chance_a, pair.chance_a_by_tensor, pair.changed_a),
            (pair.b, pair.a, pair.overlap_b, pair.chance_b, pair.chance_b_by_tensor, pair.changed_b),
        ):
            share = changed / pair.entries if pair.entries else None
            rows.append([f"{one} in {other}", _share(share), *map(_share, (overlap, chance, by_tensor))])
    print_table(
        f"changed entries, against {found.base}",
        ["", "changed", "also changed by the other", "by chance", "by chance in each tensor"],
        rows,
    )
    for pair in found.pairs:
        where = f"{pair.a} and {pair.b}"
        if not pair.tensors:
            print_line(f"{where}: NO TENSOR IN COMMON ({pair.only_a} and {pair.only_b} tensors)")
            continue
        print_line(
            f"{where}: Jaccard {_number(pair.jaccard)} (chance {_number(pair.chance_jaccard)}), "
            f"correlation of the changes {_number(pair.correlation)}, "
            f"same direction {_share(pair.same_sign)} of the entries that both changed"
        )
        if pair.only_a or pair.only_b:
            print_line(f"{where}: {len(pair.tensors)} tensors in common, {pair.only_a} and {pair.only_b} in one alone")


def _print_profiles(found: ProfileComparison) -> None:
    print_table(
        "rank correlation of the blocks' worth (Spearman, 95 % interval)",
        ["", "blocks", "raw", "depth trend removed", "each with the depth prior"],
        [
            [
                f"{pair.a} and {pair.b}",
                str(pair.blocks),
                _with_interval(pair.spearman, pair.interval),
                _with_interval(pair.spearman_without_depth, pair.interval_without_depth),
                f"{_number(pair.depth_a)}, {_number(pair.depth_b)}",
            ]
            for pair in found.pairs
        ],
    )


def _share(share: float | None) -> str:
    return "undefined" if share is None else f"{share:.2%}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    return _number(value) if interval is None else f"{_number(value)} ({interval[0]:.2f} to {interval[1]:.2f})"
