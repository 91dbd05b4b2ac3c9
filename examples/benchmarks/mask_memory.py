"""What a mask saves: the memory that training holds for one block, whole and for shares of its entries.

    python examples/benchmarks/mask_memory.py

One block of random weights in Qwen3-0.6B's shape in bfloat16, float32 masters, AdamW. Memory is counted
from the tensors: masters, gradients, the optimizer's state, and the positions of the entries.
"""

import tempfile
from pathlib import Path

import torch
from bench import row
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from peft_onelayer import SingleLayerConfig

SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}


def build(blocks: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=1024, num_hidden_layers=blocks, head_dim=128, tie_word_embeddings=True, **SHAPE)
    return Qwen3ForCausalLM(config).bfloat16()


def measure(share: float | None, folder: Path) -> tuple[int, int]:
    """Entries that train, and bytes that training holds for them after a step."""
    model = build(3)
    if share is not None:
        names = [name for name, _ in model.named_parameters() if ".layers.1." in name]
        save_file({n: torch.rand(model.get_parameter(n).shape) < share for n in names}, folder / "mask.safetensors")
    mask = None if share is None else str(folder / "mask.safetensors")
    model = get_peft_model(model, SingleLayerConfig(layer=1, mask=mask, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    tokens = torch.randint(0, 1024, (1, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    held = [*trained, *(p.grad for p in trained), *(t for s in optimizer.state.values() for t in s.values())]
    held += [buffer for name, buffer in model.named_buffers() if "single_layer_params" in name]
    return sum(p.numel() for p in trained), sum(t.numel() * t.element_size() for t in held)


def main() -> None:
    print("| entries trained | share of the block | memory held | of the whole block's |")
    print("|---|---|---|---|")
    whole = 0
    with tempfile.TemporaryDirectory() as folder:
        for share in (None, 0.5, 0.3, 0.1, 0.05, 0.01):
            entries, held = measure(share, Path(folder))
            whole = whole or held
            name = "all, no mask" if share is None else f"{share:.0%}"
            if share is not None:
                row(f"memory held with a mask of {share:.0%} / without", held / whole, share)
            print(f"| {entries:,} | {name} | {held / 1e6:.0f} MB | {held / whole:.0%} |")


if __name__ == "__main__":
    main()
