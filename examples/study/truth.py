"""The study's ground truth: full sweeps of its bases, each block at a learning rate of its own.

What is there is kept, so that a killed study goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bases import DAMAGED
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_onelayer.probe.batch import graded_batch
from peft_onelayer.probe.updates import Candidate, trained_candidate, update
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.rl.recipe import Recipe, demo_recipe
from peft_onelayer.rollouts.sampling import sample_rollouts
from peft_onelayer.sweep.run_layer import Row, RunSpec
from peft_onelayer.sweep.sweep import sweep_layers
from peft_onelayer.tasks import Task, load_task

STEPS, PROMPTS = 100, 16  # of one run: 100 steps of 16 prompts x 8 completions
PROBLEMS, SAMPLES = 512, 4  # held out
FULL_RATE = 3e-4
OF_THE_MACHINE = ("use_cpu", "bf16", "max_completion_length")  # settings that a sweep makes itself


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


def study_recipe(task: Task, algorithm: str = "grpo") -> Recipe:
    """The run that is chosen for: the demo's, with fewer prompts a step."""
    from peft_onelayer.rl.algorithms import load_algorithm

    of_demo, chosen = demo_recipe(task, STEPS), load_algorithm(algorithm)
    settings = {**of_demo.settings, **chosen.settings, "per_device_train_batch_size": 8 * PROMPTS, "beta": 0.0}
    return Recipe(chosen, settings)


def measure(cell: Cell, bases: Path, out: Path, workers: int | None = None) -> LayerRanking:
    """The sweep of a cell, run as far as it is not there; the profile of each seed is beside it, as seed0.json."""
    folder = out / cell.name
    done = folder / "layer_profile.json"
    if done.exists():
        return LayerRanking.from_json(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    model = str(bases / cell.base)
    recipe = study_recipe(load_task(cell.task), cell.algorithm)
    rates = folder / "rates.json"
    if not rates.exists():
        rates.write_text(json.dumps(_rates(model, cell.task, recipe.settings["learning_rate"])))
    settings = {k: v for k, v in recipe.settings.items() if k != "learning_rate" and k not in OF_THE_MACHINE}

    def on_row(done: int, total: int, spec: RunSpec, row: Row) -> None:
        print(f"{cell.name} {done}/{total} {spec}: {row['mean']:.3f}, {row['seconds']:.0f} s", flush=True)

    def sweep(seeds: tuple[int, ...]) -> LayerRanking:
        return sweep_layers(
            model,
            cell.task,
            out=folder,
            algorithm=cell.algorithm,
            steps=STEPS,
            seeds=seeds,
            learning_rate={int(k): rate for k, rate in json.loads(rates.read_text()).items()},
            full_learning_rate=FULL_RATE,
            settings=settings,
            problems=PROBLEMS,
            samples=SAMPLES,
            batch_size=512,
            greedy=True,
            workers=workers,
            on_row=on_row,
        )

    if len(cell.seeds) > 1:
        for seed in cell.seeds:
            sweep((seed,))
            done.rename(folder / f"seed{seed}.json")
    return sweep(cell.seeds)


def _rates(model: str, task_name: str, rate: float) -> dict[int, float]:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    task = load_task(task_name)
    groups = sample_rollouts(base, tokenizer, task, task.rows("train", 128, 1), samples=8, seed=1)
    batch = graded_batch(groups, tokenizer.pad_token_id, base.device)
    assert batch is not None
    rates = {}
    for layer in range(base.config.num_hidden_layers):
        candidate = Candidate(layer, rate)
        with trained_candidate(base, candidate) as trained:
            update(trained, candidate, batch, steps=1, size=len(batch), micro_batch=len(batch))
        rates[layer] = min(rate, candidate.learning_rate)
    return rates
