"""Train, look at the adapter, and publish it: python examples/scripts/sharing.py [--steps 40] [--to me/name]

Without --to nothing is sent: it prints what would go up. `huggingface-cli login` or $HF_TOKEN gives the right to send.
On a large model: MODEL = "Qwen/Qwen3-1.7B-Base" and task="gsm8k", and base_model may be left out.
"""

import argparse
from importlib.resources import files

from peft_onelayer import inspect_adapter, push_adapter
from peft_onelayer.runs import TrainingSettings, train

MODEL = str(files("peft_onelayer") / "demo_model")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--out", default="shared")
parser.add_argument("--to", help="repository on the Hub")
options = parser.parse_args()

train(TrainingSettings(model=MODEL, task="arithmetic", layer=7, steps=options.steps, out=options.out))
found = inspect_adapter(options.out, MODEL)
print(f"block {found.layers}, {found.bytes:,} bytes, {found.density:.0%} of the entries changed")
push = push_adapter(
    options.out, options.to or "me/one-block", base_model="me/demo-model", license="apache-2.0", dry_run=not options.to
)
print(
    "sent" if options.to else "would send",
    *(f"{name} ({size:,} bytes)" for name, size in push.files.items()),
    sep="\n  ",
)
