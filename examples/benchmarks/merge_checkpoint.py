"""What `onelayer merge` costs beside a plain copy of the same files: time, and memory above one shard.

A sharded bfloat16 checkpoint of random weights in the shape of Llama and a float32 adapter for its middle block are
written to a temporary folder. Then copies and merges are made in turn, each after the same `sync`, and their times
compared pair by pair. The memory is the peak of a process of its own that does nothing but one merge, imports included.

    python examples/benchmarks/merge_checkpoint.py [--gigabytes 0.3] [--shards 4] [--pairs 4] [--folder DIR]
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench import row
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_onelayer.adapter.merge import merge_into_checkpoint

WIDTH, INNER, VOCABULARY = 2048, 6144, 8192  # a block of 110 MB in bfloat16, near that of Qwen3-1.7B
PEAK = r"""
import re, sys
from pathlib import Path
from peft_onelayer.adapter.merge import merge_into_checkpoint
def peak():  # not getrusage: there a child starts at its parent's size
    return re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]
import torch, safetensors.torch  # merging does so itself
before = peak()
merge_into_checkpoint(*sys.argv[1:])
print(before, peak())
"""


def write_checkpoint(folder: Path, gigabytes: float, shards: int) -> int:
    """Write the checkpoint, one shard in memory at a time; returns its number of layers."""
    block = 2 * WIDTH * (4 * WIDTH + 3 * INNER)  # bytes in bfloat16
    layers = max(round(gigabytes * 1e9 / block), shards)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=16,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    names = sorted(shapes, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")])
    per_shard = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * per_shard : (i + 1) * per_shard]
        save_file({name: 0.02 * torch.randn(shapes[name], dtype=torch.bfloat16) for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8"
    )
    return layers


def write_adapter(folder: Path, base: Path, layers: int) -> int:
    """Write a float32 adapter of the middle block; returns the block's bytes in bfloat16."""
    layer = layers // 2
    with torch.device("meta"):
        block = LlamaForCausalLM(LlamaConfig.from_pretrained(base)).model.layers[layer]
    tensors = {}
    for name, parameter in block.named_parameters():
        module, _, leaf = name.rpartition(".")
        key = f"base_model.model.model.layers.{layer}.{module}.single_layer_params.{leaf}"
        tensors[key] = 0.02 * torch.randn(parameter.shape)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "SINGLE_LAYER", "layer": layer, "layer_indices": [layer], "num_layers": layers}
    config |= {"base_model_name_or_path": str(base), "revision": None}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return 2 * sum(t.numel() for t in tensors.values())


def seconds(action, out: Path) -> float:
    os.sync()
    start = time.perf_counter()
    action()
    elapsed = time.perf_counter() - start
    shutil.rmtree(out)
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=0.3)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # gigabytes are not left behind
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        base, adapter, out = root / "base", root / "adapter", root / "out"
        layers = write_checkpoint(base, arguments.gigabytes, arguments.shards)
        block = write_adapter(adapter, base, layers)
        shards = [path.stat().st_size for path in base.glob("*.safetensors")]
        print(f"{sum(shards) / 1e9:.2f} GB in {len(shards)} shards of at most {max(shards) / 1e6:.0f} MB, ", end="")
        print(f"{layers} layers of {block / 1e6:.0f} MB")
        command = [sys.executable, "-c", PEAK, str(base), str(adapter), str(out)]
        before, peak = map(int, subprocess.check_output(command, encoding="utf-8").split())
        shutil.rmtree(out)
        print(f"peak memory: {peak / 1e3:.0f} MB, of which {before / 1e3:.0f} MB after the imports; ", end="")
        print(f"one shard + 300 MB is {max(shards) / 1e6 + 300:.0f} MB")
        actions = {
            "copy": lambda: shutil.copytree(base, out),
            "merge": lambda: merge_into_checkpoint(base, adapter, out),
        }
        pairs = []
        for i in range(arguments.pairs):  # in turns: whoever is second finds other pages in the cache
            took = {name: seconds(actions[name], out) for name in sorted(actions, reverse=i % 2 == 1)}
            pairs.append((took["copy"], took["merge"]))
        for copied, merged in pairs:
            print(f"copy {copied:.2f} s, merge {merged:.2f} s, ratio {merged / copied:.2f}")
        row("merge / copy of a checkpoint", statistics.median(merged / copied for copied, merged in pairs), 1)
        print(f"median ratio {statistics.median(merged / copied for copied, merged in pairs):.2f}")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
