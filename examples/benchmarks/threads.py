"""What a wrapped block costs in the forward pass, and what threads that share one model get.

A Llama-like model in bfloat16 with one trained block. In turn, pass by pass: the plain model with the adapter merged,
the wrapped model, and the wrapped model with the weights exchanged inside the base's modules for the length of the call
(`torch.func.functional_call`, which two threads cannot do at once). Then passes a second of one to four threads, and
whether every thread's logits equal those of a thread alone.

    python examples/benchmarks/threads.py [--pairs N] [--width N]
"""

import argparse
import statistics
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
from bench import row
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_onelayer import SingleLayerConfig

NUM_LAYERS, BATCH, LENGTH = 4, 2, 16


def build(width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def seconds(model, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    ids = torch.randint(0, 1000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    wrapped, merged = (get_peft_model(build(options.width), SingleLayerConfig(layer=2)).eval() for _ in range(2))
    plain = merged.merge_and_unload()
    exchanged = mock.patch("peft_onelayer.tuner.layer.can_be_copied", lambda module: False)

    print(
        f"{NUM_LAYERS} blocks of width {options.width}, batch {BATCH} x {LENGTH}, one CPU thread a pass, "
        f"{options.pairs} rounds"
    )
    times: dict[str, list[float]] = {"plain": [], "wrapped": [], "exchanged": []}
    for round_ in range(options.pairs + 10):
        one = {"plain": seconds(plain, ids), "wrapped": seconds(wrapped, ids)}
        with exchanged:
            one["exchanged"] = seconds(wrapped, ids)
        for name, value in one.items() if round_ >= 10 else ():
            times[name].append(value)
    for name, other in (("wrapped", "plain"), ("exchanged", "wrapped")):
        ratios = [a / b for a, b in zip(times[name], times[other], strict=True)]
        row(f"a pass {name} / {other}", statistics.median(ratios), 1 if name == "wrapped" else None)
        print(f"{name}/{other}, time of a pass, median: {statistics.median(ratios):.3f}")

    expected = wrapped(input_ids=ids, use_cache=False).logits

    def passes(count: int) -> bool:
        with torch.no_grad():
            runs = [wrapped(input_ids=ids, use_cache=False).logits for _ in range(count)]
        return all(torch.equal(logits, expected) for logits in runs)

    for threads in (1, 2, 4):
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            equal = all(pool.map(passes, [options.pairs // threads] * threads))
        rate = threads * (options.pairs // threads) / (time.perf_counter() - start)
        print(f"{threads} threads: {rate:.0f} passes a second, all bit-equal: {'yes' if equal else 'no'}")


if __name__ == "__main__":
    main()
