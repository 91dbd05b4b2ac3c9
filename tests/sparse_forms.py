"""Names the forms of the sparse encoding, so that tests can say which of them they saw."""

import torch

from peft_onelayer.sparse.names import POSITIONS

WIDTHS = {torch.uint8: "8", torch.int8: "8", torch.uint16: "16", torch.int16: "16", torch.int32: "32"}


def form(parts: dict[str, torch.Tensor]) -> str:
    """Of a tensor's parts: "dense", "gaps8+ulps8", "bitmap+values", ..."""
    if set(parts) == {"values"}:
        return "dense"
    position = next((p if p == "bitmap" else p + WIDTHS[parts[p].dtype] for p in POSITIONS if p in parts), "all")
    return f"{position}+{'ulps' + WIDTHS[parts['ulps'].dtype] if 'ulps' in parts else 'values'}"
