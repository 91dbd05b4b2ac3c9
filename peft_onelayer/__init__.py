"""Train one transformer block with reinforcement learning, as a PEFT method. Importing it registers the method."""

from .tuner import SingleLayerConfig, SingleLayerModel

__version__ = "0.1.0"
__all__ = ["SingleLayerConfig", "SingleLayerModel", "__version__"]
