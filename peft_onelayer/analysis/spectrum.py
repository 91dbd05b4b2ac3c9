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
BLOCK = 2**21  # entries of the change in memory at a time, in float64

Part = Callable[[int, int], torch.Tensor]  # rows, or columns, [start, stop) of the change, a float64 matrix


def singular_values(
    rows: Part, columns: Part, shape: tuple[int, int], limit: int = LIMIT
) -> tuple[np.ndarray, tuple[int, int]]:
    """The singular values of a matrix that is read in parts.

    Args:
        rows: reads the rows [start, stop), (stop - start, width).
        columns: reads the columns [start, stop), (height, stop - start).
        shape: (height, width).
        limit: of the shorter side.

    Returns:
        The values, descending, float64 (min of the measured shape,), and the shape of the part that they are of.
    """
    height, width = shape
    short, long = min(shape), max(shape)
    if height * width <= DIRECT and short <= limit:
        return torch.linalg.svdvals(rows(0, height)).numpy(), shape
    part = min(short, limit)
    kept = torch.from_numpy(np.linspace(0, short - 1, part).astype(int))  # ascending and distinct
    gram = torch.zeros(part, part, dtype=torch.float64)
    step = max(1, BLOCK // short)
    for start in range(0, long, step):
        stop = min(start + step, long)
        block = rows(start, stop) if height >= width else columns(start, stop).T  # (stop - start, short)
        block = block if part == short else block[:, kept]
        if block.any():  # an embedding changes in few rows
            gram.addmm_(block.T, block)
    del block
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0).sqrt_().numpy()
    values[values < math.sqrt(part * np.finfo(np.float64).eps) * values[0]] = 0.0  # beyond what a Gram matrix resolves
    return values, (long, part) if height >= width else (part, long)


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
