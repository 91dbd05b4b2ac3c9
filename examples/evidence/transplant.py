"""Do the blocks of a full run, put into the base without training, predict what each block gains when trained alone?

    python examples/evidence/transplant.py toys --bases FOLDER [--full FOLDER]
    python examples/evidence/transplant.py smollm2-135m sums [--models FOLDER] [--full FOLDER]

Of the toys the truth is the study's, of a model the rows of evidence.py. The full run is made once and kept in --full,
a folder for each. Every evaluation is a line of results/NAME-transplant.jsonl, and one that is there is not repeated.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_run import HERE
from planned import DEPTH, RESULTS, SEEDS, SETTINGS, best_rate

from peft_onelayer.analysis.profiles import spearman_interval
from peft_onelayer.probe.prior import depth_prior
from peft_onelayer.records.jsonl import append_record, read_records
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.rl.training import train_layer
from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs.models import load_causal_lm, to_device, without_progress_bars
from peft_onelayer.statistics import rank_correlation
from peft_onelayer.sweep.metric import gain
from peft_onelayer.sweep.transplant import evaluate_transplants, transplants
from peft_onelayer.tasks import load_task

FORMAT = "onelayer-evidence-transplant-1"
STUDY = HERE.parent / "study"
TOYS = "../examples/study/README.md"  # seen from the page
FULL_SEED = SEEDS[0]
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A base with its full run.

    Attributes:
        case: names the rows.
        base, full: folders of the models; that of the full run is made when it is not there.
        task: for `load_task`.
        settings: of the training: fields of TRL's configuration, the learning rate of all parameters among them; or
            "prompts", "completions" and "learning_rate".
        problems, samples, batch_size: of an evaluation.
    """

    case: str
    base: Path
    full: Path
    task: str
    steps: int
    settings: Mapping[str, Any]
    problems: int
    samples: int
    batch_size: int = 64


def train_full(job: Job) -> None:
    """Train all parameters of the base, and keep the model."""
    task = load_task(job.task)
    model, tokenizer = load_causal_lm(str(job.base))
    given = dict(job.settings)
    step = {name: given.pop(name) for name in ("prompts", "completions", "learning_rate") if name in given}
    recipe = make_recipe("grpo", task, given, **step)
    trained = train_layer(model, tokenizer, task, None, steps=job.steps, seed=FULL_SEED, recipe=recipe).model
    trained.save_pretrained(job.full)
    tokenizer.save_pretrained(job.full)


def measure(job: Job, path: Path, minutes: float) -> None:
    """Add the rows of `job` that are missing: the base, the full model, and every transplant, single blocks first."""
    start = time.perf_counter()
    done = {(row["kind"], tuple(row["blocks"])) for row in read_records(path) if row["case"] == job.case}
    if not (job.full / "config.json").exists():
        train_full(job)
    task = load_task(job.task)
    base, tokenizer = load_causal_lm(str(job.base))
    donor, _ = load_causal_lm(str(job.full))
    to_device(base)
    to_device(donor)
    rows = task.rows("test", job.problems, 0)
    sampling = Sampling(samples=job.samples, batch_size=job.batch_size)

    def keep(kind: str, blocks: Sequence[int], found: Any, cpu: float) -> None:
        row: Row = {"format": FORMAT, "case": job.case, "kind": kind, "blocks": list(blocks), "mean": found.mean}
        row |= {"scores": list(found.scores), "cpu_seconds": round(time.process_time() - cpu, 1)}
        append_record(path, row)
        print(f"{job.case}, {kind} {list(blocks)}: {found.mean:.4f}", flush=True)

    for kind, model in (("base", base), ("full", donor)):
        if (kind, ()) not in done:
            cpu = time.process_time()
            keep(kind, (), evaluate(model, tokenizer, task, rows, sampling), cpu)
    depth = base.config.num_hidden_layers
    left = [t for t in transplants(depth) if (t.kind, t.blocks) not in done]
    cpu = time.process_time()
    for t, found in evaluate_transplants(base, donor, tokenizer, task, left, rows, sampling):
        keep(t.kind, t.blocks, found, cpu)
        cpu = time.process_time()
        if time.perf_counter() - start > 60 * minutes:
            return


@dataclass(frozen=True)
class Figures:
    """How a transplant profile stands to the truth.

    Attributes:
        blocks: with a truth, and all blocks; the rest is None until each was put in alone.
        spearman: of the gains of single blocks with the truth, and its 95 % interval, as if blocks were independent.
        prior: the depth prior's Spearman with the truth.
        recovery: truth of the block that gains most when put in alone, over the truth of the best block.
        all_blocks: share of the full run's gain that all blocks have together, without embeddings, final norm and head.
        singles: sum of the single blocks' gains over the full run's gain.
        windows: Spearman of the windows' gains, by their middle block, with the truth.
    """

    blocks: tuple[int, int]
    spearman: float | None
    interval: list[float] | None
    prior: float | None
    recovery: float | None
    all_blocks: float | None
    singles: float | None
    windows: float | None

    def cells(self) -> list[str]:
        within = "" if self.interval is None else f" [{self.interval[0]:.2f}, {self.interval[1]:.2f}]"
        return [
            "{} of {}".format(*self.blocks),
            _cell(self.spearman) + within,
            *map(_cell, (self.prior, self.recovery)),
        ] + [_cell(value) for value in (self.singles, self.all_blocks, self.windows)]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def transplant_figures(rows: Sequence[Row], truth: Sequence[float | None]) -> Figures:
    """The figures of one case.

    Args:
        truth: the gain of each block when it is trained alone, None where it was not measured.
    """
    by = {(row["kind"], tuple(row["blocks"])): row for row in rows}
    base, full = by["base", ()]["scores"], by["full", ()]["scores"]
    gains = {key: gain(row["scores"], base)[0] for key, row in by.items()}
    depth = len(truth)
    alone = [gains.get(("single", (k,))) for k in range(depth)]
    middle = {t.blocks[len(t.blocks) // 2]: gains.get(("window", t.blocks)) for t in transplants(depth, ["window"])}
    both = [k for k in range(depth) if alone[k] is not None and truth[k] is not None]
    if None in alone or len(both) < 2:
        return Figures((len(both), depth), *[None] * 7)
    spearman = rank_correlation(alone, truth)
    most = max(truth[k] or 0.0 for k in both)
    pick = max(both, key=lambda k: alone[k] or 0.0)
    whole = gain(full, base)[0]
    together = gains.get(("below", tuple(range(depth))))
    return Figures(
        blocks=(len(both), depth),
        spearman=spearman,
        interval=spearman_interval(spearman, len(both)),
        prior=rank_correlation(depth_prior(depth), truth),
        recovery=(truth[pick] or 0.0) / most if most > 0 else None,
        all_blocks=None if together is None or not whole else together / whole,
        singles=sum(v or 0.0 for v in alone) / whole if whole else None,
        windows=rank_correlation([middle.get(k) for k in range(depth)], truth),
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and both ends of its 95 % interval over cases that are drawn anew."""
    drawn = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    low, high = np.quantile(np.asarray(values)[drawn].mean(axis=1), (0.025, 0.975))
    return statistics.fmean(values), float(low), float(high)


def toy_bases() -> dict[str, float]:
    """The score of the base of each of the study's sweeps, by case."""
    rows = [row for row in read_records(STUDY / "results" / "truth.jsonl") if row["what"] == "profile"]
    return {row["case"]: row["record"]["base"] for row in rows}


def toy_truth() -> dict[str, list[float | None]]:
    """The gains of the study's sweeps of all seeds, by case; the bases' scores are not in them."""
    found: dict[str, tuple[int, list[float | None]]] = {}
    for row in read_records(STUDY / "results" / "truth.jsonl"):
        if row["what"] == "profile" and len(row["seeds"]) >= found.get(row["case"], (0, []))[0]:
            ranking = LayerRanking.from_dict(row["record"], row["case"])
            found[row["case"]] = (len(row["seeds"]), list(ranking.scores))
    return {case: gains for case, (_, gains) in found.items()}


def toy_cases(results: Path = RESULTS) -> list[tuple[str, list[Row], list[float | None]]]:
    """Name, rows and truth of each toy that was measured."""
    rows, truth = read_records(results / "toys-transplant.jsonl"), toy_truth()
    names = list(dict.fromkeys(row["case"] for row in rows))
    return [(name, [row for row in rows if row["case"] == name], truth[name]) for name in names]


def toy_jobs(bases: Path, full: Path) -> list[Job]:
    """The study's undamaged toys, at the settings of its sweeps; the bases are made where they are not there."""
    sys.path.insert(0, str(STUDY))
    import bases as models
    import truth as study

    jobs = []
    for cell in study.UNDAMAGED:
        models.make(next(base for base in models.PRETRAINED if base.name == cell.base), bases)
        asked = study.settings(cell, bases, {})
        jobs.append(
            Job(
                cell.name,
                bases / cell.base,
                full / cell.name,
                cell.task,
                study.STEPS,
                {**asked.config, "learning_rate": study.FULL_RATE},
                study.PROBLEMS,
                study.SAMPLES,
                asked.batch_size,
            )
        )
    return jobs


def model_job(name: str, task: str, models: Path, full: Path) -> Job:
    """The job of a model of the evidence; its rate for all parameters is the one that was chosen.

    Raises:
        ValueError: no such study, or no rate yet.
    """
    setting = next((s for s in SETTINGS if (s.model, s.task) == (name, task)), None)
    if setting is None:
        raise ValueError(f"no study of {name} on {task}; there are {', '.join(s.name for s in SETTINGS)}")
    rate = best_rate(read_records(RESULTS / f"{setting.name}.jsonl"), "full")
    if rate is None:
        raise ValueError(f"the rate of all parameters is not chosen yet; run evidence.py {name} {task} further")
    step = {"prompts": setting.prompts, "completions": setting.completions, "learning_rate": rate}
    file = str(HERE / f"{setting.task}.py")
    folder = full / setting.name
    return Job(setting.name, models / name, folder, file, setting.steps, step, setting.problems, setting.samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["toys", *DEPTH])
    parser.add_argument("task", nargs="?", help="of a model, such as sums")
    default = os.environ.get("ONELAYER_MODELS", "~/.cache/onelayer-models")
    parser.add_argument("--models", type=Path, default=Path(default).expanduser())
    parser.add_argument("--bases", type=Path, default=STUDY / "bases", help="of the toys")
    cache = Path("~/.cache/onelayer-full").expanduser()
    parser.add_argument("--full", type=Path, default=cache, help="folder of the models after their full runs")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="of the toys, such as wide12-sort-grpo")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no evaluation after so many")
    options = parser.parse_args()
    with without_progress_bars():
        if options.model == "toys":
            jobs = [
                job for job in toy_jobs(options.bases, options.full) if not options.only or job.case in options.only
            ]
            torch.set_num_threads(1)
            path = RESULTS / "toys-transplant.jsonl"
        else:
            try:
                jobs = [model_job(options.model, options.task, options.models, options.full)]
            except ValueError as error:
                parser.error(str(error))
            path = RESULTS / f"{jobs[0].case}-transplant.jsonl"
        for job in jobs:
            measure(job, path, options.minutes)


if __name__ == "__main__":
    main()
