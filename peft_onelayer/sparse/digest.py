"""Digests that tell whether two tensors, or two models' configurations, are the same."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Not part of what a model computes: where it was loaded from, by which version, in which dtype (tensors have one), and
# what TRL and tokenizers set on a model in training.
NOT_ARCHITECTURE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
NOT_ARCHITECTURE |= {f"{kind}_token_id" for kind in ("bos", "eos", "pad", "sep", "decoder_start")}


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256, in hexadecimal digits, of a tensor's dtype, shape and bytes (row-major, little-endian).

    >>> import torch
    >>> tensor_digest(torch.zeros(2, dtype=torch.bfloat16)) == tensor_digest(torch.zeros(2, dtype=torch.float16))
    False
    """
    import torch

    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{dtype_name(tensor)} {list(tensor.shape)}\n".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dtype_name(tensor: torch.Tensor) -> str:
    """The name of a tensor's dtype, such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def config_digest(config: Any) -> str:
    """SHA-256, in hexadecimal digits, of the fields of a transformers configuration that differ from its defaults."""
    fields = _architecture(config.to_diff_dict())
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def _architecture(fields: Any) -> Any:
    if not isinstance(fields, dict):
        return fields
    return {str(name): _architecture(value) for name, value in fields.items() if name not in NOT_ARCHITECTURE}
