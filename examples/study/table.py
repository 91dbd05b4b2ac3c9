"""From the study's results to RESULTS.md and curve.png: figures only, computed from the files, none typed in.

A case is one base with one task. Its truth is S_k, the mean held-out score after training block k. Of the block that a
method picks, `recovery` is (S_pick - S_base) / (S_best - S_base), which is C(pick) / C(best); `tied` says whether it is
the best or the paired 95 % interval of the difference from it holds 0. A method that picks nothing is scored on its
choice, several blocks, whose truth when trained together was not measured: by the mean over the blocks trained alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import truth
from diagnostics import NAMES
from truth import CORRELATED, VIOLATING, Cell

from peft_onelayer.probe.prior import depth_prior
from peft_onelayer.records.jsonl import find_records, read_records
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.statistics import rank_correlation

DRAWS = 10_000
ORDER = ("random", "depth", "profile", "one", "short", "race", "auto")  # first words of the methods' names
DEFAULT = "auto, budget 25 %"
RANKINGS = "rankings.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "choosing-a-block.md"  # has the table, between two marks


@dataclass(frozen=True)
class Trial:
    """One ranking of one case."""

    case: str
    spearman: float | None
    recovery: float
    tied: float  # 1 or 0; of several blocks, their mean
    share: float
    seconds: float


@dataclass(frozen=True)
class Case:
    """A cell with its truth and what the methods said.

    Attributes:
        truth: the sweep of all seeds.
        out: folder of the results.
        rankings: records of `RANKINGS`.
    """

    cell: Cell
    truth: LayerRanking
    out: Path
    rankings: list[dict[str, Any]]

    @property
    def damaged(self) -> bool:
        return self.cell in VIOLATING

    def of_choice(self, ranking: LayerRanking) -> tuple[float, float]:
        """Recovery of what a ranking would train, and whether it is the best or tied with it: means over its blocks."""
        of_blocks = [self.of_block(layer) for layer in ranking.choice]
        recovery, tied = (float(np.mean(values)) for values in zip(*of_blocks, strict=True))
        return recovery, tied

    def of_block(self, layer: int) -> tuple[float, float]:
        gains = [gain or 0.0 for gain in self.truth.scores]
        return gains[layer] / max(gains), float(layer in self.truth.tied)

    def trial(
        self,
        scores: Sequence[float | None],
        outcome: tuple[float, float],
        share: float = 0.0,
        seconds: float = 0.0,
    ) -> Trial:
        rho = rank_correlation(list(scores), self.truth.scores)
        return Trial(self.cell.name, rho, *outcome, share, seconds)

    def of_method(self, method: str, budget: float | None = None) -> list[LayerRanking]:
        """The rankings of every seed that there is."""
        found = find_records(self.rankings, method=method, budget=budget)
        return [LayerRanking.from_dict(record["record"], RANKINGS) for record in sorted(found, key=lambda r: r["seed"])]

    def trials(self, method: str, budget: float | None = None) -> list[Trial]:
        return [
            self.trial(r.scores, self.of_choice(r), r.cost["share"], r.cost["seconds"])
            for r in self.of_method(method, budget)
        ]

    def of_scores(self, scores: Sequence[float], share: float = 0.0, seconds: float = 0.0) -> list[Trial]:
        return [self.trial(scores, self.of_block(int(np.argmax(scores))), share, seconds)]

    @property
    def run(self) -> float:
        """Tokens of the training run that the costs are shares of."""
        cost = self.of_method("auto", 0.25)[0].cost
        return (cost["tokens_generated"] + cost["tokens_trained"]) / cost["share"]


def load(cells: Sequence[Cell], out: Path) -> list[Case]:
    """The cases whose truth is there, of all seeds or of the first."""
    rankings = read_records(out / RANKINGS)
    found = []
    for cell in cells:
        swept = truth.profile(cell, out, cell.seeds) or truth.profile(cell, out, cell.seeds[:1])
        if swept:
            found.append(Case(cell, swept, out, find_records(rankings, case=cell.name)))
    return found


def methods(case: Case, cases: Sequence[Case]) -> dict[str, list[Trial]]:
    """Every method's trials of a case."""
    depth = case.truth.num_layers
    every = [t for k in range(depth) for t in case.of_scores([float(i == k) for i in range(depth)])]
    trials = {"random block (mean of all)": [Trial(t.case, None, t.recovery, t.tied, 0, 0) for t in every]}
    trials["depth prior"] = case.of_scores(depth_prior(depth))
    other = [c for c in cases if c.cell.base == case.cell.base and c.cell != case.cell]
    if other and not case.damaged:
        trials["profile of the other task"] = case.of_scores([s or 0.0 for s in other[0].truth.scores])
    for found in find_records(case.rankings, method="diagnostics"):
        one = found["record"]
        for name in NAMES:
            trials[f"one batch: {name}"] = case.of_scores(one["scores"][name], one["tokens"] / case.run, one["seconds"])
    trials["short runs, 8 steps a block"] = case.trials("short_runs")
    trials["race, budget 25 %"] = case.trials("race", 0.25)
    for budget in (0.05, 0.1, 0.25, 0.5, 1.0):
        trials[f"auto, budget {budget:.0%}".replace("%", " %")] = case.trials("auto", budget)
    return {name: of_method for name, of_method in trials.items() if of_method}


def write_results(cells: Sequence[Cell], out: Path, page: Path | None) -> None:
    """Write RESULTS.md, and curve.png, into `out`, and the table of `page`."""
    cases = load([c for c in cells if c not in CORRELATED], out)
    if not cases:
        raise SystemExit(f"no truth in {out / truth.FILE} yet")
    found = [methods(case, cases) for case in cases]
    names = list(dict.fromkeys(name for trials in found for name in trials))
    names.sort(key=lambda name: ORDER.index(name.split()[0].rstrip(",")))
    tables = {title: _table(cases, found, names, damaged) for title, damaged in TITLES.items()}
    text = [HEADER.format(undamaged=sum(not c.damaged for c in cases), damaged=sum(c.damaged for c in cases))]
    for title, rows in tables.items():
        text += [f"\n## {title}: {sum(c.damaged == TITLES[title] for c in cases)} cases\n", TABLE_HEAD, *rows]
    text += ["\n## Against the prior, all cases\n", _against(found, DEFAULT, "depth prior")]
    text += [_against(found, "race, budget 25 %", "depth prior")]
    text += ["\n## Targets\n", *_targets(cases, found)]
    text += ["\n## The first block of each case\n", *_cases(cases, found)]
    text += ["\n## Correlations of whole profiles\n", *_correlations(load(cells, out))]
    (out / "RESULTS.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    _curve(cases, found, out / "curve.png")
    shown = [name for name in names if name.startswith(ON_PAGE)]
    lines = [TABLE_HEAD.replace("| method |", "| bases, method |")]
    for title, damaged in TITLES.items():
        lines += [row.replace("| ", f"| {title}: ", 1) for row in _table(cases, found, shown, damaged)]
    if page is not None:
        _fill(page, "\n".join(lines))


def _fill(page: Path, table: str) -> None:
    """Put the table between the page's marks."""
    text = page.read_text(encoding="utf-8")
    start, end = (text.index(f"<!-- study {mark} -->") for mark in ("begins", "ends"))
    page.write_text(text[:start] + f"<!-- study begins -->\n{table}\n" + text[end:], encoding="utf-8")


def _table(
    cases: Sequence[Case], found: Sequence[dict[str, list[Trial]]], names: Sequence[str], damaged: bool
) -> list[str]:
    chosen = [trials for case, trials in zip(cases, found, strict=True) if case.damaged == damaged]
    present = [name for name in names if any(name in trials for trials in chosen)]
    return [_row(name, [trials[name] for trials in chosen if name in trials], len(chosen)) for name in present]


TITLES = {"Undamaged bases": False, "Bases with one damaged block": True}
ON_PAGE = ("random", "depth", "profile", "short", "race", DEFAULT)

HEADER = """# Results of the study

Written by `python examples/study/study.py --part table` from the files beside it; {undamaged} undamaged and {damaged}
damaged cases. Toy models of half a million parameters: evidence about the method, not about large models.

Truth: a full sweep, 100 steps of 16 prompts x 8 completions a block, 512 held-out problems x 4 samples. Shares of cost
are of the demo's run, 150 steps of 24 x 8, which has 2.25 times the tokens of one of the truth's. `recovery` is
C(pick) / C(best); `best or tied` counts picks whose paired 95 % interval of the difference from the best holds 0;
a method that picks nothing counts by its choice, the five middle blocks: by the mean of the five each trained alone,
since their training together was not measured. In brackets: 95 % bootstrap intervals over cases."""

TABLE_HEAD = """| method | Spearman | recovery, mean | worst | best or tied | share of a run, mean (most) | seconds |
|---|---|---|---|---|---|---|"""


def _row(name: str, trials: list[list[Trial]], cases: int) -> str:
    """One line: means over the trials of a case, then over cases."""
    recovery, tied = _by_case(trials, lambda t: t.recovery), _by_case(trials, lambda t: t.tied)
    rho = [
        float(np.mean([t.spearman or 0.0 for t in of_case]))
        for of_case in trials
        if all(t.spearman is not None for t in of_case)
    ]
    every = [t for of_case in trials for t in of_case]
    worst = f"{min(t.recovery for t in every):.2f}" if "mean of all" not in name else ""
    share = [t.share for t in every]
    of = f" ({len(trials)} of {cases} cases)" if len(trials) < cases else ""
    cost = f"{np.mean(share):.1%} ({max(share):.1%})".replace("%", " %") if max(share) else "0"
    return (
        f"| {name}{of} | {_interval(rho) if rho else ''} | {_interval(recovery)} | {worst} | {_interval(tied)} | "
        f"{cost} | {np.mean([t.seconds for t in every]):.0f} |"
    )


def _by_case(trials: list[list[Trial]], of: Callable[[Trial], float]) -> list[float]:
    return [float(np.mean([of(t) for t in of_case])) for of_case in trials]


def _bootstrap(values: Sequence[float]) -> np.ndarray:
    """(DRAWS,) means of resampled cases."""
    drawn = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    return np.asarray(values)[drawn].mean(axis=1)


def _interval(values: Sequence[float]) -> str:
    low, high = np.quantile(_bootstrap(values), (0.025, 0.975))
    return f"{np.mean(values):.2f} [{low:.2f}, {high:.2f}]"


def _against(found: list[dict[str, list[Trial]]], method: str, other: str) -> str:
    both = [trials for trials in found if method in trials and other in trials]
    if not both:
        return f"{method} has not been run."
    a, b = (_by_case([t[name] for t in both], lambda t: t.recovery) for name in (method, other))
    differences = [x - y for x, y in zip(a, b, strict=True)]
    low, high = np.quantile(_bootstrap(differences), (0.025, 0.975))
    verdict = "significant" if low > 0 or high < 0 else "not significant"
    return (
        f"Recovery of *{method}* minus that of *{other}*: {np.mean(differences):+.3f}, paired bootstrap "
        f"[{low:+.3f}, {high:+.3f}] over {len(both)} cases: {verdict}.\n"
    )


def _targets(cases: Sequence[Case], found: Sequence[dict[str, list[Trial]]]) -> list[str]:
    """What was aimed at, and what was reached, of auto at its default budget."""
    lines = ["| bases | figure | target | reached | |", "|---|---|---|---|---|"]
    for title, damaged in TITLES.items():
        trials = [t[DEFAULT] for case, t in zip(cases, found, strict=True) if case.damaged == damaged and DEFAULT in t]
        if not trials:
            continue
        recovery = _by_case(trials, lambda t: t.recovery)
        every = [t for of_case in trials for t in of_case]
        figures = [("mean recovery", 0.95 if damaged else 0.98, float(np.mean(recovery)))]
        if damaged:
            figures.append(("best or tied", 0.80, float(np.mean(_by_case(trials, lambda t: t.tied)))))
        else:
            figures.append(("worst recovery", 0.95, min(t.recovery for t in every)))
        lines += [
            f"| {title} | {name} | >= {target:.2f} | {value:.3f} | {'reached' if value >= target else 'missed'} |"
            for name, target, value in figures
        ]
        most = max(t.share for t in every)
        lines.append(f"| {title} | share of a run | <= .25 | {most:.3f} | {'reached' if most <= 0.25 else 'missed'} |")
    return lines


def _cases(cases: Sequence[Case], found: list[dict[str, list[Trial]]]) -> list[str]:
    lines = [
        "| case | seeds | best (tied) | S_base | S_best | S_full | auto's picks at 25 % | recovery |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, trials in zip(cases, found, strict=True):
        sweep, best = case.truth.sweep, case.truth.order[0]
        assert sweep and sweep.seeds and sweep.means
        others = ", ".join(str(k) for k in sorted(case.truth.tied) if k != best)
        picks = [
            f"none ({r.choice[0]}-{r.choice[-1]})" if r.pick is None else str(r.pick)
            for r in case.of_method("auto", 0.25)
        ]
        recovered = ", ".join(f"{x.recovery:.2f}" for x in trials.get(DEFAULT, []))
        lines.append(
            f"| {case.cell.base}, {case.cell.task} | {len(sweep.seeds)} | {best} ({others}) | {sweep.base:.3f} "
            f"| {sweep.means[best]:.3f} | {sweep.full:.3f} | {', '.join(picks)} | {recovered} |"
        )
    return lines


def _correlations(cases: Sequence[Case]) -> list[str]:
    """Spearman between profiles that differ in one respect."""
    by = {case.cell.name: case for case in cases}
    lines = ["| between | base | Spearman |", "|---|---|---|"]
    for case in cases:
        cell = case.cell
        if cell in CORRELATED:
            if same := by.get(f"{cell.base}-{cell.task}-grpo"):
                rho = rank_correlation(case.truth.scores, same.truth.scores)
                lines.append(f"| grpo and {cell.algorithm}, {cell.task} | {cell.base} | {_rho(rho)} |")
            continue
        other = by.get(f"{cell.base}-sort-grpo")
        if cell.task == "arithmetic" and other:
            rho = rank_correlation(case.truth.scores, other.truth.scores)
            lines.append(f"| arithmetic and sort | {cell.base} | {_rho(rho)} |")
        sweep = case.truth.sweep
        assert sweep is not None
        one, two = (truth.profile(cell, case.out, [seed]) for seed in (0, 1))
        if one and two:
            rho = rank_correlation(one.scores, two.scores)
            lines.append(f"| two seeds, {cell.task} | {cell.base} | {_rho(rho)} |")
        if sweep.greedy:
            rho = rank_correlation(case.truth.scores, sweep.greedy["means"])
            lines.append(f"| sampled and greedy accuracy, {cell.task} | {cell.base} | {_rho(rho)} |")
    return lines


def _rho(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _curve(cases: Sequence[Case], found: list[dict[str, list[Trial]]], path: Path) -> None:
    """Recovery against the budget, for undamaged and damaged bases, with bootstrap intervals."""
    from peft_onelayer.report.plots import BLUE, GREY, ORANGE, new_figure

    figure, axes = new_figure()
    for wanted, colour, label in ((False, BLUE, "undamaged"), (True, ORANGE, "damaged")):
        chosen = [trials for case, trials in zip(cases, found, strict=True) if case.damaged == wanted]
        points = []
        for name in sorted({n for t in chosen for n in t if n.startswith("auto")}, key=lambda n: float(n.split()[2])):
            values = _by_case([t[name] for t in chosen if name in t], lambda t: t.recovery)
            low, high = np.quantile(_bootstrap(values), (0.025, 0.975))
            points.append((float(name.split()[2]), np.mean(values), np.mean(values) - low, high - np.mean(values)))
        if points:
            x, y, below, above = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=[below, above], color=colour, marker="o", capsize=3, label=f"auto, {label} bases")
            prior = np.mean(_by_case([t["depth prior"] for t in chosen], lambda t: t.recovery))
            axes.axhline(prior, color=colour, linewidth=1, linestyle=":", label=f"depth prior, {label} bases")
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([5, 10, 25, 50, 100], ["5", "10", "25", "50", "100"])
    axes.set(title="Quality against budget", xlabel="budget (% of a training run's tokens)", ylabel="C(pick) / C(best)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
