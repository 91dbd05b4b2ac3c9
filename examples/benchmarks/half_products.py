"""What bfloat16 costs on a CPU: torch's own kernels and the float32 units (`use_float32_units`), against float32.

A model of SmolLM2-135M's shape with random weights, one CPU thread: a forward pass, a training step of the middle block
and the decoding of some rows, in turn in each of the three ways. On a CPU with instructions for bfloat16 torch's own
kernels are the ones to use, and this says by how much.

    python examples/benchmarks/half_products.py [--rows N] [--length N] [--pairs N]
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from bench import row
from transformers import LlamaConfig, LlamaForCausalLM

from peft_onelayer.rl import cpu_products

BLOCK = 15


def build(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    model.model.layers[BLOCK].requires_grad_()
    return model


def cpu_seconds(work: Callable[[LlamaForCausalLM], object], model: LlamaForCausalLM) -> float:
    start = time.process_time()
    work(model)
    return time.process_time() - start


def works(ids: torch.Tensor) -> dict[str, Callable[[LlamaForCausalLM], object]]:
    @torch.no_grad()
    def forward(model):
        model(input_ids=ids, logits_to_keep=8)

    def step(model):
        model(input_ids=ids, logits_to_keep=8).logits.float().logsumexp(-1).mean().backward()

    @torch.no_grad()
    def decode(model):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)

    return {"forward pass": forward, "training step of one block": step, "generation of 8 tokens": decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    whole, half = build(torch.float32), build(torch.bfloat16)
    ids = torch.randint(0, 49152, (options.rows, options.length), generator=torch.Generator().manual_seed(0))
    lacking = cpu_products.lacks_instructions(torch.bfloat16)
    print(f"{options.rows} rows of {options.length} tokens; this CPU {'lacks' if lacking else 'has'} the instructions")
    for what, work in works(ids).items():
        seconds: dict[str, list[float]] = {"float32": [], "torch": [], "units": []}
        for _ in range(options.pairs):
            seconds["float32"].append(cpu_seconds(work, whole))
            seconds["torch"].append(cpu_seconds(work, half))
            cpu_products.replace_kernels()
            seconds["units"].append(cpu_seconds(work, half))
            cpu_products.restore_kernels()
        took = {name: statistics.median(values) for name, values in seconds.items()}
        print(f"{what}: " + ", ".join(f"{name} {value:.2f} s" for name, value in took.items()))
        row(f"{what}, bfloat16 by torch / float32", took["torch"] / took["float32"])
        row(f"{what}, bfloat16 by the float32 units / float32", took["units"] / took["float32"], 1.0)


if __name__ == "__main__":
    main()
