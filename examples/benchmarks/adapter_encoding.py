"""Size and speed of the sparse encoding at several densities, beside a plain copy of the dense layer in the same run.

    python examples/benchmarks/adapter_encoding.py [--hidden 2048 --intermediate 6144] [--dtype bfloat16]

The layer has the shapes of a Qwen3 block (the default sizes: Qwen3-1.7B, 50.3M parameters), weights of standard
deviation .02, and at each density so many entries changed: "step" by one or a few units in the last place, as small RL
updates leave them; "any" replaced by unrelated values, for which differences cannot help. Rates are bytes of the dense
layer per second of processor time on one thread, best of three: "encode" and "decode" are the encoding itself, "save"
and "load" also compute and check the digests of base and result and write or read the file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peft_onelayer.sparse.digest import tensor_digest
from peft_onelayer.sparse.encoding import SparseEncoding
from peft_onelayer.sparse.encoding import encode as encode_all
from peft_onelayer.sparse.names import split_key
from peft_onelayer.sparse.tensor import decode_tensor, encode_tensor

DENSITIES = (0.01, 0.05, 0.2, 0.6, 1.0)
Tensors = dict[str, torch.Tensor]


def block(hidden: int, intermediate: int, dtype: torch.dtype) -> Tensors:
    """The tensors of a Qwen3 block with half as many key and value heads as query heads."""
    torch.manual_seed(0)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {f"model.layers.0.{name}.weight": (0.02 * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}


def changed(base: Tensors, density: float, how: str) -> Tensors:
    """`base` with a share `density` of the entries changed."""
    generator = torch.Generator().manual_seed(1)
    result = {}
    for name, weight in base.items():
        move = torch.rand(weight.shape, generator=generator) < density
        if how == "any":
            new = (0.02 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        else:
            bits = weight.view(torch.int16 if weight.itemsize == 2 else torch.int32)
            steps = 1 + (torch.randn(weight.shape, generator=generator).abs() * 0.7).int()
            up = (torch.rand(weight.shape, generator=generator) < 0.5) | (weight == 0)
            new = (bits + torch.where(up, steps, -steps)).to(bits.dtype)
            new = new.view(weight.dtype)
        new = torch.where(new == weight, -weight, new)
        result[name] = torch.where(move, new, weight)
    return result


def best(call: Callable[..., object], *arguments: object, repeats: int = 3) -> float:
    """Seconds of processor time of the fastest run: another process on the machine must not count."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call(*arguments)
        times.append(time.process_time() - start)
    return min(times)


def encode(new: Tensors, base: Tensors) -> Tensors:
    return {key: part for name in base for key, part in encode_tensor(name, new[name], base[name]).items()}


def decode(grouped: dict[str, Tensors], base: Tensors) -> Tensors:
    return {name: decode_tensor(name, grouped[name], weight) for name, weight in base.items()}


def copy(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def parts_by_name(stored: Tensors) -> dict[str, Tensors]:
    grouped: dict[str, Tensors] = {}
    for key, part in stored.items():
        name, suffix = split_key(key)
        grouped.setdefault(name, {})[suffix] = part
    return grouped


def save(new: Tensors, base: Tensors, path: Path) -> SparseEncoding:
    state, encoding = encode_all(((name, new[name], weight) for name, weight in base.items()), {})
    save_file(state, path)
    return encoding


def load(encoding: SparseEncoding, base: Tensors, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        groups, _ = encoding.group(file.keys())
        for name, group in groups.items():
            encoding.restore(name, {suffix: file.get_tensor(key) for suffix, key in group.items()}, base[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=6144)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = block(args.hidden, args.intermediate, getattr(torch, args.dtype))
    dense = sum(weight.nbytes for weight in base.values())
    print(f"dense layer: {sum(weight.numel() for weight in base.values()) / 1e6:.1f}M parameters, {dense:,} bytes")
    print("density  change  bytes/dense  rule    encode  decode    save    load    copy  [GB/s of dense layer]")
    for density in DENSITIES:
        for how in ("step", "any"):
            new = changed(base, density, how)
            stored = encode(new, base)
            grouped = parts_by_name(stored)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "adapter_model.safetensors"
                encoding = save(new, base, path)
                size = path.stat().st_size
                seconds = [
                    best(encode, new, base),
                    best(decode, grouped, base),
                    best(save, new, base, path),
                    best(load, encoding, base, path),
                    best(copy, base),
                ]
            for name, parts in grouped.items():
                restored = decode_tensor(name, parts, base[name])
                assert tensor_digest(restored) == tensor_digest(new[name]), name
            limit = min(1.02, 1.6 * density + 0.02) if density <= 0.25 else 1.02
            rates = "  ".join(f"{dense / s / 1e9:6.2f}" for s in seconds)
            print(f"{density:7.0%}  {how:6}  {size / dense:11.4f}  {limit:.3f}  {rates}", flush=True)


if __name__ == "__main__":
    main()
