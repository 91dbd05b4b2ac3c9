"""What the shell completes: tasks, algorithms, recipes and fields of `--set`; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import typer


def tasks(incomplete: str) -> list[str]:
    from peft_onelayer.tasks import TASKS

    return _starting(incomplete, [*TASKS, *map(str, Path().glob("*.py"))])


def algorithms(incomplete: str) -> list[str]:
    from peft_onelayer.rl.algorithms import ALGORITHMS

    return _starting(incomplete, ALGORITHMS)


def recipes(incomplete: str) -> list[str]:
    from peft_onelayer.runs.recipes import recipe_names

    return _starting(incomplete, recipe_names())


def fields(context: typer.Context, incomplete: str) -> list[str]:
    """Fields of the algorithm's TRL configuration, each with "="."""
    from peft_onelayer.rl.algorithms import ALGORITHMS
    from peft_onelayer.rl.config_fields import config_fields

    algorithm = ALGORITHMS.get(context.params.get("algorithm") or "grpo", ALGORITHMS["grpo"])
    return _starting(incomplete, [f"{name}=" for name in sorted(config_fields(algorithm) or ())])


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
