"""Train one transformer block with reinforcement learning, as a PEFT method. Importing it registers the method."""

import importlib
from typing import TYPE_CHECKING, Any

from .tuner import SingleLayerConfig, SingleLayerModel

if TYPE_CHECKING:
    from .probe.ranking import LayerRanking
    from .probe.short_rl import probe_layers

__version__ = "0.1.0"
__all__ = ["LayerRanking", "SingleLayerConfig", "SingleLayerModel", "__version__", "probe_layers"]

_ON_FIRST_USE = {"LayerRanking": ".probe.ranking", "probe_layers": ".probe.short_rl"}  # they need trl and datasets


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name], __name__), name)
