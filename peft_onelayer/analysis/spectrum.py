"""The singular values of a change, in float64, of matrices of any size at a bounded cost.

Small matrices are decomposed directly. Of larger ones the eigenvalues of the Gram matrix of the shorter side are taken,
which resolve singular values down to about 1e-6 of the largest: enough for the rank at float32's tolerance. A matrix
whose shorter side is longer than `LIMIT` is measured on `LIMIT` of its rows or columns, evenly spaced. The singular
values of such a part are lower bounds of the whole's, one by one, and so is its rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

LIMIT = 4096  # of the shorter side; its Gram matrix takes 134 MB
DIRECT = 2**20  # entries up to which a matrix is decomposed directly
BLOCK = 2**22  # entries of the change in memory at a time, in float64

Rows = Callable[[int, int], torch.Tensor]  # rows [start, stop) of the change, (stop - start, columns) float64


def singular_values(rows: Rows, shape: tuple[int, int], limit: int = LIMIT) -> tuple[np.ndarray, tuple[int, int]]:
    """The singular values of a matrix that is read by rows.

    Args:
        rows: reads it.
        shape: its rows and columns.
        limit: of the shorter side.

    Returns:
        The values, descending, float64 (min of the measured shape,), and the shape of the part that they are of.
    """
    height, width = shape
    if height * width <= DIRECT and min(shape) <= limit:
        return torch.linalg.svdvals(rows(0, height)).numpy(), shape
    part = min(min(shape), limit)
    kept = np.linspace(0, min(shape) - 1, part).astype(int)  # ascending and distinct
    gram = torch.zeros(part, part, dtype=torch.float64)
    if height >= width:
        chosen = torch.from_numpy(kept)
        step = max(1, BLOCK // width)
        for start in range(0, height, step):
            block = rows(start, min(start + step, height))
            block = block if part == width else block[:, chosen]
            if not block.any():  # the rule in an embedding
                continue
            gram.addmm_(block.T, block)
        measured = (height, part)
    else:
        step = max(1, BLOCK // width * part // height)
        for i in range(0, part, step):
            above = _select(rows, kept[i : i + step])
            for j in range(0, i + 1, step):
                beside = above if i == j else _select(rows, kept[j : j + step])
                product = above @ beside.T
                gram[i : i + step, j : j + step] = product
                gram[j : j + step, i : i + step] = product.T
        measured = (part, width)
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0).sqrt_().numpy()
    values[values < math.sqrt(part * np.finfo(np.float64).eps) * values[0]] = 0.0  # beyond what a Gram matrix resolves
    return values, measured


def numerical_rank(values: np.ndarray, shape: tuple[int, int]) -> int:
    """How many singular values exceed max(shape) * eps * the largest, eps that of float32: the default tolerance of
    `torch.linalg.matrix_rank` of a float32 matrix, as the official code of arXiv 2505.11711 takes it.

    >>> numerical_rank(np.array([1.0, 0.5, 1e-9]), (3, 3))
    2
    """
    return int((values > max(shape) * np.finfo(np.float32).eps * values[0]).sum()) if values.size else 0


def effective_rank(values: np.ndarray) -> float:
    """The exponential of the entropy of the singular values over their sum (Roy and Vetterli, "The effective rank",
    EUSIPCO 2007); 0 where all are 0.

    >>> round(effective_rank(np.array([2.0, 2.0, 0.0])), 6)
    2.0
    """
    positive = values[values > 0]
    if not positive.size:
        return 0.0
    shares = positive / positive.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _select(rows: Rows, indices: np.ndarray) -> torch.Tensor:
    first = int(indices[0])
    return rows(first, int(indices[-1]) + 1)[torch.from_numpy(indices - first)]
