"""Stands in for the hub's FlashAttention 3 kernel, which runs on a GPU only: the same function in plain PyTorch."""

from itertools import pairwise
from types import SimpleNamespace

import torch


def get_kernel(name: str, version: int) -> SimpleNamespace:
    return SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)


def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window_size):
    """q (Q, H, D); k, v (K, H_kv, D); the queries of a sequence are its last ones."""
    assert causal and window_size == (-1, -1)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outputs = []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * softmax_scale
        visible = torch.ones(b - a, d - c, dtype=torch.bool).tril(diagonal=int((d - c) - (b - a)))
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v[c:d]))
    return torch.cat(outputs)
