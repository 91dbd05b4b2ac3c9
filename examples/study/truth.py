"""The study's ground truth: full sweeps of its bases, each block at a learning rate of its own.

truth.jsonl has one record a line, {"case", "what", "seeds", "record"}, of these kinds ("what"):

    learning_rates    by block: the demo's, lowered where the first update would move the policy too far
    profile           layer_profile.json of the sweep, of each seed alone and of all together

What is there is kept, so that a killed study goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from bases import DAMAGED
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_onelayer.probe.batch import graded_batch
from peft_onelayer.probe.updates import Candidate, trained_candidate, update
from peft_onelayer.records.jsonl import append_record, find_records, read_records
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.rl.recipe import demo_config
from peft_onelayer.rollouts.sampling import sample_rollouts
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.sweep.run_layer import Row, RunSpec
from peft_onelayer.sweep.settings import SweepSettings
from peft_onelayer.sweep.sweep import sweep_layers
from peft_onelayer.tasks import load_task

STEPS, PROMPTS = 100, 16  # of one run: 100 steps of 16 prompts x 8 completions
PROBLEMS, SAMPLES = 512, 4  # held out
FULL_RATE = 3e-4
FILE = "truth.jsonl"


@dataclass(frozen=True)
class Cell:
    """One question of the study: which block of `base` to train on `task` with `algorithm`."""

    base: str
    task: str
    algorithm: str = "grpo"
    seeds: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        return f"{self.base}-{self.task}-{self.algorithm}"


UNDAMAGED = tuple(
    Cell(base, task, seeds=(0, 1)) for base in ("wide12", "deep8", "short6") for task in ("arithmetic", "sort")
)
VIOLATING = tuple(Cell(base.name, base.task, seeds=(0, 1)) for base in DAMAGED)
CORRELATED = (Cell("deep8", "arithmetic", "dr_grpo"),)  # truth alone, for the correlation with grpo


@cache
def known(out: Path) -> list[dict[str, Any]]:
    """The records in `out`."""
    return read_records(out / FILE)


def keep(out: Path, cell: Cell, what: str, seeds: Sequence[int] | None, record: dict[str, Any]) -> None:
    append_record(out / FILE, {"case": cell.name, "what": what, "seeds": seeds and list(seeds), "record": record})
    known.cache_clear()
    print(f"{cell.name}: {what}, seeds {seeds}", flush=True)


def profile(cell: Cell, out: Path, seeds: Sequence[int]) -> LayerRanking | None:
    """The sweep of a cell with these seeds, if it is there."""
    found = find_records(known(out), case=cell.name, what="profile", seeds=list(seeds))
    return LayerRanking.from_dict(found[-1]["record"], f"{FILE}, {cell.name}") if found else None


def settings(cell: Cell, bases: Path, rates: dict[int, float]) -> SweepSettings:
    """The sweep: runs of the demo's recipe, with fewer prompts a step."""
    config = {name: value for name, value in demo_config(STEPS).items() if name != "learning_rate"}
    return SweepSettings(
        model=str(bases / cell.base),
        task=cell.task,
        algorithm=cell.algorithm,
        steps=STEPS,
        seeds=cell.seeds,
        learning_rate=rates,
        full_learning_rate=FULL_RATE,
        config={**config, "per_device_train_batch_size": 8 * PROMPTS},
        problems=PROBLEMS,
        samples=SAMPLES,
        batch_size=512,
        greedy=True,
    )


def measure(cell: Cell, bases: Path, out: Path, workers: int | None = None) -> None:
    """Sweep a cell, as far as it is not done: each seed alone, and all together."""

    def on_row(done: int, total: int, spec: RunSpec, row: Row) -> None:
        print(f"{cell.name} {done}/{total} {spec}: {row['mean']:.3f}, {row['seconds']:.0f} s", flush=True)

    together = [(seed,) for seed in cell.seeds] if len(cell.seeds) > 1 else []
    for seeds in [*together, cell.seeds]:
        if profile(cell, out, seeds) is None:
            asked = replace(settings(cell, bases, learning_rates(cell, bases, out)), seeds=seeds)
            swept = sweep_layers(asked, out=sweep_folder(cell, out), workers=workers, on_row=on_row)
            keep(out, cell, "profile", seeds, swept.to_dict())


def learning_rates(cell: Cell, bases: Path, out: Path) -> dict[int, float]:
    """The rate of each block, measured where it is not known."""
    if not find_records(known(out), case=cell.name, what="learning_rates"):
        model = str(bases / cell.base)
        blocks = range(AutoConfig.from_pretrained(model).num_hidden_layers)
        keep(out, cell, "learning_rates", None, {str(k): _measured_rate(model, cell.task, k) for k in blocks})
    record = find_records(known(out), case=cell.name, what="learning_rates")[-1]["record"]
    return {int(k): rate for k, rate in record.items()}


def _measured_rate(model: str, task_name: str, layer: int) -> float:
    """The demo's learning rate, lowered where a first update of the block would move the policy too far."""
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    task, rate = load_task(task_name), float(demo_config(STEPS)["learning_rate"])
    groups = sample_rollouts(base, tokenizer, task, task.rows("train", 128, 1), Sampling(samples=8, seed=1))
    batch = graded_batch(groups, tokenizer.pad_token_id, base.device)
    assert batch is not None
    candidate = Candidate(layer, rate)
    with trained_candidate(base, candidate) as trained:
        update(trained, candidate, batch, steps=1, size=len(batch), micro_batch=len(batch))
    return min(rate, candidate.learning_rate)


def sweep_folder(cell: Cell, out: Path) -> Path:
    folder = out / "sweeps" / cell.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder
