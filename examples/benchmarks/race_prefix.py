"""What starting at the candidate's block saves a race, and that it changes nothing.

A Llama-like model of 24 blocks of width 256. For a block, the four updates of a race's turn on one batch are timed with
whole passes and with passes that start from the hidden states that enter the block, in turn, and the ratio is taken
pair by pair; also whether the trained weights are bit-equal. The states are kept once for all candidates, and making
them is not timed.

    python examples/benchmarks/race_prefix.py [--pairs N] [--blocks 1 6 12 18 23]
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from bench import row
from transformers import LlamaConfig, LlamaForCausalLM

from peft_onelayer.probe.batch import Batch
from peft_onelayer.probe.updates import Candidate, batch_starting_at, log_probabilities, trained_candidate, update

NUM_LAYERS, WIDTH, BATCH, LENGTH, PROMPT = 24, 256, 16, 64, 16


def turn(model: LlamaForCausalLM, batch: Batch, layer: int) -> tuple[float, list[torch.Tensor]]:
    """Seconds of the four updates, and the weights behind them."""
    candidate = Candidate(layer, 1e-4)
    with trained_candidate(model, candidate) as wrapped:
        start = time.perf_counter()
        update(wrapped, candidate, batch, steps=4, size=BATCH, micro_batch=BATCH)
        seconds = time.perf_counter() - start
    assert candidate.weights is not None
    return seconds, candidate.weights


def needed(layer: int) -> float:
    """Operations of an update that starts at a block over those of a whole one, a forward pass of a block as the unit:
    the gradient of a block's input costs one, so does that of its weights."""
    above = NUM_LAYERS - layer
    return 2 * above / (NUM_LAYERS + above)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 6, 12, 18, 23], help="from the lowest up")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1000, (BATCH, LENGTH))
    generated = torch.ones(BATCH, LENGTH - PROMPT, dtype=torch.bool)
    whole = Batch(ids, torch.ones_like(ids), generated, torch.randn(BATCH))
    with torch.no_grad():
        whole = replace(whole, old_logps=log_probabilities(model, whole))
    print(f"{NUM_LAYERS} blocks of width {WIDTH}, batch {BATCH} x {LENGTH}, one CPU thread")
    print("block   whole   from the block   from/whole (median, min-max)   weights bit-equal")
    started = whole
    for layer in given.blocks:
        started, _ = batch_starting_at(model, started, layer, micro_batch=BATCH)
        assert started.start is not None
        runs = [(turn(model, whole, layer), turn(model, started, layer)) for _ in range(given.pairs)]
        ratios = [part / all_of_it for (all_of_it, _), (part, _) in runs]
        equal = all(torch.equal(x, y) for (_, a), (_, b) in runs for x, y in zip(a, b, strict=True))
        row(f"updates from block {layer} of {NUM_LAYERS} / whole passes", statistics.median(ratios), needed(layer))
        seconds = [statistics.median(run[i][0] for run in runs) for i in (0, 1)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{layer:5}  {seconds[0]:5.2f} s  {seconds[1]:13.2f} s   {spread:>28}   {equal!s:>17}")


if __name__ == "__main__":
    main()
