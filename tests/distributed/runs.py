"""Short training runs that can be done by one process on a batch, or by two on half of it each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from tuner.helpers import masters, wrap

from models import build, token_batch

LAYER = 2
STEPS = 3
BATCH = 4
CHECKPOINTING = {"plain": None, "non_reentrant": False, "reentrant": True}


def fresh(dtype: torch.dtype = torch.float32, checkpointing: str = "plain"):
    """A tiny Qwen3 of 4 blocks with an adapter on block 2, prepared for training as transformers' Trainer would."""
    model = wrap(build(dtype=dtype), layer=LAYER, task_type="CAUSAL_LM").train()
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
        model.enable_input_require_grads()
    return model


def masked(folder: Path):
    """As `fresh` in float32, but under a mask of about a third of the block's entries, which is written to `folder`."""
    generator = torch.Generator().manual_seed(0)
    named = [(name, p) for name, p in build().named_parameters() if f".layers.{LAYER}." in name]
    masks = {name: torch.rand(parameter.shape, generator=generator) < 0.3 for name, parameter in named}
    save_file({name: mask for name, mask in masks.items() if mask.any()}, folder / "mask.safetensors")
    return wrap(build(), layer=LAYER, task_type="CAUSAL_LM", mask=str(folder / "mask.safetensors")).train()


def train(
    model: nn.Module,
    optimizer_class: type = torch.optim.SGD,
    *,
    forward: Callable[..., Any] | None = None,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    **settings,
) -> list[torch.Tensor]:
    """`STEPS` optimizer steps; each takes `accumulate` batches of `BATCH` rows, of which this process takes its share.

    `forward` is what is called in place of `model` (DDP's wrapper). Returns this process's loss of every batch.
    """
    call = forward or model
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], **{"lr": 0.1, **settings})
    losses = []
    for step in range(STEPS):
        for part in range(accumulate):
            tokens = token_batch(BATCH, seed=10 * step + part).chunk(world)[rank]
            waits = part + 1 < accumulate and hasattr(call, "no_sync")
            with call.no_sync() if waits else nullcontext():
                loss = call(input_ids=tokens, labels=tokens).loss / accumulate
                loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        if step + 1 < STEPS:
            optimizer.zero_grad()
    return losses


def copies(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in masters(model, adapter).items()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in masters(model).items()}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a tensor: |found - expected| / |expected|, in Frobenius norms."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - w).double().norm() / w.double().norm()) for n, w in expected.items())
