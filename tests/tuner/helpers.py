"""What the tests of the tuner share: wrapping a tiny model, moving its adapter, comparing bit for bit."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from models import FAMILIES, build, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner import SingleLayerLayer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHOWN = {("Qwen3", torch.float32), ("Gemma3Text", torch.float16), ("Qwen2", torch.bfloat16)}
CASES = [
    pytest.param(
        family,
        dtype,
        id=f"{family}-{str(dtype).removeprefix('torch.')}",
        marks=[] if (family, dtype) in SHOWN else [pytest.mark.more],
    )
    for family in FAMILIES
    for dtype in DTYPES
]


def wrap(model: nn.Module | None = None, *, layer: int | str | list[int] = 2, **config) -> PeftModel:
    """`model` (default: a tiny Qwen3) with a fresh adapter."""
    return get_peft_model(build() if model is None else model, SingleLayerConfig(layer=layer, **config))


def base_name(name: str) -> str:
    """The name a parameter has in the unwrapped model."""
    name = re.sub(r"\.single_layer_params\.\w+", "", name)
    return name.replace(".base_layer", "").removeprefix("base_model.model.")


def masters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's parameters, by their name in the unwrapped model."""
    marker = f".single_layer_params.{adapter}."
    return {base_name(name): p for name, p in model.named_parameters() if marker in name}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters that are not an adapter's, by their name in the unwrapped model."""
    named = model.named_parameters(remove_duplicate=False)
    return {base_name(n): p.detach().clone() for n, p in named if "single_layer_params" not in n}


def tuner_layers(model: nn.Module) -> list[SingleLayerLayer]:
    return [module for module in model.modules() if isinstance(module, SingleLayerLayer)]


def move(model: nn.Module, adapter: str = "default", seed: int = 1, scale: float = 0.05) -> dict[str, torch.Tensor]:
    """Change every tensor of the adapter, by amounts too small for half precision too, and return copies of them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in masters(model, adapter).values():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return {name: p.detach().clone() for name, p in masters(model, adapter).items()}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(token_batch()).logits


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit, in names, dtypes and values."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def train(model: nn.Module, steps: int = 3, learning_rate: float = 1e-2) -> None:
    """A few AdamW steps on the parameters that require grad."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for step in range(steps):
        tokens = token_batch(seed=step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
