"""A run's settings as YAML: recipes that come with the package, files of one's own, and run.yaml of every run.

A file is flat: options of `onelayer train` by their long name with underscores, and fields of the algorithm's TRL
configuration. Three keys are none of these: `about` says in words what the settings are, `full_learning_rate` takes the
place of `learning_rate` where everything is trained, and `evaluation` has fields of `Sampling` for `onelayer eval`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from peft_onelayer.records.files import read_text
from peft_onelayer.records.privacy import holds_secrets
from peft_onelayer.records.text import one_line
from peft_onelayer.rl.algorithms import Algorithm, load_algorithm
from peft_onelayer.rl.config_fields import config_fields
from peft_onelayer.rl.recipe import COMPLETIONS, PASS_FIELD, PASSES_FIELD, fitting_pass, refuse_fields
from peft_onelayer.rl.settings import NEAR, convert_settings

from .settings import TRAINING_OPTIONS, TrainingSettings

RUN_YAML = "run.yaml"
SUFFIXES = (".yaml", ".yml")
AUTO = "auto"  # as `learning_rate`: one that is found, as where none is given
ABOUT, EVALUATION, FULL_RATE = "about", "evaluation", "full_learning_rate"
# What every option is in a file; None stands for an option that is not given.
OPTIONS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "task", "dataset", "reward", "revision", "out", "algorithm", "method"), (str,)),
    **dict.fromkeys(("report_to", "init_adapter", "keep", "mask", "boost", "system", "prefix_cache"), (str,)),
    **dict.fromkeys(("seed", "steps", "prompts", "completions", "pairs_from_task"), (int,)),
    **dict.fromkeys(("eval_problems", "eval_every", "show", "shots"), (int,)),
    **dict.fromkeys(("learning_rate", "budget", "top_entropy", "prefix_cache_gb"), (float,)),
    **dict.fromkeys(("full", "chat", "trust_remote_code", "unsafe"), (bool,)),
    "layer": (int, str, list),
    "also": (list,),
    "sampling": (dict,),
}
AT_LEAST = {"seed": 0, "steps": 1, "prompts": 1, "completions": 2, "pairs_from_task": 1}
AT_LEAST |= {"eval_problems": 0, "eval_every": 1, "show": 0, "shots": 0}  # as on the command line
# Of two settings that say the same or exclude each other, the one that is given takes the other's place.
REPLACES: dict[str, tuple[str, ...]] = {
    "steps": ("num_train_epochs",),
    "num_train_epochs": ("steps",),
    "task": ("dataset", "reward"),
    "dataset": ("task", "reward"),
    "layer": ("full",),
    "full": ("layer",),
    "prompts": (PASSES_FIELD,),
    PASSES_FIELD: ("prompts",),
    "steps_per_generation": ("generation_batch_size",),
    "generation_batch_size": ("steps_per_generation",),
    "completions": ("num_generations",),
    "num_generations": ("completions",),
}


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, which YAML's own loader overwrites."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"{twice[0]} stands there twice")
        return super().construct_mapping(node, deep)


def recipe_names() -> list[str]:
    """The recipes of the package, such as "qwen3-1.7b-numina:paper"."""
    found = (file.name for file in (files("peft_onelayer") / "recipes").iterdir())
    return sorted(name.removesuffix(".yaml").replace("_", ":") for name in found if name.endswith(".yaml"))


def recipe_or_config(recipe: str | None, config: Path | None, what: str) -> str | Path | None:
    """The one of --recipe and --config that was given.

    Args:
        what: both say, for the message.

    Raises:
        ValueError: both were given, or a --config that is no YAML file.
    """
    if recipe and config:
        raise ValueError(f"--recipe and --config both say {what}; give one of them")
    if config and config.suffix not in SUFFIXES:
        raise ValueError(f"--config takes a YAML file such as run.yaml, got {config}; a recipe's name is --recipe's")
    return recipe or config


def recipe_file(recipe: str | Path) -> Path:
    """The file of a recipe by its name, or by the file itself (.yaml, .yml).

    Raises:
        ValueError: in one line: no such recipe, with the near ones.
    """
    text = str(recipe)
    if text.endswith(SUFFIXES):
        return Path(text).expanduser()
    names = recipe_names()
    if text not in names:
        near = [name for name in names if text.lower() in name] if text else []
        near = near or difflib.get_close_matches(text, names, NEAR, 0.5) or names
        raise ValueError(f"no recipe {text!r}; expected a .yaml file or one of {', '.join(near)}")
    return Path(str(files("peft_onelayer") / "recipes" / f"{text.replace(':', '_')}.yaml"))


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """What a recipe, by its name or its file, holds, by name; values are not checked.

    Raises:
        ValueError: in one line: as `recipe_file`; a file that is not there or no flat YAML.
    """
    path = recipe_file(recipe)
    content = read_text(path)
    try:
        found = yaml.load(content, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} holds no settings; expected lines such as steps: 150")
    return found


def merged(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings with those that a user `given` over them: these win, also over settings they exclude."""
    given = _without_none(given)
    replaced = {other for name in given for other in REPLACES.get(name, ())}
    flat = {name: value for name, value in _without_none(recipe).items() if name not in replaced}
    if isinstance(flat.get("sampling"), dict) and "sampling" in given:
        given["sampling"] = flat["sampling"] | given["sampling"]
    full_rate = flat.pop(FULL_RATE, None)
    flat |= given
    if "steps_per_generation" in flat.keys() - given.keys() and PASSES_FIELD not in flat:
        flat = _with_as_many_updates(recipe, flat)
    if full_rate is not None and flat.get("full") is True and "learning_rate" not in given:
        flat["learning_rate"] = full_rate
    if flat.get("learning_rate") == AUTO:
        del flat["learning_rate"]
    return flat


def _with_as_many_updates(recipe: Mapping[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    """Settings whose prompts took the place of the recipe's step: as many steps are made of a generation as there."""
    try:
        updates = recipe["steps_per_generation"] / recipe[PASSES_FIELD]
        size = int(flat.get("completions") or flat.get("num_generations") or COMPLETIONS)
        each = int(flat["prompts"]) * size // int(os.environ.get("WORLD_SIZE", "1"))
        now = each / int(flat.get(PASS_FIELD) or fitting_pass(each))
        return flat | {"steps_per_generation": math.ceil(updates * now)}
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return flat  # the recipe has no such fields, or one is refused later


def _without_none(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the options that are not given; None is a value of a field of TRL's."""
    return {name: value for name, value in flat.items() if value is not None or name not in OPTIONS}


def load_recipe(recipe: str | Path, **changes: Any) -> TrainingSettings:
    """The settings of a recipe, by its name or its file, with `changes` over them: `load_recipe("run.yaml", out="b")`.

    Args:
        changes: attributes of `TrainingSettings` (but for `config`) and fields of the TRL configuration.

    Raises:
        ValueError: in one line: as `read_recipe`; an unknown name, with near ones; a value of another type; no model or
            no `out`.
    """
    return settings_from(merged(read_recipe(recipe), changes), str(recipe))


def options_from(flat: Mapping[str, Any], where: str) -> TrainingSettings:
    """`settings_from` without a look at TRL, whose import takes seconds: the values of `config` are as they stand.

    Raises:
        ValueError: an option of another type, no model or no `out`, an algorithm that there is not, a name that is no
            option and no field of its TRL configuration.
    """
    own = {name: _option(name, value, where) for name, value in flat.items() if name in OPTIONS and value is not None}
    for name, example in (("model", "onelayer train MODEL"), ("out", "--out run")):
        if name not in own:
            raise ValueError(f"{where} has no {name}; give one, such as {example}")
    fields = {name: value for name, value in flat.items() if name not in (*OPTIONS, ABOUT, EVALUATION, FULL_RATE)}
    algorithm = load_algorithm(own.get("algorithm", "grpo"))
    if fields and (known := config_fields(algorithm)) is not None:
        _check_names(fields, algorithm, known, where)
    if sampling := own.get("sampling"):
        own["sampling"] = _sampling(sampling, where)
    return TrainingSettings(**own, config=fields)


def _check_names(fields: Iterable[str], algorithm: Algorithm, known: set[str], where: str) -> None:
    """Raise ValueError for a name that is no option and, by `known`, no field of the algorithm's configuration."""
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known | OPTIONS.keys()), NEAR)
            meant = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"{where}: {name!r} is no option of onelayer train and no field of {algorithm.config_name}{meant}"
            )


def settings_from(flat: Mapping[str, Any], where: str) -> TrainingSettings:
    """The settings that flat ones are; `where` names their origin in an error.

    Raises:
        ValueError: as `load_recipe`.
    """
    options = options_from(flat, where)
    algorithm, fields = load_algorithm(options.algorithm), options.config
    _check_names(fields, algorithm, {field.name for field in dataclasses.fields(algorithm.config_class)}, where)
    refuse_fields(fields, TRAINING_OPTIONS, where)
    texts = {name: _text(name, value, where) for name, value in fields.items()}
    return replace(options, config=convert_settings(algorithm.config_class, texts, where))


def _sampling(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    from peft_onelayer.rl.sampling import PAIRS_OPTIONS, sampling_from_text

    return sampling_from_text([f"{name}={_text(name, value, where)}" for name, value in fields.items()], PAIRS_OPTIONS)


def _option(name: str, value: Any, where: str) -> Any:
    kinds = OPTIONS[name]
    if kinds == (float,) and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 1e-6 for a text
        except (TypeError, ValueError):
            pass
    right = isinstance(value, kinds) and isinstance(value, bool) == (bool in kinds)
    if isinstance(value, list):
        kind = str if name == "also" else int
        right = right and all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in value)
    if not right or (name in AT_LEAST and value < AT_LEAST[name]):
        words = {int: "a whole number", str: "text", list: "a list of whole numbers", dict: "fields with values"}
        words |= {float: "a number or auto" if name == "learning_rate" else "a number", bool: "true or false"}
        words |= {list: "a list of tasks"} if name == "also" else {}
        least = f" of at least {AT_LEAST[name]}" if name in AT_LEAST else ""
        raise ValueError(f"{where}: {name}: expected {' or '.join(words[k] for k in kinds)}{least}, got {value!r}")
    return value


def _text(name: str, value: Any, where: str) -> str:
    """A value of YAML as `--set` would be given it."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {name}: expected a text, a number, a list or fields, got {value!r}") from None


def recipe_of(settings: TrainingSettings) -> str | None:
    """The YAML that `load_recipe` makes `settings` of again, but for `out` and secrets; None for settings that no text
    can stand for, such as a task that is an object."""
    try:
        plain = _plain_fields(settings)
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        again = _plain_fields(settings_from(merged(yaml.load(text, _Loader), {"out": str(settings.out)}), RUN_YAML))
    except (TypeError, ValueError, yaml.YAMLError):
        return None
    # a list of one may be given as its one value
    same = plain.keys() == again.keys() and all(again[name] in (value, [value]) for name, value in plain.items())
    return text if same else None


def _plain_fields(settings: TrainingSettings) -> dict[str, Any]:
    """The settings that are none of the defaults, but for `out` and secrets, as values of a file."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name not in ("out", "config") and value != default:
            flat[field.name] = list(value) if isinstance(value, tuple) else value
    flat |= {name: value for name, value in settings.config.items() if name not in flat}
    flat = {name: value for name, value in flat.items() if not holds_secrets({name: value})}
    plain: dict[str, Any] = json.loads(json.dumps(flat, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} is no value of a file")


def decoding_of(recipe: str | Path) -> dict[str, Any]:
    """How a recipe evaluates, by field of `Sampling`.

    Raises:
        ValueError: as `read_recipe`; the recipe has no `evaluation`, or one with an unknown field or a wrong value.
    """
    from peft_onelayer.rl.sampling import sampling_from_text

    found = read_recipe(recipe).get(EVALUATION)
    if not isinstance(found, dict):
        raise ValueError(f"{recipe} does not say how to evaluate; it needs evaluation: with fields such as top_p: 0.95")
    return sampling_from_text([f"{name}={_text(name, value, str(recipe))}" for name, value in found.items()])
