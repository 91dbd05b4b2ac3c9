"""Reinforcement learning of one block: what TRL lacks for it. TRL itself is loaded by the names that need it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .advantages import gigpo_advantages
    from .cpu_products import use_float32_units
    from .ema import EMAAdapterCallback, EMATeacherMixin
    from .entropy import TopEntropyMixin
    from .gigpo import GiGPOConfig, GiGPOTrainer
    from .packing import packed_prompts
    from .prefix import shared_prefix
    from .prompts import shared_prompts
    from .scored import scored_positions
    from .sync import sync_trained_layer

__all__ = [
    "EMAAdapterCallback",
    "EMATeacherMixin",
    "GiGPOConfig",
    "GiGPOTrainer",
    "TopEntropyMixin",
    "gigpo_advantages",
    "packed_prompts",
    "scored_positions",
    "shared_prefix",
    "shared_prompts",
    "sync_trained_layer",
    "use_float32_units",
]

_MODULES = {
    "EMAAdapterCallback": ".ema",
    "EMATeacherMixin": ".ema",
    "GiGPOConfig": ".gigpo",
    "GiGPOTrainer": ".gigpo",
    "TopEntropyMixin": ".entropy",
    "gigpo_advantages": ".advantages",
    "packed_prompts": ".packing",
    "scored_positions": ".scored",
    "shared_prefix": ".prefix",
    "shared_prompts": ".prompts",
    "sync_trained_layer": ".sync",
    "use_float32_units": ".cpu_products",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)
