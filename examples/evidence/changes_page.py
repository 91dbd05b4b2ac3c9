"""Writes the tables of the section "What runs changed, measured" of docs/analysis.md from the rows of rl_changes.py.

    python examples/evidence/changes_page.py

Every figure is computed, none typed in. What stands outside of the two marks is left as it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from planned import RESULTS

from peft_onelayer.records.jsonl import read_records

Row = dict[str, Any]
PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"
BEGIN, END = "<!-- measured changes begin -->", "<!-- measured changes end -->"
NAMES = {"smollm2-135m": "SmolLM2-135M-Instruct", "demo": "The demo model"}
NAMES |= {"sums": "sums of two-digit numbers", "repeated": "the repeated word", "arithmetic": "its arithmetic"}
TOLERANCES = ("0", "1e-08", "1e-05", "0.0001")
KEPT = {True: "float32", False: "bfloat16"}


def section(results: Path = RESULTS) -> str:
    """What stands between the marks."""
    parts: list[str] = []
    for file in sorted(results.glob("*-changes.jsonl"), reverse=True):
        rows = read_records(file)
        setting = rows[0]["setting"]
        parts.append(f"### {NAMES[setting['model']]}, {NAMES[setting['task']]}")
        device = ", ".join(sorted({row["device"] for row in rows}))
        parts.append(
            f"{setting['steps']} steps of {setting['prompts']} prompts x {setting['completions']} completions, GRPO "
            f"with AdamW, the base in bfloat16; scores on {setting['problems']} held-out problems x "
            f"{setting['samples']} samples, ± one standard error over the problems. Machine: {device}. "
            f"[The rows](../examples/evidence/results/{file.name})."
        )
        changes = [row for row in rows if row["experiment"]["kind"] == "change"]
        pairs = [row for row in changes if "overlap" in row]
        subnetworks = [row for row in rows if row["experiment"]["kind"] == "subnetwork"]
        combined = [row for row in rows if row["experiment"]["kind"] == "combine"]
        for found, part in ((changes, sparsity), (pairs, overlap), (subnetworks, subnetwork), (combined, fusion)):
            parts += part(in_order(found)) if found else []
    return "\n\n".join(parts)


def in_order(rows: Iterable[Row]) -> list[Row]:
    def key(row: Row) -> tuple[Any, ...]:
        experiment = row["experiment"]
        return experiment["what"] != "full", not experiment["masters"], experiment["rate"], experiment["seeds"]

    return sorted(rows, key=key)


def named(row: Row) -> list[str]:
    """What trained, the dtype in which its weights were kept, and the rate."""
    experiment = row["experiment"]
    what = {"full": "all parameters", "block": "the middle block"}[experiment["what"]]
    return [what, KEPT[experiment["masters"]], f"{experiment['rate']:g}"]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in rows)


def share(value: float | None) -> str:
    """In percent, with more digits next to 0 and to 100.

    >>> share(0.5), share(0.99995), share(1.0), share(0.0002)
    ('50.0 %', '99.9950 %', '100.0 %', '0.020 %')
    """
    if value is None:
        return ""
    percent, rest = 100 * value, 100 * min(value, 1 - value)
    digits = 1 if rest >= 1 or not rest else min(4, 1 - math.floor(math.log10(rest)))
    return f"{percent:.{digits}f} %"


def scored(found: Row) -> str:
    return f"{found['mean']:.3f} ± {found['standard_error']:.3f}"


def sparsity(rows: Sequence[Row]) -> list[str]:
    lines, unmoved = [], []
    for row in rows:
        totals = [run["change"]["total"] for run in row["runs"]]
        first = totals[0]
        values = [
            [statistics.fmean(total[field][t] for total in totals) for t in TOLERANCES]
            for field in ("unchanged_official", "unchanged")
        ]
        never = " and ".join(str(len(total["never_moved"])) for total in totals)
        unmoved += [total["never_moved"] for total in totals if total["never_moved"]]
        lines.append(
            [
                *named(row),
                "; ".join(scored(run) for run in row["runs"]),
                *(", ".join(share(v) for v in each) for each in values),
                f"{share(first['rank_share_official'])}, {share(first['rank_share'])}",
                share(first["effective_rank_share"]),
                f"{never} of {first['tensors']}",
                f"{statistics.fmean(total['relative'] for total in totals):.1e}",
            ]
        )
    head = ["trained", "weights kept in", "rate", "score, by seed", "unchanged in bfloat16", "unchanged as kept"]
    head += ["rank: in bfloat16, as kept", "effective rank", "tensors that never moved", "relative norm"]
    text = (
        "Shares of unchanged entries are at 0, 1e-8, 1e-5 and 1e-4, means over the seeds: in bfloat16 by the official "
        "code's definition, and as the trainer kept the weights. Ranks are means over the matrices, against the "
        "largest possible, of the first seed."
    )
    norms = [name for names in unmoved for name in names]
    if norms:
        of_norms = sum("norm" in name for name in norms) / len(norms)
        text += f" Of the tensors that never moved in bfloat16, {share(of_norms)} are weights of norms."
    return [text, table(head, lines)]


def overlap(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        o = row["overlap"]
        changed = " and ".join(share(o[f"changed_{side}"] / o["entries"]) for side in "ab")
        both = (
            f"{share(o.get(f'overlap_{side}'))} ({share(o.get(f'chance_{side}'))}, "
            f"{share(o.get(f'chance_{side}_by_tensor'))})"
            for side in "ab"
        )
        jaccard = f"{share(o.get('jaccard'))} ({share(o.get('chance_jaccard'))})"
        correlation = "" if o.get("correlation") is None else f"{o['correlation']:.2f}"
        lines.append([*named(row), changed, *both, jaccard, correlation, share(o.get("same_sign"))])
    head = ["trained", "weights kept in", "rate", "changed", "of the first's, the second too", "the reverse"]
    head += ["Jaccard", "correlation", "same direction"]
    text = (
        "Two seeds, which are other data too. In brackets stand chance, and chance where each tensor keeps its number "
        "of changed entries."
    )
    return [text, table(head, lines)]


def subnetwork(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        about = [f"{row['experiment']['rate']:g}", str(row["experiment"]["seeds"][0])]
        lines.append([*about, "base", "", scored(row["base"]), "", "", ""])
        for name in ("full", "subnetwork", "random"):
            what = {"full": "all blocks", "subnetwork": "the entries that this changed"}.get(name, "as many at random")
            equal = ["" if name == "full" else share(v) for v in row[name]["equal_to_full"].values()]
            lines.append([*about, what, share(row[name]["entries"]), scored(row[name]), *equal])
    head = ["rate", "seed", "trained", "entries", "score", "equal", "within 1e-5", "within 1e-4"]
    text = (
        "The subnetwork alone: entries of the blocks that are equal, in bfloat16, to those of the run on all blocks. "
        "Entries that neither run may or did change are among them."
    )
    return [text, table(head, lines)]


def fusion(rows: Sequence[Row]) -> list[str]:
    """Over seeds: the mean, with its standard error over them."""

    def cell(values: Sequence[float]) -> str:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return f"{statistics.fmean(values):.3f}" + ("" if error is None else f" ± {error:.3f}")

    methods = [
        name for name, value in rows[0].items() if isinstance(value, dict) and rows[0]["setting"]["task"] in value
    ]
    tasks = [name for name in rows[0][methods[0]] if isinstance(rows[0][methods[0]][name], dict)]
    lines = []
    for method in methods:
        means = [[row[method][task]["mean"] for row in rows] for task in tasks]
        both = [statistics.fmean(each) for each in zip(*means, strict=True)]
        name = f"the adapter of {NAMES[method.split()[-1]]}" if method.startswith("adapter") else method
        lines.append([name, *map(cell, means), cell(both)])
    conflicts = cell([row["sum"]["conflict_share"] for row in rows])
    overlaps = cell([row["cpi"]["overlaps"][0][1] for row in rows])
    seeds = ", ".join(str(row["experiment"]["seeds"][0]) for row in rows)
    text = (
        f"Two adapters of the middle block, one for each task, at {rows[0]['experiment']['rate']:g}, made one. ± is "
        f"one standard error over the seeds {seeds}. Of the entries that both changed, a share of {conflicts} moved in "
        f"different directions; the Jaccard overlap of the core regions is {overlaps}."
    )
    return [text, table(["", *(NAMES[task] for task in tasks), "mean of both"], lines)]


def page(results: Path = RESULTS, path: Path = PAGE) -> str:
    """The whole page, with the section as the rows have it."""
    text = path.read_text(encoding="utf-8")
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n\n{section(results)}\n\n{text[stop:]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
