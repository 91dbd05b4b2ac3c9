"""What the rows of a study say: scores and C with intervals, what is there, and what is missing by name."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measures import probe_runs, retention_runs
from one_run import Setting
from planned import COMPARED, DEPTH, RESULTS, SEEDS, SETTINGS, aimed, best_block, best_rate, grid, picked

from peft_onelayer.records.jsonl import read_records
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.sweep.metric import LayerContribution, gain, layer_contribution, not_told_apart

KINDS = ("block", "full", "lora-all", *COMPARED)
BLOCKS = "each block that is aimed at"
PICKED = "each other block that a ranking chose"
SEARCH = "the search for the rate of "  # begins the name of a part
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One thing that a study needs: how many of how many runs are there, and which are missing."""

    name: str
    there: int
    wanted: int
    missing: str


@dataclass(frozen=True)
class Study:
    """A model on a task, with what was measured.

    Attributes:
        rows: of `evidence.py`.
        probes: its `--probes`.
        kept: its `--retention`.
        transplants: of `transplant.py`.
        repeats: runs that are rows too, made again on another machine.
    """

    setting: Setting
    rows: Sequence[Row]
    probes: Sequence[Row] = ()
    kept: Sequence[Row] = ()
    transplants: Sequence[Row] = ()
    repeats: Sequence[Row] = ()

    @classmethod
    def read(cls, setting: Setting, results: Path = RESULTS) -> Study:
        ends = ("", "-probes", "-retention", "-transplant", "-repeats")
        return cls(setting, *(read_records(results / f"{setting.name}{end}.jsonl") for end in ends))

    @property
    def depth(self) -> int:
        return DEPTH[self.setting.model]

    @property
    def aimed(self) -> list[int]:
        return aimed(self.setting)

    @property
    def middle(self) -> int:
        return self.depth // 2

    @property
    def best(self) -> int | None:
        """The block of the highest score in a whole sweep of the first seed."""
        return best_block(self.rows, self.setting)

    def rate(self, kind: str) -> float | None:
        return best_rate(self.rows, kind)

    def of(self, kind: str, block: int | None = None, rate: float | None = None) -> list[Row]:
        """The rows of a kind by seed, at this rate (default: the one that was chosen); one for each seed."""
        rate = self.rate(kind) if rate is None else rate
        wanted = (kind, block, None if kind == "base" else rate)
        if kind != "base" and rate is None:
            return []
        by_seed: dict[int, Row] = {}
        for row in self.rows:
            if (row["run"]["kind"], row["run"]["block"], row["run"]["rate"]) == wanted:
                by_seed.setdefault(row["run"]["seed"], row)
        return [by_seed[seed] for seed in sorted(by_seed)]

    def gain(self, rows: Sequence[Row]) -> tuple[float, float | None]:
        (base,) = self.of("base")[:1]
        return gain([row["scores"] for row in rows], base["scores"])

    def contribution(self, rows: Sequence[Row], full: Sequence[Row]) -> LayerContribution | None:
        """C of what these rows trained; None where a part of it is missing."""
        base = self.of("base")
        if not (rows and full and base):
            return None
        return layer_contribution([r["scores"] for r in rows], base[0]["scores"], [r["scores"] for r in full])

    @property
    def full(self) -> list[Row]:
        """At the rate that was tuned for it."""
        return self.of("full")

    @property
    def full_at_equal(self) -> list[Row]:
        """At the rate of the blocks."""
        rate = self.rate("block")
        return [] if rate is None else self.of("full", None, rate)

    def blocks(self, seed: int | None = None) -> dict[int, list[Row]]:
        """The rows of each block that was measured at the blocks' rate, of one seed or of all."""
        found = {k: self.of("block", k) for k in range(self.depth)}
        kept = {k: [r for r in rows if seed in (None, r["run"]["seed"])] for k, rows in found.items()}
        return {k: rows for k, rows in kept.items() if rows}

    def crossed(self) -> list[tuple[int, int, LayerContribution]]:
        """Of each whole sweep its seed, its best block, and the C of this block in the seeds that did not choose it."""
        found = []
        for seed in SEEDS:
            chosen = {k: rows for k, rows in self.blocks(seed).items() if k in self.aimed}
            if len(chosen) < len(self.aimed):
                continue
            block = max(chosen, key=lambda k: chosen[k][0]["mean"])
            others = [row for row in self.of("block", block) if row["run"]["seed"] != seed]
            if (c := self.contribution(others, self.full)) is not None:
                found.append((seed, block, c))
        return found

    def tied(self) -> list[int]:
        """The measured blocks that are not told apart from the best of them, best first."""
        blocks = self.blocks()
        order = sorted(blocks, key=lambda k: -statistics.fmean(row["mean"] for row in blocks[k]))
        return not_told_apart(order, {k: [row["scores"] for row in rows] for k, rows in blocks.items()})

    def parts(self) -> list[Part]:
        """What a whole study has, in the order of its runs."""
        base = self.of("base")
        found = [Part("the base", len(base[:1]), 1, "" if base else "the base")]
        for kind in KINDS:
            rates = getattr(self.setting, grid(kind))
            done = {r["run"]["rate"] for r in self.rows if r["run"]["kind"] == kind and r["run"]["searched"]}
            missing = [f"{rate:g}" for rate in rates if rate not in done]
            found.append(_part(f"{SEARCH}{name_of(kind)}", len(rates), missing))
        for seed in SEEDS:
            there = self.blocks(seed)
            left = [k for k in self.aimed if k not in there]
            said = f"blocks {ranges(left)}" if left else ""
            found.append(Part(f"{BLOCKS}, seed {seed}", len(self.aimed) - len(left), len(self.aimed), said))
        if chosen := [(k, seed) for k in picked(self.setting, self.probes) for seed in SEEDS]:
            unmeasured = [f"block {k}, seed {seed}" for k, seed in chosen if k not in self.blocks(seed)]
            found.append(_part(PICKED, len(chosen), unmeasured, "; ".join(unmeasured)))
        found += [
            self._repeated("all parameters", self.full),
            self._repeated("all at the blocks' rate", self.full_at_equal),
        ]
        for kind in ("lora-all", "lora-all-sized", "mask", "norms"):
            found.append(self._repeated(name_of(kind), self.of(kind)))
        found.append(self._repeated("LoRA on the middle block", self.of("lora-block", self.middle)))
        on_best = [] if self.best is None else self.of("lora-block", self.best)
        found.append(self._repeated("LoRA on the best block", on_best))
        wanted = probe_runs(self.setting)
        done = {tuple(sorted(row["probe"].items())) for row in self.probes}
        unmade = [probe for probe in wanted if tuple(sorted(probe.items())) not in done]
        listed = [f"{p['method']}, budget {p['budget']:g} of {p['steps']} steps" for p in unmade]
        found.append(Part("probes", len(wanted) - len(unmade), len(wanted), "; ".join(dict.fromkeys(listed))))
        kept = {(r["run"]["kind"], r["run"]["block"], r["run"]["seed"]) for r in self.kept}
        asked = retention_runs(self.setting, self.rows)
        gone = [str(run) for run in asked if (run.kind, run.block, run.seed) not in kept]
        unknown = (
            [] if self.best is not None and self.rate("full") and self.rate("lora-all") else ["those not chosen yet"]
        )
        found.append(Part("retention", len(asked) - len(gone), len(asked) + len(unknown), "; ".join(gone + unknown)))
        single = {row["blocks"][0] for row in self.transplants if row["kind"] == "single"}
        left_out = ranges(k for k in range(self.depth) if k not in single)
        return [
            *found,
            Part("the transplant of each block", len(single), self.depth, left_out and f"blocks {left_out}"),
        ]

    def _repeated(self, name: str, rows: Sequence[Row]) -> Part:
        there = {row["run"]["seed"] for row in rows}
        return _part(name, len(SEEDS), [f"seed {seed}" for seed in SEEDS if seed not in there])

    def recovery(self, ranking: LayerRanking) -> tuple[float, float] | None:
        """C(pick) / C(best of those measured), and whether the pick is not told apart from the best; of several blocks,
        their means. None before these blocks were measured, and where a pick was not."""
        shares, picks, tied = self._shares_of_best(), ranking.choice, self.tied()
        if not shares.keys() >= {*picks}:
            return None
        return statistics.fmean(shares[k] for k in picks), statistics.fmean(k in tied for k in picks)

    def best_that_ran(self, ranking: LayerRanking) -> float | None:
        """C(best of the blocks to which a race gave a turn) / C(best of those measured): what its pick could reach."""
        shares, ran = self._shares_of_best(), {int(block) for block in ranking.rounds or {}}
        return max(shares[k] for k in ran) if ran and shares.keys() >= ran else None

    def picked_by_other_seeds(self) -> list[float]:
        """C(pick) / C(best) in each seed, the pick being the best block of another seed's whole sweep."""
        gains = {seed: {k: v for k, v in self.gains(seed).items() if k in self.aimed} for seed in SEEDS}
        if not all(gains.values()):
            return []
        pairs = [(gains[chosen], gains[seen]) for chosen in SEEDS for seen in SEEDS if chosen != seen]
        return [seen[max(chosen, key=chosen.__getitem__)] / max(seen.values()) for chosen, seen in pairs]

    def gains(self, seed: int | None = None) -> dict[int, float]:
        """What each block gained, with one seed or by the mean of all; none before all aimed at were measured."""
        blocks, base = self.blocks(seed), self.of("base")
        if not base or not blocks.keys() >= {*self.aimed}:
            return {}
        return {k: statistics.fmean(row["mean"] for row in rows) - base[0]["mean"] for k, rows in blocks.items()}

    def _shares_of_best(self) -> dict[int, float]:
        """Of each measured block its C by that of the best."""
        gains = self.gains()
        most = max(gains.values(), default=1.0)
        return {k: gained / most for k, gained in gains.items()}


def _part(name: str, wanted: int, missing: Sequence[str], said: str | None = None) -> Part:
    return Part(name, wanted - len(missing), wanted, ", ".join(missing) if said is None else said)


def name_of(kind: str) -> str:
    """What a kind of run is called on the page."""
    return {
        "base": "the base",
        "block": "a block",
        "full": "all parameters",
        "lora-all": "LoRA r = 16 on all linears",
        "lora-all-sized": "LoRA of a block's size on all linears",
        "lora-block": "LoRA on one block",
        "mask": "a random mask of a block's size",
        "norms": "the norms alone",
    }[kind]


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers, neighbours together.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def studies(results: Path = RESULTS) -> list[Study]:
    return [Study.read(setting, results) for setting in SETTINGS]
