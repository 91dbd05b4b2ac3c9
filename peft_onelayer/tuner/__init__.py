"""The PEFT method. Importing this package enters it into PEFT's mappings.

`peft.utils.register_peft_method` accepts only members of PEFT's own enum, so the entries are made directly.
"""

import peft  # noqa: F401  (waits for a thread that is importing it)

from peft_onelayer.seams import check

check(__name__)  # before the modules below fail at importing what they need

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_onelayer.layers import resolve_layers

from .config import SingleLayerConfig, SingleLayerPeftType
from .layer import SingleLayerLayer
from .model import SingleLayerModel
from .stack import find_decoder_stack

__all__ = [
    "SingleLayerConfig",
    "SingleLayerLayer",
    "SingleLayerModel",
    "SingleLayerPeftType",
    "find_decoder_stack",
    "resolve_layers",
]

PEFT_TYPE_TO_CONFIG_MAPPING[SingleLayerPeftType.SINGLE_LAYER] = SingleLayerConfig
PEFT_TYPE_TO_TUNER_MAPPING[SingleLayerPeftType.SINGLE_LAYER] = SingleLayerModel
PEFT_TYPE_TO_PREFIX_MAPPING[SingleLayerPeftType.SINGLE_LAYER] = SingleLayerModel.prefix
