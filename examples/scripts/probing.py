"""Rank the blocks before training one: python examples/scripts/probing.py [--steps 60] [--out ranking.json]

`--steps` are those of the run that the block is chosen for; the race spends a share of its tokens.
On a large model: MODEL = "Qwen/Qwen3-1.7B-Base" and task="gsm8k". The same on the command line is `onelayer probe`.
"""

import argparse
from importlib.resources import files

from peft_onelayer.runs import ProbeSettings, probe

MODEL = str(files("peft_onelayer") / "demo_model")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", default="ranking.json")
options = parser.parse_args()

ranking = probe(ProbeSettings(model=MODEL, task="arithmetic", steps=options.steps, out=options.out))
for block in ranking.order[:5]:
    print(f"block {block}: score {ranking.scores[block]}")
print(f"train {ranking.choice} at a learning rate of {ranking.choice_learning_rate}")
print(ranking.fallback or f"the race took {ranking.cost['share']:.0%} of the tokens of one run")
