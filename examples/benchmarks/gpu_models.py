"""Models of random weights, tokens and prompts for gpu.py, and the ways of training that it compares."""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from peft_onelayer import SingleLayerConfig

DEMO = Path(str(files("peft_onelayer") / "demo_model"))  # its tokenizer has 17 tokens, one a character
RANK = 16


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        shape: fields of the model's configuration.
        rows, prompt, completion: of a training step.
        decoded: new tokens of a measured generation.
        decoding_rows: of each measured generation.
        group, prompts, new_tokens: of a GRPO step.
        repeats: measurements, after `warm` that do not count.
        grpo_steps: those that count, after one that does not.
    """

    name: str
    shape: dict[str, int]
    rows: int = 8
    prompt: int = 256
    completion: int = 512
    decoded: int = 32
    decoding_rows: tuple[int, ...] = (1, 16, 64)
    group: int = 8
    prompts: int = 8
    new_tokens: int = 128
    repeats: int = 5
    warm: int = 2
    grpo_steps: int = 3
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return self.shape["num_hidden_layers"]

    @property
    def blocks(self) -> tuple[int, int, int]:
        """The first, the middle and the last block."""
        return 0, self.layers // 2, self.layers - 1


def shape(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head: int
) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
    }


QWEN3_1_7B = Sizes("Qwen3-1.7B's shape", shape(151936, 2048, 6144, 28, 16, 8, 128))
SMALL = Sizes("24 blocks of width 512", shape(32000, 512, 2048, 24, 8, 8, 64))
TINY = Sizes(
    "4 blocks of width 32",
    shape(64, 32, 48, 4, 4, 2, 8),
    rows=2,
    prompt=8,
    completion=8,
    decoded=4,
    decoding_rows=(1, 2),
    group=2,
    prompts=2,
    new_tokens=4,
    repeats=1,
    warm=1,
    grpo_steps=1,
)
# For the checks: small, but with matrices as large as the tiles of a GPU's kernels.
CHECKED = shape(64, 256, 512, 6, 4, 2, 64)
CHECKED_TINY = shape(64, 32, 48, 4, 4, 2, 8)


def build(sizes: dict[str, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of random weights, made on the device."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        **sizes,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=16,
    )
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():  # and no buffer: the rotary frequencies stay float32, as in a loaded model
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms start at one, which hides mistakes
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def tokenizer() -> PreTrainedTokenizerBase:
    own = AutoTokenizer.from_pretrained(DEMO)
    own.model_max_length = 4096
    return own


def tokens(rows: int, length: int, device: torch.device, vocabulary: int = 64, seed: int = 0) -> torch.Tensor:
    """(rows, length) int64 without special tokens."""
    ids = torch.randint(17, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    return ids.to(device)


def prompts(number: int, length: int) -> list[str]:
    """Texts of `length` tokens each."""
    generator = torch.Generator().manual_seed(0)
    return ["".join(map(str, torch.randint(0, 10, (length,), generator=generator).tolist())) for _ in range(number)]


def wrapped(model: nn.Module, layer: int | str | list[int], **options: Any) -> PeftModel:
    return get_peft_model(model, SingleLayerConfig(layer=layer, task_type="CAUSAL_LM", **options))


def lora(model: nn.Module, layer: int | None = None) -> PeftModel:
    """LoRA on all linear layers, or on those of one block."""
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    where = (
        {"target_modules": "all-linear"}
        if layer is None
        else {"target_modules": linear, "layers_to_transform": [layer]}
    )
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM", **where))


def freezing(model: Any, layer: int) -> Any:
    """Plain freezing of everything but one block."""
    model.requires_grad_(False)
    model.model.layers[layer].requires_grad_(True)
    return model


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def base_name(name: str) -> str:
    """The name that a parameter has in the unwrapped model."""
    name = re.sub(r"\.single_layer_params\.\w+", "", name)
    return name.replace(".base_layer", "").removeprefix("base_model.model.")


def masters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's parameters, by their names in the unwrapped model."""
    marker = f".single_layer_params.{adapter}."
    return {base_name(name): p for name, p in model.named_parameters() if marker in name}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything that is not an adapter's, by name in the unwrapped model."""
    return {base_name(n): p.detach().clone() for n, p in model.named_parameters() if "single_layer_params" not in n}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def move(model: nn.Module, adapter: str = "default", seed: int = 1, scale: float = 0.05) -> None:
    """Change every tensor of the adapter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in masters(model, adapter).values():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.data += scale * noise


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of the tensors that are not equal bit for bit, in dtype and values, or are in one of the two only."""
    return [
        name
        for name in sorted(a.keys() | b.keys())
        if name not in a or name not in b or a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(run: Callable[[], object], device: torch.device, repeats: int, warm: int) -> dict[str, Any]:
    """Median seconds of `run`, all of them, and the peak of the device's memory meanwhile."""
    for _ in range(warm):
        run()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"seconds": statistics.median(times), "times": [round(t, 5) for t in times], "peak_bytes": peak}
