"""The sections of the page: a study's rates, profile, comparisons, probes and retention, and the transplants."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from drawing import profile_svg
from early import early_rewards
from evidence import compare
from figures import KINDS, Row, Study, name_of, ranges
from measures import OTHER, probe_runs, retention_runs
from one_run import Run
from planned import SEEDS, grid, same
from transplant import TOYS, mean_interval, toy_bases, toy_cases, transplant_figures
from words import TASKS, cell, gained, interval, mean_of, points, score, where

from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.sweep.metric import gain
from peft_onelayer.sweep.regimes import SCRIPTS_RATIO


def section(study: Study) -> list[str]:
    parts = [f"## {where(study)}"]
    base = study.of("base")
    if not base:
        return [*parts, "The base was not measured; nothing can be said."]
    said = f"The base scores {base[0]['mean']:.3f} ± {base[0]['standard_error']:.3f}."
    if study.full:
        said += f" All parameters at their tuned rate gain {points(*study.gain(study.full))}."
    parts.append(said)
    if drawing(study) is not None:
        left = [k for k in range(study.depth) if k not in study.blocks()]
        whole = f"Blocks not measured: {ranges(left)}." if left else "Every block was measured."
        parts.append(f"![contribution of each block](../examples/evidence/results/{study.setting.name}.svg)")
        parts.append(whole)
    return [
        *parts,
        *_rates(study),
        *_profile(study),
        *_compared(study),
        *_probes(study),
        *early_rewards(study),
        *_kept(study),
        *_repeats(study),
    ]


def drawing(study: Study) -> str | None:
    """The profile: C with both rates tuned, and where it is not defined, the gain; None without a block or the base."""
    blocks = study.blocks()
    if not blocks or not study.of("base"):
        return None
    contributions = {k: study.contribution(rows, study.full) for k, rows in blocks.items()}
    defined = {k: c for k, c in contributions.items() if c is not None and c.value is not None}
    if defined:
        points = {k: interval(c.value or 0.0, c.standard_error) for k, c in defined.items()}
        what, lines = "C, both rates tuned", {"base": 0.0, "all parameters": 1.0}
    else:
        points = {k: interval(*study.gain(rows)) for k, rows in blocks.items()}
        what, lines = "gain over the base", {"base": 0.0}
    counts = {len(rows) for rows in blocks.values()}
    noise = "seeds and evaluation" if min(counts) > 1 else "of the evaluation alone where one seed is there"
    there = f"{len(points)} of {study.depth} blocks" if len(points) < study.depth else f"all {study.depth} blocks"
    return profile_svg(points, study.depth, f"{where(study)}: {there}", what, lines, noise)


def _rates(study: Study) -> list[str]:
    """The search, and the middle block against all parameters at each rate."""
    lines = ["### Rates", "", "| kind | rate: score on the search's problems | chosen |", "|---|---|---|"]
    for kind in KINDS:
        done = {
            r["run"]["rate"]: r["search_mean"] for r in study.rows if r["run"]["kind"] == kind and r["run"]["searched"]
        }
        asked = getattr(study.setting, grid(kind))
        cells = [f"{rate:g}: {done[rate]:.3f}" if rate in done else f"{rate:g}: not measured" for rate in asked]
        best = study.rate(kind)
        edge = " (an end of the grid)" if best in (min(asked), max(asked)) else ""
        lines.append(f"| {name_of(kind)} | {', '.join(cells)} | {'not yet' if best is None else f'{best:g}{edge}'} |")
    lines += [
        "",
        f"| rate | block {study.middle} | all parameters | C at this rate | C against all at their tuned rate |",
    ]
    lines.append("|---|---|---|---|---|")
    for rate in study.setting.rates:
        block, full = study.of("block", study.middle, rate), study.of("full", None, rate)
        cells = [
            score(block),
            score(full),
            cell(study.contribution(block, full)),
            cell(study.contribution(block, study.full)),
        ]
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    chosen, full_rate = study.rate("block"), study.rate("full")
    said = ""
    if chosen and full_rate:
        said = (
            f"All parameters were tuned to {full_rate / chosen:.2g} times the rate of a block; in the public scripts "
            f"that appear to be the paper's they have {SCRIPTS_RATIO:g} times, in its table of settings 1 times "
            "(transcribed)."
        )
    return ["\n".join(lines), said]


def _profile(study: Study) -> list[str]:
    lines = [f"### Blocks at rate {study.rate('block') or 0:g}", ""]
    if study.rate("block") is None:
        return ["### Blocks", "The rate of a block is not chosen yet, so no profile is there."]
    lines += ["| block | seeds | score | gain | C, equal rates | C, both tuned |", "|---|---|---|---|---|---|"]
    blocks = study.blocks()
    for k in range(study.depth):
        if k not in blocks:
            lines.append(f"| {k} | none | not measured | | | |")
            continue
        rows = blocks[k]
        equal, tuned = (study.contribution(rows, full) for full in (study.full_at_equal, study.full))
        seeds = ", ".join(str(row["run"]["seed"]) for row in rows)
        lines.append(
            f"| {k} | {seeds} | {mean_of(rows)} | {gained(*study.gain(rows))} | {cell(equal)} | {cell(tuned)} |"
        )
    alike = (
        f"Not told apart from the best of those that were measured: {ranges(study.tied())} (95 %, paired over the "
        "problems; the variance of the seeds is taken for the same in all blocks, and pooled over those with several)."
    )
    return ["\n".join(lines), alike if blocks else ""]


def _compared(study: Study) -> list[str]:
    lines = ["### Beside one block", "", "| trained | parameters | rate | seeds | score | gain | share of full's |"]
    lines.append("|---|---|---|---|---|---|---|")
    listed: list[tuple[str, str, Sequence[Row]]] = [("full", name_of("full"), study.full)]
    listed.append(("block", f"block {study.middle}, the middle", study.of("block", study.middle)))
    if study.best is not None:
        listed.append(("block", f"block {study.best}, the best of seed {SEEDS[0]}", study.of("block", study.best)))
    listed += [(kind, name_of(kind), study.of(kind)) for kind in ("lora-all", "lora-all-sized")]
    listed.append(("lora-block", f"LoRA r = 16 on block {study.middle}", study.of("lora-block", study.middle)))
    if study.best is not None and study.best != study.middle:
        listed.append(("lora-block", f"LoRA r = 16 on block {study.best}", study.of("lora-block", study.best)))
    listed += [(kind, name_of(kind), study.of(kind)) for kind in ("mask", "norms")]
    for kind, name, rows in listed:
        if not rows:
            lines.append(f"| {name} | | | none | not measured | | |")
            continue
        seeds = ", ".join(str(row["run"]["seed"]) for row in rows)
        share = "1" if kind == "full" else cell(study.contribution(rows, study.full))
        cells = [
            f"{rows[0]['parameters']:,}",
            f"{study.rate(kind):g}",
            seeds,
            mean_of(rows),
            gained(*study.gain(rows)),
            share,
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return ["\n".join(lines)]


def _probes(study: Study) -> list[str]:
    if not study.probes:
        return []
    lines = ["### Probes", ""]
    lines.append(
        "| method | budget | of a run of | rankings | picks | C(pick) / C(best) | least | not told apart from the "
        "best | blocks that ran | C(best of these) / C(best) | share | seconds |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|---|")
    missing = "not measured yet" if study.gains() else "no whole profile yet"
    groups: dict[tuple[str, float, int], list[Row]] = {}
    asked = probe_runs(study.setting)
    for row in sorted(study.probes, key=lambda row: asked.index(row["probe"])):
        probe = row["probe"]
        groups.setdefault((probe["method"], probe["budget"], probe["steps"]), []).append(row)
    for (method, budget, steps), rows in groups.items():
        rankings = [LayerRanking.from_dict(row["ranking"], "a probe") for row in rows if row["ranking"]]
        picks = ", ".join("none" if r.pick is None else str(r.pick) for r in rankings)
        if failed := len(rows) - len(rankings):
            picks = ", ".join(filter(None, [picks, f"{failed} refused"]))
        if fallen := sum(r.fallback is not None for r in rankings):
            picks += f" ({fallen} by depth: no room for a race)"
        found = [study.recovery(ranking) for ranking in rankings]
        outcomes = [] if None in found else [outcome for outcome in found if outcome is not None]  # all of them or none
        cells = (
            [f"{statistics.fmean(o[0] for o in outcomes):.2f}", f"{min(o[0] for o in outcomes):.2f}"]
            if outcomes
            else []
        )
        cells += (
            [f"{statistics.fmean(o[1] for o in outcomes):.2f}"] if outcomes else [missing if rankings else "", "", ""]
        )
        raced = [(len(r.rounds or {}), best) for r in rankings if (best := study.best_that_ran(r)) is not None]
        cells += (
            [f"{statistics.fmean(n for n, _ in raced):g}", f"{statistics.fmean(b for _, b in raced):.2f}"]
            if raced
            else ["", ""]
        )
        shares = [ranking.cost["share"] for ranking in rankings]
        cells.append(f"{statistics.fmean(shares):.1%}" if shares else "")
        cells.append(f"{statistics.fmean(row['seconds'] for row in rows):.0f}")
        lines.append(f"| {method} | {budget:.0%} | {steps} steps | {len(rows)} | {picks} | {' | '.join(cells)} |")
    if not (others := study.picked_by_other_seeds()):
        return ["\n".join(lines)]
    reached = ", ".join(f"{share:.2f}" for share in others)
    whole = f"The pick of a whole sweep of one seed has C(pick) / C(best) = {reached} in the other."
    return ["\n".join(lines), whole]


def _kept(study: Study) -> list[str]:
    if not study.kept:
        return []
    base = next((row for row in study.kept if row["run"]["kind"] == "base"), None)
    other = TASKS[OTHER[study.setting.task]]
    lines = [
        "### What was kept",
        "",
        f"| trained | seed | score | {other} | nats a token of plain text | more than the base |",
    ]
    lines.append("|---|---|---|---|---|---|")
    asked = retention_runs(study.setting, study.rows)
    for row in sorted(study.kept, key=lambda row: next(i for i, run in enumerate(asked) if same(run, row))):
        run, kept = row["run"], row["retention"]
        name = name_of(run["kind"]) if run["block"] is None else f"block {run['block']}"
        nats = _nats(row)
        cells = [str(run["seed"]), f"{row['mean']:.3f} ± {row['standard_error']:.3f}"]
        cells.append(f"{kept['other']['mean']:.3f} ± {kept['other']['standard_error']:.3f}")
        cells.append(f"{statistics.fmean(nats):.4f}")
        cells.append("" if base is None or row is base else gained(*gain(nats, _nats(base)), digits=4))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = (
        f"The plain text is [{len(_nats(study.kept[0]))} paragraphs](../examples/evidence/plain_text.txt) of our own."
    )
    return [
        "\n".join(lines),
        text + " ± is one standard error, over problems and over paragraphs, paired with the base.",
    ]


def _nats(row: Row) -> list[float]:
    text = row["retention"]["text"]
    return [nats / tokens for nats, tokens in zip(text["nats"], text["tokens"], strict=True)]


def _repeats(study: Study) -> list[str]:
    """The same runs on another machine, beside their rows."""
    lines = ["| run | score | again | difference | in the row's interval |", "|---|---|---|---|---|"]
    for again in study.repeats:
        run = Run(**again["run"])
        for row in (row for row in study.rows if same(run, row)):
            seen = compare(row, again)
            scores = [f"{r['mean']:.3f} ± {r['standard_error']:.3f}" for r in (row, again)]
            cells = [str(run), *scores, gained(*seen.difference), "yes" if seen.inside else "no"]
            lines.append(f"| {' | '.join(cells)} |")
    if len(lines) == 2:
        return []
    devices = " and ".join(sorted({r["versions"]["device"] for r in study.repeats}))
    return [
        "### The same runs on another machine",
        f"Again on: {devices}. The random numbers and the rounding differ there, so another sample of the same run.",
        "\n".join(lines),
    ]


# Transplants


def transplants(found: Sequence[Study], results: Path) -> list[str]:
    of_toys = toy_cases(results)
    cases = [*of_toys, *((where(s), s.transplants, _truth(s)) for s in found if s.transplants)]
    if not cases:
        return []
    lines = [
        "| case | blocks | Spearman with C | the depth prior's | C(pick) / C(best) | sum of the blocks | all blocks | "
        "windows |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    toys: list[tuple[float, float]] = []
    for i, (name, rows, truth) in enumerate(cases):
        figures = transplant_figures(rows, truth)
        lines.append(f"| {name} | {' | '.join(figures.cells())} |")
        if i < len(of_toys) and figures.spearman is not None and figures.prior is not None:
            toys.append((figures.spearman, figures.prior))
    said = ""
    if len(toys) > 1:
        alone, prior = (mean_interval([pair[i] for pair in toys]) for i in (0, 1))
        predicts = "it predicts C" if alone[1] > 0 else "that it predicts C is not shown, and no probe goes by it"
        said = (
            f"Over the {len(toys)} toys the mean rank correlation is {alone[0]:.2f} [{alone[1]:.2f}, {alone[2]:.2f}], "
            f"that of the depth prior {prior[0]:.2f} [{prior[1]:.2f}, {prior[2]:.2f}] (cases drawn anew): {predicts}."
        )
    for name, rows, truth in cases[len(of_toys) :]:
        f = transplant_figures(rows, truth)
        if f.spearman is not None and f.interval is not None and f.prior is not None:
            low, high = f.interval
            said += f" On {name} it is {f.spearman:.2f} [{low:.2f}, {high:.2f}], the depth prior's {f.prior:.2f}."
    return [
        "## Do the blocks of a full run predict C?",
        "After one full run its blocks were put into the base one at a time, without training; the gain of each is "
        f"held against what the block gains when it is trained alone. The toys are those of [the study]({TOYS}).",
        "\n".join(lines),
        "The interval of a Spearman is Fisher's: it takes the blocks for independent, which neighbours are not, and "
        "holds no noise of problems and of seeds, so it is too narrow.",
        said,
        _remade(of_toys),
    ]


def _remade(cases: Sequence[tuple[str, list[Row], list[float | None]]]) -> str:
    """How far the toys' bases, which were made anew, score from those that the study swept."""
    if not cases:
        return ""
    swept = toy_bases()
    away = [abs(next(r["mean"] for r in rows if r["kind"] == "base") - swept[name]) for name, rows, _ in cases]
    return (
        "The toys' bases were made anew by the study's script, and their scores are "
        f"{min(away):.3f} to {max(away):.3f} away from those of the bases that it swept: the truth is of bases that "
        "are alike, not the same."
    )


def _truth(study: Study) -> list[float | None]:
    blocks, base = study.blocks(), study.of("base")
    return [
        statistics.fmean(r["mean"] for r in blocks[k]) - base[0]["mean"] if k in blocks and base else None
        for k in range(study.depth)
    ]
