"""What a training pass costs in which the completions of a group share one pass of their prompt (`packed_prompts`).

    python examples/benchmarks/training_prompts.py [--prompts 64 256 1024] [--completion 16] [--group 4] [--pairs 1]

A Llama-like model of random float32 weights, 24 blocks of width 512, block 12 trains, under TRL's LM head. The loss is
on the completions alone. One way passes whole rows, the other packs them, both with TRL's default of checkpointing and
without. CPU seconds of forward and backward in one thread, in turn; beside the ratio stands that of the multiplications
by weights that are needed. The gradients of both ways are compared.
"""

import argparse
import itertools
import statistics
import time
import warnings
from typing import Any

import torch
import transformers
from bench import row
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig
from trl.trainer.utils import add_fused_lm_head

from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl.packing import PackedPrompts
from peft_onelayer.rl.scored import ScoredPositions

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
    base = LlamaForCausalLM(config)
    add_fused_lm_head(base)
    return get_peft_model(base, SingleLayerConfig(layer=BLOCK, task_type="CAUSAL_LM")).train()


def batch(prompt: torch.Tensor, completions: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = torch.cat([prompt.expand(len(completions), -1), completions], dim=1)
    labels = rows.clone()
    labels[:, : prompt.size(1)] = -100
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": labels}


def seconds(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """CPU seconds of forward and backward, and the gradients."""
    model.zero_grad()
    start = time.process_time()
    model(**inputs, fused_lm_head=True).loss.backward()
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
    packed, scored = PackedPrompts(model.get_base_model()), ScoredPositions(model.get_base_model())
    scored.on_train_begin(GRPOConfig("unused", use_cpu=True, bf16=False), None, None)
    print(f"{given.group} completions of {given.completion} tokens, block {BLOCK} of {BLOCKS}, width {WIDTH}")
    print("prompt          checkpointed   whole rows   packed   packed/whole   needed   difference of the gradients")
    for length, checkpointed in itertools.product(given.prompts, (False, True)):
        prompt = torch.randint(10, VOCABULARY, (1, length))
        inputs = batch(prompt, torch.randint(10, VOCABULARY, (given.group, given.completion)))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        runs = []
        for number in range(1 + given.pairs):  # the first compares the rows of a prompt itself
            whole, expected = seconds(model, inputs)
            packed.on_train_begin(GRPOConfig("unused", use_cpu=True, bf16=False), None, None)
            shared, found = seconds(model, inputs)
            packed.remove()
            if number:
                runs.append((whole, shared))
        model.gradient_checkpointing_disable()
        took = [statistics.median(column) for column in zip(*runs, strict=True)]
        ratio = statistics.median(shared / whole for whole, shared in runs)
        needed = (length + given.group * given.completion) / (given.group * (length + given.completion))
        how = "checkpointed" if checkpointed else ""
        row(f"training pass, prompt of {length} packed / whole rows {how}".rstrip(), ratio, needed)
        off = float((found - expected).norm() / expected.norm())
        print(
            f"{length:6} {how:>21} {took[0]:10.1f} s {took[1]:6.1f} s {ratio:14.2f} {needed:8.2f} {off:12.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
