"""What can be refused of a sweep's settings at once, as `runs/early.py` does of other commands'."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from peft_onelayer.layers import check_layers
from peft_onelayer.records.files import check_folder
from peft_onelayer.records.locate import check_model_name
from peft_onelayer.records.text import meant
from peft_onelayer.rl.algorithms import load_algorithm
from peft_onelayer.rl.config_fields import check_names
from peft_onelayer.rl.recipe import refuse_fields
from peft_onelayer.runs.early import check_source
from peft_onelayer.runs.inputs import check_blocks, check_weights
from peft_onelayer.runs.settings import check_rate
from peft_onelayer.tasks import Task

from .settings import SWEEP_OPTIONS, SweepSettings

ROWS = "rows"
ENGINES = {"local": "local", "shared": "shared", "ray": "ray_engine", "slurm": "slurm"}  # and their modules
LIBRARIES = {"ray": "ray", "slurm": "submitit"}  # that an engine imports; its extra has the engine's name


def check_sweep(settings: SweepSettings) -> None:
    """Raise ValueError, in one line, for a sweep that cannot be; values in `config` may be texts."""
    _check_regimes(settings)
    _check_rates(settings)
    algorithm = load_algorithm(settings.algorithm)
    if not algorithm.online:
        raise ValueError(
            f"a sweep compares runs by their reward; {settings.algorithm} is offline, choose one such as grpo"
        )
    refuse_fields(settings.config, SWEEP_OPTIONS)
    check_names(algorithm, settings.config, SWEEP_OPTIONS)
    seeds = list(settings.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be one or more different numbers from 0, got {seeds}")
    for name in ("steps", "samples", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    check_problems(settings.problems)
    check_source(settings.task, settings.dataset, settings.reward)
    if settings.layers != "all":
        check_layers(settings.layers)
    check_model_name(settings.model, settings.revision)
    check_weights(settings.model)
    check_blocks(settings.model, settings.layers)


def check_problems(problems: int, task: Task | None = None) -> None:
    """Raise ValueError for fewer than two problems, or a task with fewer to hold out: whatever scored most on one would
    seem the best for certain."""
    if problems < 2:
        raise ValueError(f"problems must be at least 2, got {problems}: of one problem the noise is not known")
    if task is not None and (there := len(task.rows("test", 2, 0))) < 2:
        raise ValueError(
            f"blocks are compared on at least 2 held-out problems, and task {task.name} has {there}; give more rows"
        )


def check_engine(name: str) -> None:
    """Raise ValueError, in one line, for an engine that there is not, or whose library is not installed."""
    if name not in ENGINES:
        near = meant(name, ENGINES)
        raise ValueError(f"engine {name!r} is not known; expected one of {', '.join(ENGINES)}{near}")
    if name in LIBRARIES and importlib.util.find_spec(LIBRARIES[name]) is None:
        raise ValueError(f"engine {name!r} needs {LIBRARIES[name]}: pip install 'peft-onelayer[{name}]'")


def check_target(out: Path) -> None:
    """Raise `TargetError` for a folder that no sweep made."""
    check_folder(out, lambda folder: (folder / ROWS).is_dir())


def _check_rates(settings: SweepSettings) -> None:
    rate = settings.learning_rate
    for value in rate.values() if isinstance(rate, Mapping) else [rate]:
        if value is not None:
            check_rate(value)
    if settings.full_learning_rate is not None:
        check_rate(settings.full_learning_rate, "--full-learning-rate")
    for value in settings.search_learning_rates:
        check_rate(value, "--search-learning-rates")


def _check_regimes(settings: SweepSettings) -> None:
    if not settings.regimes:
        return
    if not settings.search_learning_rates:
        raise ValueError(
            "--regimes compares tuned rates with equal ones: give rates to choose from, such as "
            "--search-learning-rates 1e-6,5e-6,2e-5"
        )
    if settings.full_learning_rate is not None:
        raise ValueError("--regimes has the rate of all parameters tuned; leave --full-learning-rate out")
    if isinstance(settings.learning_rate, Mapping):
        raise ValueError("the regimes need one learning rate for all blocks, and each block has its own")
