"""Write a plain checkpoint that vLLM serves: python examples/scripts/merging_for_vllm.py [--steps 40] [--out merged]

vLLM loads LoRA adapters only, so the trained block is put into a copy of the base, tensor by tensor from the files:
    vllm serve merged
On a large model: MODEL = "Qwen/Qwen3-1.7B-Base" and task="gsm8k". The same on the command line is `onelayer merge`.
"""

import argparse
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM

from peft_onelayer import merge_into_checkpoint
from peft_onelayer.runs import TrainingSettings, train

MODEL = str(files("peft_onelayer") / "demo_model")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--out", default="merged")
options = parser.parse_args()

adapter = f"{options.out}-adapter"
run = train(TrainingSettings(model=MODEL, task="arithmetic", layer=7, steps=options.steps, out=adapter))
merge_into_checkpoint(MODEL, adapter, options.out)

merged = AutoModelForCausalLM.from_pretrained(options.out).state_dict()
trained = run.model.merge_and_unload().state_dict()
print("equal to the trained model, bit for bit:", all(torch.equal(merged[name], trained[name]) for name in trained))
