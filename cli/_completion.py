"""What the shell completes: tasks, algorithms, recipes and fields of `--set`; nothing heavy is imported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

CONFIGS = ("trl/trainer/*_config.py", "trl/experimental/*/*config.py", "transformers/training_args.py")


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
    """Fields of the algorithm's TRL configuration, each with "="; read from the sources, since TRL takes seconds."""
    from peft_onelayer.rl.algorithms import ALGORITHMS

    algorithm = ALGORITHMS.get(context.params.get("algorithm") or "grpo", ALGORITHMS["grpo"])
    config = algorithm.trainer.rpartition(".")[2].removesuffix("Trainer") + "Config"
    return _starting(incomplete, [f"{name}=" for name in sorted(set(_fields(config, dict(_classes()))))])


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for pattern in CONFIGS:
        library, _, rest = pattern.partition("/")
        spec = importlib.util.find_spec(library)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in Path(folder).glob(rest):
                for node in ast.parse(path.read_text(encoding="utf-8")).body:
                    if isinstance(node, ast.ClassDef):
                        yield node.name, node
    from peft_onelayer.rl import __path__ as own

    for node in ast.parse((Path(own[0]) / "gigpo.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            yield node.name, node


def _fields(name: str, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    if name not in classes:
        return
    for statement in classes[name].body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id
    for base in classes[name].bases:
        yield from _fields(base.id if isinstance(base, ast.Name) else getattr(base, "attr", ""), classes)
