"""What a GRPO step of one block costs where multiplications cost hardly anything: the calls of PyTorch, TRL and ours.

    python examples/benchmarks/step_calls.py [--steps 5]

A Llama-like model of 30 blocks of width 32 with random weights in bfloat16, block 15, the data and the trainer of
`peers.py`, 8 passes of 8 rows a step. CPU seconds of a step without its generation, and their ratio to plain freezing.
"""

import argparse
import tempfile
import warnings
from importlib.resources import files

import torch
import transformers
from bench import row
from peers import measure, peers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

LAYER, BLOCKS, WIDTH, ROWS = 15, 30, 32, 8
NAMES = ("freezing", "ours, without our calls", "ours", "ours, beta .04, without our calls", "ours, beta .04")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(str(files("peft_onelayer") / "demo_model"))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": BLOCKS}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=1)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name in NAMES:
            step, generation = measure(peers(LAYER)[name], folder, LAYER, given.steps, together=ROWS)
            found[name] = step - generation
            ratio = found[name] / found["freezing"]
            print(f"{name:36} {found[name]:6.2f} s of CPU  {ratio:5.2f} x", flush=True)
            if name != "freezing":
                row(f"a step bound by calls, {name} / freezing", ratio)


if __name__ == "__main__":
    main()
