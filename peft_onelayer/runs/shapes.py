"""Models without numbers: built from a configuration alone, run for the memory that their tensors would take.

Nothing is computed and nothing is allocated. torch's fake tensors have the shapes, dtypes and lifetimes of real ones,
so that what a pass of the real modules holds at its peak is counted, whatever the architecture: the graph that autograd
keeps, checkpointing, the cut below a trained block.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from peft_onelayer.rl.cpu_products import HALVES, lacks_instructions
from peft_onelayer.seams import check


def fake_mode() -> FakeTensorMode:
    """Within, tensors have shapes and no numbers."""
    check(__name__)
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def without_tracebacks() -> Iterator[None]:
    """Without the traceback that torch logs beside an error of what its fake tensors cannot do."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def without_numbers(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors on the CPU in place of a model's meta tensors, shared where those are shared."""
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = tensor, nn.Parameter(empty, tensor.requires_grad) if parameter else empty
        return made[id(tensor)][1]  # the old one is kept, so that its identity is no other's

    with mode:
        for module in model.modules():
            holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            for tensors in holders:
                for name, tensor in list(tensors.items()):
                    if isinstance(tensor, torch.Tensor):
                        tensors[name] = fake(tensor)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered, as long as they live.

    Of what kernels allocate inside one thing counts: on a CPU a batched product in half precision copies a matrix that
    is shared by the batch once for each of its rows. A CPU that lacks the instructions makes no copies.

    Attributes:
        live: bytes now.
        peak: the most there were, since `restart`.
    """

    def __init__(self, known: nn.Module | None = None, *, on_cpu: bool = True) -> None:
        """
        Args:
            known: a model whose own tensors and gradients are not counted.
            on_cpu: whether a CPU's kernels are meant.
        """
        super().__init__()
        self.on_cpu = on_cpu
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        for tensor in [] if known is None else [*known.parameters(), *known.buffers()]:
            for own in (tensor, tensor.grad):
                if own is not None:
                    self._keep(own.untyped_storage(), 0)

    def restart(self) -> int:
        """Look for the peak anew, and return the bytes that live now."""
        self.peak = self.live
        return self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            output = _product_by_group(*args, **(kwargs or {}))
        else:
            output = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, output)
        if func is torch.ops.aten.bmm.default and self.on_cpu:
            shared = [t for t in args if t.dtype in HALVES and t.stride(0) == 0 < t.size(0)]
            copied = [t for t in shared if not lacks_instructions(t.dtype)]
            self.peak = max(self.peak, self.live + sum(t.numel() * t.itemsize for t in copied))
        return output

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._storages.get(id(storage))
        if known is None or known() is not storage:
            self._keep(storage, storage.nbytes())

    def _keep(self, storage: Any, size: int) -> None:
        key = id(storage)

        def freed(reference: weakref.ref) -> None:
            self.live -= size
            if self._storages.get(key) is reference:
                del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _product_by_group(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None) -> torch.Tensor:
    """What the products of a model's experts give, for which torch's fake tensors have bfloat16 alone.

    Rows in groups times a matrix for each, (S, k) and (E, k, m), or the gradient of the matrices, (k, S) and (S, m).
    """
    if a.dim() == b.dim() == 2:
        assert offs is not None
        return a.new_empty(len(offs), len(a), b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])
