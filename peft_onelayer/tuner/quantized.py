"""Quantized base weights: which kinds a trained block may have, and their dense values.

The block that is trained is dequantized into its masters; the base's own tensors stay as they are, so that the base's
output without the adapter does not change.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import nn


def _is_torchao(tensor: torch.Tensor) -> bool:
    return type(tensor).__module__.startswith("torchao.")


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a quantized weight of a supported kind: bitsandbytes 4 or 8 bit, torchao int8."""
    return bool(get_bnb_param_type(tensor)) or (_is_torchao(tensor) and type(tensor).__name__ == "Int8Tensor")


def is_bitsandbytes(own: Iterable[torch.Tensor]) -> bool:
    """Whether a module that has these parameters computes with a packed weight, whose place no dense one can take."""
    return any(get_bnb_param_type(parameter) for parameter in own)


def unsupported_quantization(name: str, tensor: torch.Tensor) -> bool:
    """Whether `tensor`, a parameter or buffer of a block, is quantized in a way that cannot be trained in full."""
    if is_quantized(tensor):
        return False
    if _is_torchao(tensor) or name.endswith("qweight"):  # GPTQ and AWQ pack into buffers of that name
        return True
    return isinstance(tensor, nn.Parameter) and (not tensor.is_floating_point() or tensor.dtype.itemsize < 2)  # float8


def dequantized(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """The values of `module`'s own parameter `tensor` as a plain tensor; the tensor itself where it is not quantized.

    A bitsandbytes weight keeps its shape (out_features, in_features) only in its quantization state.
    `peft.utils.integrations.dequantize_module_weight` would do all of this, but on the CPU it takes an 8-bit module's
    scales away.
    """
    if get_bnb_param_type(tensor):
        return dequantize_bnb_weight(tensor, state=getattr(module, "state", None))
    return tensor.dequantize() if is_quantized(tensor) else tensor
