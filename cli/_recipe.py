"""The algorithm and settings of a run to come, from the options of a command that does not run it itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_onelayer.rl.algorithms import Algorithm
    from peft_onelayer.rl.training import Recipe
    from peft_onelayer.tasks import Task

LEARNING_RATE = 5e-6  # arXiv 2607.01232, Table 8, for one block and for all


def recipe_of(chosen: Algorithm, task: Task, settings: Sequence[str], owned: Mapping[str, str]) -> Recipe:
    """What `onelayer train` would run with these `--set` options.

    Args:
        owned: fields that have an option of their own, and its name.

    Raises:
        ValueError: a setting that the algorithm's configuration refuses.
    """
    from peft_onelayer.rl.algorithms import build_config
    from peft_onelayer.rl.settings import convert_settings, parse_settings
    from peft_onelayer.rl.training import Recipe, device_settings

    overrides = parse_settings(list(settings))
    defaults = {**device_settings(), "learning_rate": LEARNING_RATE}
    if chosen.completion_length:
        defaults[chosen.completion_length] = task.max_completion_tokens
    build_config(chosen, {**defaults, "output_dir": "unused"}, overrides, dict(owned))
    return Recipe(chosen, {**defaults, **chosen.settings, **convert_settings(chosen.config_class, overrides)})
