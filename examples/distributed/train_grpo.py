"""GRPO on one block of a model, on one process or many: the same script under DDP, FSDP2 and DeepSpeed.

    torchrun --nproc-per-node 2 examples/distributed/train_grpo.py --cpu --steps 4 --out adapter

Without `--model` it trains the embedded demo model. How the model is spread is decided by the launcher and its
configuration file (README.md beside this file); the script only leaves the wrapping to the trainer, and has every
process call `save_model`, which gathers the adapter and writes it from the first one.
"""

import argparse
import os
from importlib.resources import files

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from peft_onelayer import SingleLayerConfig
from peft_onelayer.tasks import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(files("peft_onelayer") / "demo_model"), help="a folder or a Hub id")
    parser.add_argument("--layer", default="middle", help="block to train, as SingleLayerConfig takes it")
    parser.add_argument("--task", default="arithmetic", help="arithmetic or sort")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the demo model's; large models want 5e-6")
    parser.add_argument("--dtype", default="float32", help="the base's; the trained block is float32 anyway")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU (gloo)")
    parser.add_argument("--out", required=True, help="folder of the adapter")
    options = parser.parse_args()
    if options.cpu:
        torch.set_num_threads(1)

    task = load_task(options.task)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    trainer = GRPOTrainer(
        options.model,
        reward_funcs=task.reward,
        args=GRPOConfig(
            output_dir=options.out,
            model_init_kwargs={"dtype": options.dtype},
            use_cpu=options.cpu,
            bf16=options.dtype == "bfloat16" and not options.cpu,
            max_steps=options.steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=task.max_completion_tokens,
            learning_rate=options.learning_rate,
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
        train_dataset=Dataset.from_list(task.rows("train", 32 * options.steps, 0)),
        processing_class=tokenizer,
        peft_config=SingleLayerConfig(layer=options.layer, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(options.out)
    if trainer.accelerator.is_main_process:
        print(f"{os.environ.get('WORLD_SIZE', '1')} processes trained the adapter in {options.out}")


if __name__ == "__main__":
    main()
