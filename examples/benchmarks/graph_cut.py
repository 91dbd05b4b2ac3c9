"""What cutting the graph below the trained block saves, in the setting that TRL's trainers use by default.

A Llama-like model of 24 blocks of width 512, gradient checkpointing on (non-reentrant) and the embeddings' output
marked as requiring grad. For a block, one optimizer step with the cut and one without it are timed in turn and the
ratio is taken pair by pair; also the block forwards of a step, counted, and whether the gradients are bit-equal.

    python examples/benchmarks/graph_cut.py [--pairs N]
"""

import argparse
import statistics
import time
import warnings

import torch
from bench import row
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner.graph_cut import installed_graph_cut
from peft_onelayer.tuner.stack import find_decoder_stack

NUM_LAYERS, WIDTH, BATCH, LENGTH = 24, 512, 4, 64


def build(layer: int, cut: bool) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
    )
    model = get_peft_model(LlamaForCausalLM(config), SingleLayerConfig(layer=layer, task_type="CAUSAL_LM"))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.get_base_model().enable_input_require_grads()  # the hook that the cut makes needless
    installed = installed_graph_cut(find_decoder_stack(model.get_base_model()))
    if not cut and installed is not None:
        installed.remove()
    return model.train()


def step(model: PeftModel, ids: torch.Tensor) -> float:
    """Seconds of one forward and backward pass; the gradients stay."""
    model.zero_grad()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return time.perf_counter() - start


def block_forwards(model: PeftModel, ids: torch.Tensor) -> int:
    """Forward passes of whole blocks in one step, recomputation included; the first submodule of a block counts."""
    count = 0

    def counting(module, args):
        nonlocal count
        count += 1

    blocks = find_decoder_stack(model.get_base_model()).blocks
    handles = [block.get_submodule("self_attn").register_forward_pre_hook(counting) for block in blocks]
    step(model, ids)
    for handle in handles:
        handle.remove()
    return count


def needed(layer: int) -> float:
    """Operations without the cut over those with it, a forward pass of a block as the unit: to run a block again costs
    one, so does the gradient of its input, and that of its weights."""
    above = NUM_LAYERS - layer
    return (3 * NUM_LAYERS + 1) / (NUM_LAYERS + 2 * above)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)  # pairs stay comparable when the machine is busy
    ids = torch.randint(0, 1000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    print(f"{NUM_LAYERS} blocks of width {WIDTH}, batch {BATCH} x {LENGTH}, one CPU thread")
    print("block   with cut   without   without/with (median, min-max)   block forwards   gradients bit-equal")
    for layer in (0, NUM_LAYERS // 2, NUM_LAYERS - 1):
        cut, uncut = build(layer, cut=True), build(layer, cut=False)
        step(cut, ids), step(uncut, ids)
        times = [(step(cut, ids), step(uncut, ids)) for _ in range(pairs)]
        equal = all(
            torch.equal(a.grad, b.grad)
            for a, b in zip(cut.parameters(), uncut.parameters(), strict=True)
            if a.requires_grad
        )
        ratios = sorted(b / a for a, b in times)
        seconds = [statistics.median(pair[i] for pair in times) for i in (0, 1)]
        row(f"step without / with the cut, block {layer} of {NUM_LAYERS}", statistics.median(ratios), needed(layer))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        forwards = f"{block_forwards(cut, ids)} of {block_forwards(uncut, ids)}"
        print(f"{layer:5d} {seconds[0]:8.2f} s {seconds[1]:8.2f} s {ratio:>32} {forwards:>16} {equal!s:>21}")


if __name__ == "__main__":
    main()
