"""Specifications on the embedded demo model, small enough for a test."""

from importlib.resources import files

from peft_onelayer.records.files import model_digests
from peft_onelayer.sweep.run_layer import RunSpec

DEMO = str(files("peft_onelayer") / "demo_model")
SETTINGS = {
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "temperature": 1.0,
    "beta": 0.0,
    "gradient_checkpointing": False,
    "learning_rate": 3e-3,
}


def demo_spec(layer, **changes):
    fields = {"steps": 2, "seed": 0, "settings": SETTINGS, "problems": 16, "samples": 2} | changes
    return RunSpec(DEMO, "arithmetic", layer, "grpo", model_digests=model_digests(DEMO), **fields)
