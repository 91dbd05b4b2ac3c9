"""How a generation and a training step of one block grow, one size at a time doubled, by CPU time in one thread.

    python examples/benchmarks/growth.py [--pairs 3]

A Llama-like model of random float32 weights: 12 blocks of width 256, block 6 trains. One prompt of 64 tokens has 8
completions of 32: they are generated with the prompt passed once, and then trained on in one pass with checkpointing.
Every other size is measured in turn with these, and the ratio is taken pair by pair. Beside it stands the ratio of the
multiplications that are needed.
"""

import argparse
import statistics
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from bench import row
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner.prompts import sharing_prompts

VOCABULARY, HEAD = 1000, 64


@dataclass(frozen=True)
class Sizes:
    block: int = 6
    blocks: int = 12
    width: int = 256
    prompt: int = 64
    completion: int = 32
    group: int = 8

    def _block(self, tokens: int, before: float) -> float:
        """A pass of `tokens` through a block, each of which looks at `before` others on average."""
        return tokens * (4 * self.width**2 + 3 * 4 * self.width**2 + 2 * self.width * before)

    def training(self) -> float:
        """Multiplications: all blocks once; from the trained one up once more for checkpointing, and for a gradient,
        of the block's input or, at the trained one, of its weights."""
        length = self.prompt + self.completion
        above = self.blocks - self.block
        head = self.group * length * self.width * VOCABULARY
        return (self.blocks + 2 * above) * self._block(self.group * length, length / 2) + 2 * head

    def generation(self) -> float:
        """Multiplications: the prompt once, then every token but the last through all blocks."""
        decoded, head = self.group * (self.completion - 1), self.group * self.completion * self.width * VOCABULARY
        prompt = self._block(self.prompt, self.prompt / 2)
        return self.blocks * (prompt + self._block(decoded, self.prompt + self.completion / 2)) + head


BASE = Sizes()
GROWN = {
    "block 0 / block 6 of 12": {"block": 0},
    "block 11 / block 6 of 12": {"block": 11},
    "24 / 12 blocks, the middle one": {"blocks": 24, "block": 12},
    "width 512 / 256": {"width": 512},
    "prompt of 256 / 64": {"prompt": 256},
    "completion of 64 / 32": {"completion": 64},
    "group of 16 / 8": {"group": 16},
}


class Measured:
    def __init__(self, sizes: Sizes) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=sizes.width,
            intermediate_size=4 * sizes.width,
            num_hidden_layers=sizes.blocks,
            num_attention_heads=sizes.width // HEAD,
        )
        self.sizes = sizes
        model = LlamaForCausalLM(config)
        self.model: Any = get_peft_model(model, SingleLayerConfig(layer=sizes.block, task_type="CAUSAL_LM"))
        self.prompt = torch.randint(10, VOCABULARY, (1, sizes.prompt))
        self.rows = torch.randint(10, VOCABULARY, (sizes.group, sizes.prompt + sizes.completion))

    def generation(self) -> float:
        self.model.eval()
        ids, tokens = self.prompt.repeat(self.sizes.group, 1), self.sizes.completion
        start = time.process_time()
        with torch.no_grad(), sharing_prompts(self.model):
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
                disable_compile=True,
            )
        return time.process_time() - start

    def training(self) -> float:
        self.model.train()
        self.model.zero_grad()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        start = time.process_time()
        self.model(input_ids=self.rows, labels=self.rows, use_cache=False).loss.backward()
        seconds = time.process_time() - start
        self.model.gradient_checkpointing_disable()
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    base = Measured(BASE)
    print("what grows                       generation   needed   training step   needed")
    for name, changes in GROWN.items():
        sizes = replace(BASE, **changes)
        grown, cells = Measured(sizes), []
        for part in ("generation", "training"):
            getattr(base, part)(), getattr(grown, part)()
            times = [(getattr(base, part)(), getattr(grown, part)()) for _ in range(pairs)]
            ratio = statistics.median(b / a for a, b in times)
            needed = getattr(sizes, part)() / getattr(BASE, part)()
            row(f"{part}, {name}", ratio, needed)
            cells += [ratio, needed]
        print(f"{name:32} {cells[0]:10.2f} {cells[1]:8.2f} {cells[2]:15.2f} {cells[3]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
