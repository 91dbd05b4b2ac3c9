"""What RL changes in a pretrained model, whether that part alone is enough, and what becomes of two tasks' adapters.

    python examples/evidence/rl_changes.py smollm2-135m sums [--models FOLDER] [--jobs 1] [--minutes 60]

FOLDER has a folder for each model; `demo arithmetic` is the embedded demo model in bfloat16. Every experiment is a line
of results/MODEL-TASK-changes.jsonl and trains all that it needs by itself; those that are there are not repeated. The
kinds: "change" trains all parameters or the middle block, with one seed or two; "subnetwork" the entries that training
all blocks changed, and as many at random; "combine" the middle block on each of two tasks, and makes one adapter of
both. `--steps`, `--problems` and `--results` try all of it in little time, in another folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from evidence import check_model, collect, study_of, study_options
from measures import OTHER
from one_run import HERE, Setting
from planned import DEPTH, RESULTS, SETTINGS

from peft_onelayer import SingleLayerConfig, analyze_change, combine_adapters, compare_adapters, make_mask
from peft_onelayer.analysis.change import Analysis
from peft_onelayer.records.fields import without_missing_parts
from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.rl.training import prompts_needed, train_rows
from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs.describe import describe_machine
from peft_onelayer.runs.models import load_adapter, load_causal_lm, to_device, without_progress_bars
from peft_onelayer.runs.stage_four import combine_with_stage_four
from peft_onelayer.tasks import Task, load_task

SUBNETWORK = HERE.parent / "subnetwork"
FORMAT = "onelayer-evidence-changes-1"
DEMO = "demo"
STUDIES = [*SETTINGS, Setting(DEMO, "arithmetic", (), ())]
BLOCKS = DEPTH | {DEMO: 12}
SMALL_RATES = (1e-6, 1e-5)  # of published runs
# At which these steps learn: all parameters, and the middle block.
RATES = {"smollm2-135m": (3e-5, (1e-4, 3e-4)), "qwen2.5-coder-0.5b": (3e-5, (1e-4, 3e-4)), DEMO: (3e-4, (3e-3,))}
METHODS = ("sum", "average", "slerp", "ties", "dare", "cpi")
PAIRED = "sums"  # the task with which the adapters of both tasks are combined


@dataclass(frozen=True)
class Experiment:
    """One row.

    Attributes:
        kind: "change", "subnetwork" or "combine".
        what: of a change: "full", every parameter, or "block", the middle one.
        rate: of every training in it.
        seeds: of training and of its data; of two the changes are compared.
        masters: whether trained weights are kept in float32, or in the base's dtype.
    """

    kind: str
    what: str
    rate: float
    seeds: tuple[int, ...] = (0,)
    masters: bool = True

    def __str__(self) -> str:
        kept = "" if self.masters else ", no masters"
        return f"{self.kind} of {self.what}, rate {self.rate:g}, seeds {', '.join(map(str, self.seeds))}{kept}"


def experiments(setting: Setting) -> list[Experiment]:
    """All of them, the long and the telling ones first."""
    of_all, of_block = RATES[setting.model]
    found = [Experiment("combine", "block", of_block[0], (seed,)) for seed in (0, 1, 2) if setting.task == PAIRED]
    found += [Experiment("subnetwork", "blocks", of_all, (seed,)) for seed in (0, 1)]
    found += [Experiment("change", "full", of_all, (0, 1), masters) for masters in (True, False)]
    for rate in of_block:
        found += [Experiment("change", "block", rate, (0, 1), masters) for masters in (True, False)]
    found += [Experiment("subnetwork", "blocks", SMALL_RATES[1])]
    for rate in reversed(SMALL_RATES):
        found += [Experiment("change", what, rate, (0,), m) for what in ("full", "block") for m in (True, False)]
    return found


def task_of(name: str) -> Task:
    """A task beside this file, or one of the package."""
    file = HERE / f"{name}.py"
    return load_task(str(file) if file.exists() else name)


@dataclass(frozen=True)
class Bench:
    """Trains and evaluates a base, in the setting of the other evidence.

    Attributes:
        setting: steps, batch and evaluation.
        base: folder of the model.
    """

    setting: Setting
    base: Path

    @property
    def middle(self) -> int:
        return BLOCKS[self.setting.model] // 2

    def load(self) -> tuple[Any, Any]:
        gc.collect()  # the model before
        model: Any
        model, tokenizer = load_causal_lm(str(self.base))
        to_device(model)
        return model, tokenizer

    def train(self, task: str, what: SingleLayerConfig | None, rate: float, seed: int, out: Path, *, masters=True):
        """Train, None for every parameter, and save to `out` what the trainer holds: the masters.

        Returns:
            The model, the tokenizer and the mean reward of every step.
        """
        model, tokenizer = self.load()
        if not masters and what is None:
            model.float = lambda: model  # what training all parameters does first, to have float32 masters
        data, setting = task_of(task), self.setting
        recipe = make_recipe("grpo", data, prompts=setting.prompts, completions=setting.completions, learning_rate=rate)
        config = recipe.config(
            output_dir=str(out.parent / f"{out.name}-trainer"),
            seed=seed,
            max_steps=setting.steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        )
        rows = data.rows("train", prompts_needed(recipe.algorithm, config), seed)

        def save(trained: Any) -> None:
            trained.save_pretrained(out)

        result = train_rows(model, tokenizer, recipe, config, rows, layers=what, task=data, at_end=save)
        return result.model, tokenizer, [round(reward, 4) for reward in result.rewards]

    def score(self, model: Any, tokenizer: Any, task: str) -> dict[str, Any]:
        """ "scores" on the test problems of `task` in their order, with "mean" and "standard_error"."""
        data = task_of(task)
        sampling = Sampling(samples=self.setting.samples)
        found = evaluate(model, tokenizer, data, data.rows("test", self.setting.problems, 0), sampling)
        return {"mean": found.mean, "standard_error": found.standard_error, "scores": list(found.scores)}

    def score_of(self, adapter: Path | None, tasks: Sequence[str]) -> dict[str, Any]:
        """The scores of an adapter's folder, None for the base, by task."""
        model, tokenizer = self.load()
        model = model if adapter is None else load_adapter(model, adapter)
        return {task: self.score(model, tokenizer, task) for task in tasks}


def change(bench: Bench, experiment: Experiment, scratch: Path) -> dict[str, Any]:
    """ "runs", one for each seed, and of two seeds "overlap", what they changed in common."""
    runs, folders = [], []
    for seed in experiment.seeds:
        what = None
        if experiment.what == "block":
            dtype = "float32" if experiment.masters else "base"
            what = SingleLayerConfig(layer=bench.middle, master_dtype=dtype, task_type="CAUSAL_LM")
        folders.append(scratch / str(seed))
        model, tokenizer, rewards = bench.train(
            bench.setting.task, what, experiment.rate, seed, folders[-1], masters=experiment.masters
        )
        row = {"seed": seed, "rewards": rewards, **bench.score(model, tokenizer, bench.setting.task)}
        del model
        spectrum = seed == experiment.seeds[0]  # the singular values of a whole model take a minute or two
        runs.append(row | {"change": figures(analyze_change(bench.base, folders[-1], spectrum=spectrum))})
    row = {"runs": runs}
    if len(folders) > 1:
        (pair,) = compare_adapters(folders, base=bench.base).pairs
        row["overlap"] = {k: v for k, v in without_missing_parts(pair).items() if k not in ("a", "b", "tensors")}
    return row


def figures(found: Analysis) -> dict[str, Any]:
    """ "total" and "kinds", each as `GroupChange`, "dtypes" and "summary"."""
    groups = {"total": without_missing_parts(found.total), "kinds": [without_missing_parts(k) for k in found.kinds]}
    return groups | {"dtypes": found.dtypes, "summary": found.summary()}


def subnetwork(bench: Bench, experiment: Experiment, scratch: Path) -> dict[str, Any]:
    """ "base", "full", "subnetwork" and "random": scores, the share of "entries" that train, and the shares that are
    "equal_to_full" within tolerances."""
    sys.path.insert(0, str(SUBNETWORK))
    from subnetwork import TOLERANCES, equal_shares

    task, (seed,) = bench.setting.task, experiment.seeds
    row: dict[str, Any] = {"base": bench.score_of(None, [task])[task]}
    share = 1.0
    for name in ("full", "subnetwork", "random"):
        mask = scratch / f"{name}.safetensors"
        if name == "subnetwork":
            made = make_mask(bench.base, scratch / "full", mask)
            share = made.trained / made.entries
        if name == "random":
            make_mask(bench.base, scratch / "full", mask, random=share, seed=seed)
        what = SingleLayerConfig(layer="all", mask=None if name == "full" else str(mask), task_type="CAUSAL_LM")
        model, tokenizer, rewards = bench.train(task, what, experiment.rate, seed, scratch / name)
        row[name] = {"entries": share, "rewards": rewards, **bench.score(model, tokenizer, task)}
        equal = equal_shares(bench.base, scratch / name, scratch / "full")
        row[name]["equal_to_full"] = dict(zip(map(str, TOLERANCES), equal, strict=True))
        del model
    return row


def combine(bench: Bench, experiment: Experiment, scratch: Path) -> dict[str, Any]:
    """The scores on both tasks of the base, of each task's adapter, and of both by each method, by name."""
    (seed,) = experiment.seeds
    tasks = (bench.setting.task, OTHER[bench.setting.task])
    adapters = []
    for task in tasks:
        adapters.append(scratch / task)
        what = SingleLayerConfig(layer=bench.middle, task_type="CAUSAL_LM")
        bench.train(task, what, experiment.rate, seed, adapters[-1])
    row: dict[str, Any] = {"base": bench.score_of(None, tasks)}
    row |= {f"adapter of {task}": bench.score_of(a, tasks) for task, a in zip(tasks, adapters, strict=True)}
    for method in METHODS:
        found = combine_adapters(adapters, scratch / method, method, base=bench.base, seed=seed)
        about = {"conflict_share": found.conflict_share, "overlaps": found.overlaps, "groups": found.groups}
        row[method] = bench.score_of(scratch / method, tasks) | {k: v for k, v in about.items() if v is not None}
    combine_with_stage_four(
        adapters,
        scratch / "four",
        [str(HERE / f"{task}.py") for task in tasks],
        steps=max(1, bench.setting.steps // 2),
        learning_rate=experiment.rate,
        config={"save_strategy": "no"},
        training_seed=seed,
        chat=False,
        base=bench.base,
    )
    row["cpi, stage four"] = bench.score_of(scratch / "four", tasks)
    return row


def execute_experiment(setting: Setting, experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Make one row; nothing else is left.

    Args:
        folder: of the base model.

    Returns:
        "format", "setting", "experiment", what its kind gives, "cpu_seconds", "seconds" and "versions".
    """
    start, cpu = time.perf_counter(), time.process_time()
    row: dict[str, Any] = {"format": FORMAT, "setting": asdict(setting), "experiment": asdict(experiment)}
    kinds = {"change": change, "subnetwork": subnetwork, "combine": combine}
    with without_progress_bars(), tempfile.TemporaryDirectory() as scratch:
        row |= kinds[experiment.kind](Bench(setting, folder), experiment, Path(scratch))
    row |= {"cpu_seconds": round(time.process_time() - cpu, 1), "seconds": round(time.perf_counter() - start, 1)}
    row["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return row | {"versions": describe_machine()}


def there(experiment: Experiment, row: dict[str, Any]) -> bool:
    return bool(row["experiment"] == json.loads(json.dumps(asdict(experiment))))


@contextmanager
def demo_models() -> Iterator[Path]:
    """A folder with the demo model in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_causal_lm(str(files("peft_onelayer") / "demo_model"))
        for part in (model.bfloat16(), tokenizer):
            part.save_pretrained(Path(folder) / DEMO)
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study_options(parser, STUDIES, "experiment")
    parser.add_argument("--kinds", nargs="+", default=(), choices=("change", "subnetwork", "combine"))
    parser.add_argument("--steps", type=int, help="optimizer steps of a training")
    parser.add_argument("--problems", type=int, help="of the evaluation")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args()
    setting = study_of(parser, options, STUDIES)
    given = {name: value for name in ("steps", "problems") if (value := getattr(options, name)) is not None}
    wanted = [one for one in experiments(setting) if not options.kinds or one.kind in options.kinds]
    with demo_models() if setting.model == DEMO else nullcontext(options.models) as models:
        folder = models / setting.model
        check_model(parser, folder)
        failed = collect(
            options.results / f"{setting.name}-changes.jsonl",
            lambda: wanted,
            there,
            partial(execute_experiment, replace(setting, **given), folder=folder),
            options.minutes,
            options.jobs,
        )
    if failed:
        sys.exit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
