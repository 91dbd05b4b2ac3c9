"""The names of the fields of a TRL configuration, read from the sources: importing the class takes seconds."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path

from .algorithms import Algorithm
from .settings import unknown_field

CONFIGS = ("trl/trainer/*_config.py", "trl/experimental/*/*config.py", "transformers/training_args.py")
OWN = "gigpo.py"


def config_fields(algorithm: Algorithm) -> set[str] | None:
    """The fields of the algorithm's configuration; None where the sources of a class or of a base of it lie elsewhere.

    >>> from peft_onelayer.rl.algorithms import load_algorithm
    >>> {"beta", "epsilon", "learning_rate"} <= config_fields(load_algorithm("grpo"))
    True
    """
    return _fields(algorithm.config_name, dict(_classes()))


def check_names(algorithm: Algorithm, names: Iterable[str], options: Mapping[str, str]) -> None:
    """Raise ValueError for a name that is no field of the algorithm's configuration, with the near ones.

    Args:
        options: fields that an option of the command sets, and the option.
    """
    if names and (known := config_fields(algorithm)) is not None:
        for name in names:
            if name not in known:
                raise unknown_field(algorithm.config_name, known, name, options)


def _classes() -> Iterator[tuple[str, ast.ClassDef]]:
    found = [Path(__file__).with_name(OWN)]
    for pattern in CONFIGS:
        library, _, rest = pattern.partition("/")
        spec = PathFinder.find_spec(library)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found += Path(folder).glob(rest)
    for path in found:
        yield from _classes_of(path)


@functools.cache
def _classes_of(path: Path) -> list[tuple[str, ast.ClassDef]]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [(node.name, node) for node in body if isinstance(node, ast.ClassDef)]


def _fields(name: str, classes: Mapping[str, ast.ClassDef]) -> set[str] | None:
    if name not in classes:
        return None
    found = {
        statement.target.id
        for statement in classes[name].body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    for base in classes[name].bases:
        inherited = _fields(base.id if isinstance(base, ast.Name) else getattr(base, "attr", ""), classes)
        if inherited is None:
            return None
        found |= inherited
    return found
