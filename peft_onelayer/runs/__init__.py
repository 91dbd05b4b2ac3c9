"""A training run, an evaluation and a ranking as library calls: what the commands call.

run = train(TrainingSettings(model="Qwen/Qwen3-1.7B-Base", out="run", task="gsm8k"))
evaluation = evaluate(EvaluationSettings(model="Qwen/Qwen3-1.7B-Base", adapter="run", task="gsm8k"))
"""

import importlib
from typing import TYPE_CHECKING, Any

from .progress import Progress
from .settings import EntropySettings, EvaluationSettings, ProbeSettings, TrainingSettings, VoteSettings

if TYPE_CHECKING:
    from .evaluation import evaluate
    from .forking import entropy
    from .probing import probe
    from .recipes import load_recipe
    from .stage_four import combine_with_stage_four
    from .training import Run, train
    from .voting import vote

__all__ = [
    "EntropySettings",
    "EvaluationSettings",
    "ProbeSettings",
    "Progress",
    "Run",
    "TrainingSettings",
    "VoteSettings",
    "combine_with_stage_four",
    "entropy",
    "evaluate",
    "load_recipe",
    "probe",
    "train",
    "vote",
]

_MODULES = {
    "Run": ".training",
    "combine_with_stage_four": ".stage_four",
    "entropy": ".forking",
    "evaluate": ".evaluation",
    "load_recipe": ".recipes",
    "probe": ".probing",
    "train": ".training",
    "vote": ".voting",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)
