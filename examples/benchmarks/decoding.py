"""What a wrapped block costs a generation, against the bare base, by CPU time in one process and one thread.

    python examples/benchmarks/decoding.py MODEL [--layer 15] [--rows 1 16 64] [--tokens 16] [--pairs 5]

Base and wrapped model generate in turn from the same prompts of 16 tokens, in bfloat16 and in float32. The least time
of each counts, because other work on the machine only adds to it. The wrapped model's masters have moved. The base is
measured as transformers runs it, and with a contiguous input to its LM head, as the wrapped model has it
(`peft_onelayer/tuner/head.py`). On a CPU without instructions for bfloat16 all use the float32 units, which make no
copies of the head either. "tokens" is the part behind the prompt: all tokens less a generation of one.
"""

import argparse
import time
from typing import Any

import torch
import transformers
from bench import row
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import use_float32_units
from peft_onelayer.tuner.head import spare_head_copies


def seconds(model: Any, ids: torch.Tensor, tokens: int) -> float:
    start = time.process_time()
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            disable_compile=True,
        )
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    use_float32_units()
    transformers.logging.set_verbosity_error()
    print("dtype     rows   base (tokens)   wrapped/base: all (tokens)   wrapped/base with that head: all (tokens)")
    for dtype in (torch.bfloat16, torch.float32):
        models = [AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype) for _ in range(3)]
        base, with_head, plain = (model.requires_grad_(False).eval() for model in models)
        spare_head_copies(with_head)
        wrapped = get_peft_model(plain, SingleLayerConfig(layer=given.layer, task_type="CAUSAL_LM")).eval()
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += 1e-4 * torch.randn_like(parameter)
        for rows in given.rows:
            ids = torch.randint(1000, 20000, (rows, 16), generator=torch.Generator().manual_seed(0))
            runs = []
            for _ in range(given.pairs):
                parts = []
                for model in (base, with_head, wrapped):
                    whole, first = seconds(model, ids, given.tokens), seconds(model, ids, 1)
                    parts.append((whole, whole - first))
                runs.append(parts)
            least = [[min(run[model][part] for run in runs) for part in (0, 1)] for model in range(3)]
            ratios = [[least[2][part] / least[base][part] for part in (0, 1)] for base in (0, 1)]
            row(f"wrapped / base with that head, {rows} rows, {str(dtype)[6:]}", ratios[1][0], 1)
            print(
                f"{str(dtype)[6:]:9} {rows:4} {least[0][0]:6.2f} s ({least[0][1]:.2f})"
                f" {ratios[0][0]:20.3f} ({ratios[0][1]:.3f}) {ratios[1][0]:30.3f} ({ratios[1][1]:.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
