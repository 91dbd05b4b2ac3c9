"""Train one transformer block with reinforcement learning, as a PEFT method. Importing it registers the method."""

import importlib
from typing import TYPE_CHECKING, Any

from .tuner import SingleLayerConfig, SingleLayerModel

if TYPE_CHECKING:
    from peft_onelayer.adapter.export import export_adapter
    from peft_onelayer.adapter.inspection import inspect_adapter
    from peft_onelayer.adapter.merge import merge_into_checkpoint
    from peft_onelayer.hub.profiles import load_profile
    from peft_onelayer.hub.pull import pull_adapter
    from peft_onelayer.hub.push import push_adapter
    from peft_onelayer.hub.search import search_adapters
    from peft_onelayer.probe.probe import probe_layers
    from peft_onelayer.records.ranking import LayerRanking
    from peft_onelayer.sweep.metric import layer_contribution, rank_correlation
    from peft_onelayer.sweep.profile import SweepProfile
    from peft_onelayer.sweep.sweep import sweep_layers

__version__ = "0.1.0"
__all__ = [
    "LayerRanking",
    "SingleLayerConfig",
    "SingleLayerModel",
    "SweepProfile",
    "__version__",
    "export_adapter",
    "inspect_adapter",
    "layer_contribution",
    "load_profile",
    "merge_into_checkpoint",
    "probe_layers",
    "pull_adapter",
    "push_adapter",
    "rank_correlation",
    "search_adapters",
    "sweep_layers",
]

_ON_FIRST_USE = {  # some need trl and datasets
    "LayerRanking": ".records.ranking",
    "SweepProfile": ".sweep.profile",
    "export_adapter": ".adapter.export",
    "inspect_adapter": ".adapter.inspection",
    "layer_contribution": ".sweep.metric",
    "load_profile": ".hub.profiles",
    "merge_into_checkpoint": ".adapter.merge",
    "probe_layers": ".probe.probe",
    "pull_adapter": ".hub.pull",
    "push_adapter": ".hub.push",
    "rank_correlation": ".sweep.metric",
    "search_adapters": ".hub.search",
    "sweep_layers": ".sweep.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name], __name__), name)
