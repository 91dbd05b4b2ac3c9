"""Dr. GRPO by `peft_onelayer.runs.train`: python examples/scripts/dr_grpo.py [--steps 40] [--out dr-grpo]

On the command line: onelayer train MODEL --task arithmetic --algorithm dr_grpo --layer 7 --steps 40 --out dr-grpo
On a large model: MODEL = "Qwen/Qwen3-1.7B-Base" and task="gsm8k"; the learning rate is found where none is given.
"""

import argparse
from importlib.resources import files

from peft_onelayer.runs import TrainingSettings, train

MODEL = str(files("peft_onelayer") / "demo_model")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--out", default="dr-grpo")
options = parser.parse_args()

settings = TrainingSettings(
    model=MODEL,
    task="arithmetic",
    algorithm="dr_grpo",
    layer=7,
    steps=options.steps,
    eval_problems=128,
    out=options.out,
)
print(train(settings).results.verdict)
