"""Train one transformer block with reinforcement learning, as a PEFT method. Importing it registers the method."""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register

if TYPE_CHECKING:
    from .adapter.combine import combine_adapters
    from .adapter.export import export_adapter
    from .adapter.inspection import inspect_adapter
    from .adapter.merge import merge_into_checkpoint
    from .analysis.change import analyze_change
    from .analysis.compare import compare_adapters
    from .analysis.mask import make_mask
    from .analysis.profiles import compare_profiles
    from .hub.local_card import write_card
    from .hub.profiles import load_profile
    from .hub.pull import pull_adapter
    from .hub.push import push_adapter
    from .hub.search import search_adapters
    from .probe.probe import probe_layers
    from .records.ranking import LayerRanking
    from .statistics import rank_correlation
    from .sweep.metric import layer_contribution
    from .sweep.settings import SweepSettings
    from .sweep.sweep import sweep_layers
    from .tasks import load_task
    from .tuner import SingleLayerConfig, SingleLayerModel

__version__ = "0.1.0"
__all__ = [
    "LayerRanking",
    "SingleLayerConfig",
    "SingleLayerModel",
    "SweepSettings",
    "__version__",
    "analyze_change",
    "combine_adapters",
    "compare_adapters",
    "compare_profiles",
    "export_adapter",
    "inspect_adapter",
    "layer_contribution",
    "load_profile",
    "load_task",
    "make_mask",
    "merge_into_checkpoint",
    "probe_layers",
    "pull_adapter",
    "push_adapter",
    "rank_correlation",
    "search_adapters",
    "sweep_layers",
    "write_card",
]

_MODULES = {  # of each name; imported on its first use
    "LayerRanking": ".records.ranking",
    "SingleLayerConfig": ".tuner",
    "SingleLayerModel": ".tuner",
    "SweepSettings": ".sweep.settings",
    "analyze_change": ".analysis.change",
    "combine_adapters": ".adapter.combine",
    "compare_adapters": ".analysis.compare",
    "compare_profiles": ".analysis.profiles",
    "export_adapter": ".adapter.export",
    "inspect_adapter": ".adapter.inspection",
    "layer_contribution": ".sweep.metric",
    "load_profile": ".hub.profiles",
    "load_task": ".tasks",
    "make_mask": ".analysis.mask",
    "merge_into_checkpoint": ".adapter.merge",
    "probe_layers": ".probe.probe",
    "pull_adapter": ".hub.pull",
    "push_adapter": ".hub.push",
    "rank_correlation": ".statistics",
    "search_adapters": ".hub.search",
    "sweep_layers": ".sweep.sweep",
    "write_card": ".hub.local_card",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


register()
