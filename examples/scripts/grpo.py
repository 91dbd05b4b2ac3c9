"""GRPO on one block with TRL's own trainer: python examples/scripts/grpo.py [--steps 40] [--out my-adapter]

On a large model: MODEL = "Qwen/Qwen3-1.7B-Base", task "gsm8k", layer 14, bf16=True, on a GPU, and a learning rate
of 5e-6 or higher (docs/runs.md says how one is found).
"""

import argparse
from importlib.resources import files

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from peft_onelayer import SingleLayerConfig, load_task
from peft_onelayer.rollouts import evaluate, paired_difference

MODEL = str(files("peft_onelayer") / "demo_model")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--out", default="my-adapter")
options = parser.parse_args()

task = load_task("arithmetic")
config = GRPOConfig(
    f"{options.out}-checkpoints",
    max_steps=options.steps,
    learning_rate=3e-3,
    per_device_train_batch_size=64,  # 8 prompts x 8 completions
    num_generations=8,
    max_completion_length=task.max_completion_tokens,
    bf16=False,
    report_to="none",
    save_strategy="no",
)
rows = Dataset.from_list(task.rows("train", 8 * options.steps, 0))
trainer = GRPOTrainer(MODEL, task.reward, config, rows, peft_config=SingleLayerConfig(layer=7))
trainer.train()
trainer.model.save_pretrained(options.out)

problems = task.rows("test", 128, 0)
trained = evaluate(trainer.model, trainer.processing_class, task, problems)
with trainer.model.disable_adapter():
    base = evaluate(trainer.model, trainer.processing_class, task, problems)
gain, error = paired_difference(trained, base)
print(f"held-out reward {base.mean:.3f} -> {trained.mean:.3f}: {gain:+.3f}, standard error {error:.3f}")
