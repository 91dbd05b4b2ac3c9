"""GiGPO on one block of an agent for text games: python examples/scripts/gigpo_agent.py [--steps 6] [--out agent]

It needs `pip install 'peft-onelayer[tasks]'`, and a clone for the small agent. GiGPO also credits single moves.
On a large model: MODEL = "Qwen/Qwen3-1.7B" and task="textworld"; a game of your own is a Python file (docs/tasks.md).
"""

import argparse
from pathlib import Path

from peft_onelayer.runs import TrainingSettings, train

MODEL = str(Path(__file__).parents[1] / "textworld" / "model")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--out", default="agent")
options = parser.parse_args()

settings = TrainingSettings(
    model=MODEL,
    task="textworld:tiny",
    algorithm="gigpo",
    layer=6,
    steps=options.steps,
    learning_rate=2e-3,
    eval_problems=16,
    out=options.out,
)
results = train(settings).results
print("score of the first and the last step:", results.rewards[0], results.rewards[-1])
print(results.verdict)
