"""Two tasks on two blocks, put into one adapter: python examples/scripts/combining.py [--steps 40] [--out both]

Adapters of different blocks are stacked; those of one block can be summed, averaged, or joined by SLERP, TIES,
DARE or CPI-FT (docs/sharing.md). On a large model: MODEL = "Qwen/Qwen3-1.7B-Base" and tasks of your own.
"""

import argparse
from importlib.resources import files

from peft_onelayer import combine_adapters
from peft_onelayer.runs import EvaluationSettings, TrainingSettings, evaluate, train

MODEL = str(files("peft_onelayer") / "demo_model")
BLOCKS = {"arithmetic": 7, "sort": 5}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--out", default="both")
options = parser.parse_args()

adapters = []
for task, block in BLOCKS.items():
    adapters.append(f"{options.out}-{task}")
    train(TrainingSettings(model=MODEL, task=task, layer=block, steps=options.steps, out=adapters[-1]))
combine_adapters(adapters, options.out, "stack", base=MODEL)

for task in BLOCKS:
    for adapter in (*adapters, options.out):
        found = evaluate(EvaluationSettings(model=MODEL, adapter=adapter, task=task, problems=128, greedy=False))
        if gain := found.results["sampled"].difference:
            print(f"{task} with {adapter}: {gain.mean:+.3f}, standard error {gain.standard_error:.3f}")
