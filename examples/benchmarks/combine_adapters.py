"""What `onelayer combine` takes on large adapters: memory and time.

A bfloat16 checkpoint in the shape of Llama 3 8B, cut to a few blocks, is written as a sparse file of zeros, and two
dense float32 adapters of its first blocks with random values. The memory is the peak of a process of its own that does
nothing but one combination, imports included.

    python examples/benchmarks/combine_adapters.py [--blocks 2] [--methods sum slerp ties cpi] [--folder DIR]
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
from analyze_checkpoint import BLOCK, PIECE, shapes, write_checkpoint

from peft_onelayer.adapter.combine import METHODS
from peft_onelayer.adapter.stored import header
from peft_onelayer.sparse.names import TRAINED

EMBEDDINGS, OF_BLOCK = 1.05, 0.436  # GB in bfloat16
PEAK = r"""
import re, sys
from peft_onelayer import combine_adapters
found = combine_adapters(sys.argv[2:4], sys.argv[4], sys.argv[5], base=sys.argv[1])
print(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])  # not getrusage: it starts at the parent's
print(found.conflict_share)
"""


def write_adapter(folder: Path, blocks: int, depth: int, seed: int) -> int:
    """Write a dense float32 adapter of the first `blocks` blocks, random.

    Returns:
        Its bytes.
    """
    folder.mkdir()
    config: dict[str, object] = {"peft_type": "SINGLE_LAYER", "task_type": "CAUSAL_LM", "layer": list(range(blocks))}
    config |= {"layer_indices": list(range(blocks)), "num_layers": depth, "base_model_name_or_path": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = np.random.default_rng(seed)
    names = [(f"model.layers.{i}.{name}", shape) for i in range(blocks) for name, shape in sorted(BLOCK.items())]
    keys = {f"base_model.model.{n.rpartition('.')[0]}{TRAINED}{n.rpartition('.')[2]}": s for n, s in names}
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(header({key: ("F32", shape) for key, shape in keys.items()}))
        for shape in keys.values():
            left = int(np.prod(shape))
            while left:
                count = min(left, PIECE)
                file.write((1e-3 * generator.standard_normal(count, dtype=np.float32)).tobytes())
                left -= count
        return file.tell()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=2, help="that each adapter trains")
    parser.add_argument("--methods", nargs="+", default=["sum", "slerp", "ties", "cpi"], choices=METHODS)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # gigabytes are not left behind
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        write_checkpoint(root / "base", shapes(EMBEDDINGS + arguments.blocks * OF_BLOCK), 0)
        sizes = [write_adapter(root / name, arguments.blocks, arguments.blocks, i) for i, name in enumerate("ab")]
        largest = max(int(np.prod(shape)) for shape in BLOCK.values())
        print(f"two adapters of {sizes[0] / 1e9:.2f} GB; the largest tensor has {largest:,} entries")
        for method in arguments.methods:
            start = time.perf_counter()
            paths = [str(root / name) for name in ("base", "a", "b", method)]
            peak, conflicts = subprocess.check_output(
                [sys.executable, "-c", PEAK, *paths, method], encoding="utf-8"
            ).splitlines()
            seconds = time.perf_counter() - start
            print(f"{method}: peak memory {int(peak) / 1e3:.0f} MB, {seconds:.0f} s, conflicts {float(conflicts):.2%}")
            shutil.rmtree(root / method)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
