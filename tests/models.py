"""Tiny models built from configurations: nothing is downloaded."""

from __future__ import annotations

import torch
import transformers
from torch import nn

FAMILIES = ("Qwen3", "Qwen2", "Llama", "Gemma3Text", "Mistral")


def build(family: str = "Qwen3", *, num_layers: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0, **config):
    """A causal LM of `family` with `num_layers` blocks of width 32 and a vocabulary of 64, randomly initialised."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    torch.manual_seed(seed)
    name = "Gemma3" if family == "Gemma3Text" else family
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))
    for parameter in model.parameters():  # norms start at one and zero-initialised tensors hide mistakes: move them all
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def token_batch(batch: int = 3, length: int = 10, seed: int = 0) -> torch.Tensor:
    """Token ids without special tokens, (batch, length) int64."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def block_parameters(model: nn.Module, index: int) -> dict[str, nn.Parameter]:
    """The parameters of block `index` of an unwrapped transformers model, by their name inside the block."""
    return dict(model.get_decoder().layers[index].named_parameters())
