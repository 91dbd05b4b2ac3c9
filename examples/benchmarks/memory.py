"""What training the models of arXiv 2607.01232 holds on a GPU: in full, with LoRA on all linear layers, and one block.

    python examples/benchmarks/memory.py [--rows 8] [--prompt 256] [--completion 3072] [--generated 0] [--only NAME ...]

Computed from configurations alone, on any machine: nothing is downloaded and no number is computed with. Passes of
`rows` rows with checkpointing, a bfloat16 base, AdamW, no KL term, the middle block. "full" keeps float32 weights,
as `onelayer train --full` does, and computes in bfloat16. Completions come from an engine elsewhere, unless `generated`
of them are generated at a time by the trainer.
"""

import argparse
import warnings

import torch
import transformers
from bench import row
from transformers import PretrainedConfig, Qwen2Config, Qwen3Config
from trl import GRPOConfig

from peft_onelayer.runs.memory import Batches, MemoryEstimate, estimate_memory, lora

QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}


def qwen3(width: int, inner: int, blocks: int, heads: int, *, tied: bool) -> PretrainedConfig:
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks}
    return Qwen3Config(num_attention_heads=heads, tie_word_embeddings=tied, dtype=torch.bfloat16, **shape, **QWEN3)


def qwen2(
    width: int, inner: int, blocks: int, heads: int, kv_heads: int, *, tied: bool, vocabulary: int = 151936
) -> PretrainedConfig:
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "vocab_size": vocabulary}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return Qwen2Config(tie_word_embeddings=tied, dtype=torch.bfloat16, **shape, **heads_of)


MODELS = {
    "Qwen3-1.7B-Base": qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B-Base": qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B-Base": qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen2.5-Math-1.5B": qwen2(1536, 8960, 28, 12, 2, tied=True),
    "Qwen2.5-1.5B-Instruct": qwen2(1536, 8960, 28, 12, 2, tied=True),
    "Qwen2.5-3B-Instruct": qwen2(2048, 11008, 36, 16, 2, tied=True),
    "DeepSeek-R1-Distill-Qwen-7B": qwen2(3584, 18944, 28, 28, 4, tied=False, vocabulary=152064),
}


def held(config: PretrainedConfig, given: argparse.Namespace) -> dict[str, MemoryEstimate]:
    """What each way of training holds, by name."""
    arguments = GRPOConfig("unused", use_cpu=True, bf16=True, per_device_train_batch_size=8, num_generations=8)
    batches = Batches(
        rows=given.rows,
        prompt=given.prompt,
        completion=given.completion,
        passes=2,
        generated=given.generated,
        group=8 if given.generated % 8 == 0 else 1,
    )
    ways = {"full": None, "LoRA": lora(), "block": [config.num_hidden_layers // 2]}
    return {name: estimate_memory(config, way, batches, arguments, on_gpu=True) for name, way in ways.items()}


def needed(found: dict[str, MemoryEstimate]) -> float:
    """Bytes of weights, gradients and AdamW's moments of one block over those of everything: 2 of each parameter in
    bfloat16 and 16 of one that trains."""
    full, block = found["full"].trained, found["block"].trained
    return (2 * full + 16 * block) / (16 * full)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 8), ("prompt", 256), ("completion", 3072), ("generated", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(f"GB at the peak (without optimizer state); passes of {given.rows} x ({given.prompt} + {given.completion})")
    print("| model | parameters | one block's | full | LoRA r=16, all linears | one block | block / full |")
    print("|---|---|---|---|---|---|---|")
    known: dict[str, dict[str, MemoryEstimate]] = {}
    for name in given.only:
        config = MODELS[name]
        found = known.setdefault(config.to_json_string(), {}) or held(config, given)
        known[config.to_json_string()] = found
        cells = [
            f"{found[w].peak / 1e9:.1f} ({found[w].peak_without_state / 1e9:.1f})" for w in ("full", "LoRA", "block")
        ]
        ratio = found["block"].peak / found["full"].peak
        row(f"peak of one block / in full, {name}", ratio, needed(found))
        sizes = f"{found['full'].trained / 1e9:.2f}B | {found['block'].trained / 1e6:.1f}M"
        print(f"| {name} | {sizes} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
