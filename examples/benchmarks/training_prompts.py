"""What a training pass would cost in which the completions of a group share one pass of their prompt.

    python examples/benchmarks/training_prompts.py [--prompts 64 256 1024] [--completion 16] [--group 4] [--pairs 1]

Nothing of the library does so: this is the measurement before building it. A Llama-like model of random float32
weights, 24 blocks of width 512, block 12 trains. The loss is on the completions alone. One way passes whole rows, with
TRL's default of checkpointing and without. The other passes the prompt once, repeats its keys and values for every
completion, with gradients from block 12 up, and passes the completions behind them. CPU seconds of forward and backward
in one thread, in turn; beside the ratio stands that of the multiplications by weights that are needed. The gradients of
both ways are compared.
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
import transformers
from bench import row
from peft import get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from peft_onelayer import SingleLayerConfig

BLOCKS, WIDTH, BLOCK, VOCABULARY = 24, 512, 12, 1000


def build() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
    )
    return get_peft_model(LlamaForCausalLM(config), SingleLayerConfig(layer=BLOCK, task_type="CAUSAL_LM")).train()


def loss(logits: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    """Of completions (G, C) from the logits (G, C, V) of the positions before their tokens."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), completions.flatten())


def whole_rows(model: Any, prompt: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([prompt.expand(len(completions), -1), completions], dim=1)
    logits = model(input_ids=rows, use_cache=False, logits_to_keep=completions.size(1) + 1).logits
    return loss(logits[:, :-1], completions)


def shared_prompt(model: Any, prompt: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    group, cache = len(completions), DynamicCache(config=model.config)
    first = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    cache.batch_repeat_interleave(group)
    rest = model(input_ids=completions[:, :-1], past_key_values=cache, use_cache=True).logits
    return loss(torch.cat([first.expand(group, -1, -1), rest], dim=1), completions)


def seconds(model: Any, way: Any, prompt: torch.Tensor, completions: torch.Tensor) -> tuple[float, torch.Tensor]:
    """CPU seconds of forward and backward, and the gradients."""
    model.zero_grad()
    start = time.process_time()
    way(model, prompt, completions).backward()
    took = time.process_time() - start
    return took, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024], help="tokens")
    parser.add_argument("--completion", type=int, default=16)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model = build()
    passes = (
        BLOCKS + BLOCKS - BLOCK
    )  # forward; back, the gradient of a block's input or, at the trained one, its weights
    print(f"{given.group} completions of {given.completion} tokens, block {BLOCK} of {BLOCKS}, width {WIDTH}")
    print("prompt   whole rows   checkpointed   shared   shared/whole   needed   /checkpointed   needed   difference")
    for length in given.prompts:
        prompt = torch.randint(10, VOCABULARY, (1, length))
        completions = torch.randint(10, VOCABULARY, (given.group, given.completion))
        runs = []
        for _ in range(given.pairs):
            whole, expected = seconds(model, whole_rows, prompt, completions)
            shared, found = seconds(model, shared_prompt, prompt, completions)
            model.gradient_checkpointing_enable({"use_reentrant": False})
            again, _ = seconds(model, whole_rows, prompt, completions)
            model.gradient_checkpointing_disable()
            runs.append((whole, again, shared))
        took = [statistics.median(column) for column in zip(*runs, strict=True)]
        ratios = [statistics.median(run[2] / run[i] for run in runs) for i in (0, 1)]
        tokens = (length + given.group * given.completion) / (given.group * (length + given.completion))
        needed = [tokens, tokens * passes / (passes + BLOCKS - BLOCK)]
        row(f"training pass, prompt of {length} shared / whole rows", ratios[0], needed[0])
        off = float((found - expected).norm() / expected.norm())
        print(
            f"{length:6} {took[0]:10.1f} s {took[1]:12.1f} s {took[2]:6.1f} s {ratios[0]:14.2f} {needed[0]:8.2f} "
            f"{ratios[1]:15.2f} {needed[1]:8.2f} {off:12.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
