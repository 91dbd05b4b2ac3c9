"""Products of half-precision tensors on a CPU that has no instructions for them.

There torch multiplies entry by entry, 4 to 8 times as slowly as in float32. Here operands become float32, a slice at a
time, are multiplied by the float32 units, and the result is rounded once, as the instructions do it: results differ
from torch's by the order of the sum alone.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from peft_onelayer.seams import check

HALVES = (torch.bfloat16, torch.float16)
FEW = 4  # rows; with less, torch's own way reads the second operand once and has little to multiply
COLUMNS = 1024  # of the second operand at a time: they stay in the processor's cache
LARGEST = 2**24  # numbers of a float32 copy of either operand
REPLACEABLE = hasattr(torch.library, "get_kernel")  # from torch 2.9
BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


def use_float32_units(dtype: torch.dtype = torch.bfloat16) -> bool:
    """From now on this process multiplies bfloat16 and float16 tensors on the CPU with its float32 units, if that pays.

    The kernels of torch.mm, addmm, bmm and of attention's gradient on the CPU are replaced; tensors of other dtypes and
    products of fewer than 4 rows go to torch's own. `onelayer` calls it for a base of 10 million parameters and more.

    Args:
        dtype: of the model.

    Returns:
        Whether it did so: not where the CPU has instructions for `dtype`, and not before torch 2.9.
    """
    if pays(dtype):
        replace_kernels()
        return True
    return False


def pays(dtype: torch.dtype) -> bool:
    """Whether to use the float32 units: this CPU lacks the instructions, and torch lets its kernels be replaced."""
    return REPLACEABLE and lacks_instructions(dtype)


def lacks_instructions(dtype: torch.dtype) -> bool:
    """Whether torch multiplies tensors of this dtype entry by entry on this CPU."""
    if dtype not in HALVES or not torch.backends.mkldnn.is_available():
        return False
    mkldnn = torch.ops.mkldnn
    return not (mkldnn._is_mkldnn_bf16_supported if dtype is torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported)()


@functools.cache
def replace_kernels() -> torch.library.Library:
    """Returns:
    What holds the kernels in place.
    """
    check(__name__)
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Oo]verriding a previously registered kernel")
        for name, kernel in (("mm", _mm), ("addmm", _addmm), ("bmm", _bmm), (BACKWARD, _attention_backward)):
            own = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, functools.partial(_without_subclasses, kernel, own), "CPU", with_keyset=True)
    return library


def restore_kernels() -> None:
    """Bring back torch's kernels, if they were replaced."""
    if replace_kernels.cache_info().currsize:
        replace_kernels()._destroy()
        replace_kernels.cache_clear()


def _without_subclasses(kernel: Any, own: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():  # a rounded weight is a plain tensor here
        result = kernel(functools.partial(own.call_boxed, keys), *args, **kwargs)
        return own.call_boxed(keys, *args, **kwargs) if result is None else result


def _mm(own: Any, a: Tensor, b: Tensor) -> Tensor | None:
    return _product(a, b) if _fit(a, b, dims=2) and len(a) >= FEW else None


def _addmm(own: Any, added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    if _fit(a, b, dims=2) and added.dtype == a.dtype and len(a) >= FEW and beta == alpha == 1:
        return _product(a, b, added.expand(len(a), b.shape[1]))
    return None


def _bmm(own: Any, a: Tensor, b: Tensor) -> Tensor | None:
    if not _fit(a, b, dims=3) or a.shape[1] < FEW:
        return None
    if b.stride(0) == 0 < len(b):  # one matrix for all, of which float32 would make copies
        return _product(a.flatten(0, 1), b[0]).view(*a.shape[:2], b.shape[2])
    return own(a.float(), b.float()).to(a.dtype)


def _fit(a: Tensor, b: Tensor, dims: int) -> bool:
    """Whether these are to be multiplied here; what torch refuses is left to torch."""
    same = a.dtype == b.dtype and a.dim() == b.dim() == dims and a.shape[:-2] == b.shape[:-2]
    return a.dtype in HALVES and same and a.shape[-1] == b.shape[-2]


def _attention_backward(own: Any, grad: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...] | None:
    if grad.dtype not in HALVES:
        return None
    args = tuple(a.float() if isinstance(a, Tensor) else a for a in (grad, *args))
    kwargs = {name: a.float() if isinstance(a, Tensor) else a for name, a in kwargs.items()}
    return tuple(gradient.to(grad.dtype) for gradient in own(*args, **kwargs))


def _product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """(n, k) @ (k, m), with (n, m) added, in float32, rounded to the dtype of a."""
    result = a.new_empty(len(a), b.shape[1])
    most = max(FEW, LARGEST // max(1, len(b)))
    for i in range(0, len(a), most):
        rows, part = slice(i, i + most), a[i : i + most].float()
        for j in range(0, b.shape[1], min(most, COLUMNS)):
            columns = slice(j, j + min(most, COLUMNS))
            product = part @ b[:, columns].float()
            result[rows, columns] = product if added is None else product.add_(added[rows, columns])
    return result
