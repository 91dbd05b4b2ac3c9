"""Completions of a model for the rows of a task, with their rewards, and the accuracy that they amount to."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation import Evaluation, evaluate, paired_difference
    from .sampling import Rollout, sample_rollouts
    from .settings import Sampling

__all__ = ["Evaluation", "Rollout", "Sampling", "evaluate", "paired_difference", "sample_rollouts"]

_MODULES = {
    "Evaluation": ".evaluation",
    "Rollout": ".sampling",
    "Sampling": ".settings",
    "evaluate": ".evaluation",
    "paired_difference": ".evaluation",
    "sample_rollouts": ".sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)
