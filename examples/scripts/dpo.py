"""DPO on one block from graded completions: python examples/scripts/dpo.py [--steps 60] [--out dpo]

The model answers the task's problems, the reward grades the answers, and right and wrong ones of a problem become
pairs. With your own pairs give dataset="pairs.jsonl" (prompt, chosen, rejected) in place of task and pairs_from_task.
On a large model: MODEL = "Qwen/Qwen3-1.7B" and task="gsm8k".
"""

import argparse
from importlib.resources import files

from peft_onelayer.runs import TrainingSettings, train

MODEL = str(files("peft_onelayer") / "demo_model")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", default="dpo")
options = parser.parse_args()

settings = TrainingSettings(
    model=MODEL,
    task="arithmetic",
    algorithm="dpo",
    pairs_from_task=256,
    layer=7,
    steps=options.steps,
    learning_rate=1e-3,
    eval_problems=256,
    out=options.out,
)
results = train(settings).results
print(f"loss {results.losses[0]:.3f} -> {results.losses[-1]:.3f}")
print(results.verdict)
