"""What `onelayer analyze` takes on a pair of large checkpoints: memory and time.

Two bfloat16 checkpoints in the shape of Llama 3 8B are written to a temporary folder as sparse files: where nothing is
written, the file system holds nothing and gives zeros. In the second one every tensor of the first blocks is random.
The memory is the peak of a process of its own that does nothing but one analysis, imports included.

    python examples/benchmarks/analyze_checkpoint.py [--gigabytes 8] [--changed 1] [--no-spectrum] [--folder DIR]
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH, INNER, KEYS, VOCABULARY = 4096, 14336, 1024, 128256
BLOCK = {
    "input_layernorm.weight": (WIDTH,),
    "mlp.down_proj.weight": (WIDTH, INNER),
    "mlp.gate_proj.weight": (INNER, WIDTH),
    "mlp.up_proj.weight": (INNER, WIDTH),
    "post_attention_layernorm.weight": (WIDTH,),
    "self_attn.k_proj.weight": (KEYS, WIDTH),
    "self_attn.o_proj.weight": (WIDTH, WIDTH),
    "self_attn.q_proj.weight": (WIDTH, WIDTH),
    "self_attn.v_proj.weight": (KEYS, WIDTH),
}
PIECE = 2**22  # entries written at a time
PEAK = r"""
import re, sys
from peft_onelayer import analyze_change
def peak():  # not getrusage: there a child starts at its parent's size
    return re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]
found = analyze_change(sys.argv[1], sys.argv[2], spectrum=sys.argv[3] == "True")
print(peak(), found.total.changed, found.total.entries, found.summary(), sep="\n")
"""


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of about this size, by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    block = 2 * sum(map(np.prod, BLOCK.values()))
    for i in range(max(1, round((gigabytes * 1e9 - 2 * VOCABULARY * WIDTH) / block))):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in BLOCK.items()}
    return found


def write_checkpoint(folder: Path, tensors: dict[str, tuple[int, ...]], changed: int) -> None:
    """Write a checkpoint of zeros, but for random values in the first `changed` blocks."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "none_of_transformers"}', encoding="utf-8")
    offsets, end = {}, 0
    for name, shape in tensors.items():
        offsets[name] = (end, end + 2 * int(np.prod(shape)))
        end = offsets[name][1]
    header = {n: {"dtype": "BF16", "shape": s, "data_offsets": offsets[n]} for n, s in tensors.items()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, (start, stop) in offsets.items():
            if any(name.startswith(f"model.layers.{i}.") for i in range(changed)):
                file.seek(8 + len(text) + start)
                for first in range(start, stop, 2 * PIECE):
                    count = min(2 * PIECE, stop - first) // 2
                    values = (0.02 * generator.standard_normal(count, dtype=np.float32)).view(np.uint32)
                    file.write((values >> 16).astype(np.uint16).tobytes())  # bfloat16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of each checkpoint")
    parser.add_argument("--changed", type=int, default=1, help="blocks that the second one changed")
    parser.add_argument("--no-spectrum", dest="spectrum", action="store_false")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # gigabytes are not left behind
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        tensors = shapes(arguments.gigabytes)
        for name, changed in (("base", 0), ("other", arguments.changed)):
            write_checkpoint(root / name, tensors, changed)
        size = (root / "base" / "model.safetensors").stat().st_size
        print(f"two checkpoints of {size / 1e9:.2f} GB, {len(tensors)} tensors, {arguments.changed} blocks changed")
        start = time.perf_counter()
        command = [sys.executable, "-c", PEAK, str(root / "base"), str(root / "other"), str(arguments.spectrum)]
        peak, changed, entries, summary = subprocess.check_output(command, encoding="utf-8").splitlines()
        print(f"peak memory {int(peak) / 1e3:.0f} MB, {time.perf_counter() - start:.0f} s, imports included")
        print(f"{changed} of {entries} entries changed: {summary}")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
