"""Measure what single blocks gain against full training: python examples/scripts/sweep.py [--steps 20] [--out sweep]

Every run is a row in OUT/rows; a row that is there is not run again, so the same command goes on where it was stopped.
On a large model leave `layers` out, which measures every block, and give engine="ray" or "slurm" to use several GPUs.
"""

import argparse
from importlib.resources import files

from peft_onelayer import SweepSettings, sweep_layers

MODEL = str(files("peft_onelayer") / "demo_model")
LAYERS = [0, 7, 11]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="sweep")
options = parser.parse_args()

settings = SweepSettings(
    model=MODEL,
    task="arithmetic",
    layers=LAYERS,
    steps=options.steps,
    learning_rate=3e-3,
    full_learning_rate=3e-4,  # a rate that suits one block is too high for all of them
    problems=128,
)
profile = sweep_layers(settings, out=options.out)
found = profile.sweep
assert found is not None  # of a profile that a sweep measured
for block in LAYERS:
    print(f"block {block}: C = {found.contribution[block]}, gain {profile.scores[block]:+.4f}")
if found.undefined:
    print(f"C is undefined: {found.undefined}")
