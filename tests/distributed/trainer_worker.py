"""Run on two processes: transformers' Trainer and TRL's SFT and GRPO trainers with a SingleLayerConfig.

Each process is given an output folder of its own, so that what a process other than the first writes is seen.
"""

import os
import sys
from importlib.resources import files
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from tuner.helpers import base_weights, same, wrap

from distributed.launch import end
from distributed.runs import LAYER, copies
from models import build, token_batch
from peft_onelayer import SingleLayerConfig

TOKENIZER = AutoTokenizer.from_pretrained(str(files("peft_onelayer") / "demo_model"))
TEXTS = [f"A{i}+{i + 1}=" for i in range(8)]


def reward(completions, **_):
    """Differs from completion to completion, so that the advantages are not zero."""
    return [float(sum(map(ord, text)) % 17) for text in completions]


def make_trainer(kind: str, folder: Path):
    common = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 2,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "disable_tqdm": True,
    }
    config = SingleLayerConfig(layer=LAYER, task_type="CAUSAL_LM")
    if kind == "trainer":
        rows = [{"input_ids": t, "labels": t} for t in token_batch(16)]
        return Trainer(wrap(build(), layer=LAYER), TrainingArguments(**common), train_dataset=rows)
    if kind == "sft":
        data = Dataset.from_dict({"text": TEXTS * 4})
        arguments = SFTConfig(**common, bf16=False)
        return SFTTrainer(build(), arguments, train_dataset=data, processing_class=TOKENIZER, peft_config=config)
    arguments = GRPOConfig(**common, bf16=False, num_generations=4, max_completion_length=6, beta=0.05)
    data = Dataset.from_dict({"prompt": TEXTS})
    return GRPOTrainer(build(), reward, arguments, data, processing_class=TOKENIZER, peft_config=config)


def outcome(kind: str, folder: Path) -> dict:
    mine = folder / kind / f"process-{os.environ['RANK']}"
    trainer = make_trainer(kind, mine)
    model = trainer.accelerator.unwrap_model(trainer.model)
    before, base = copies(model), base_weights(model)
    trainer.train()
    trainer.save_model(str(mine / "adapter"))
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, copies(model))
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "before": before,
        "weights": everywhere,
        "base_unchanged": same(base_weights(model), base),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {kind: outcome(kind, folder) for kind in ("trainer", "sft", "grpo")}
    if dist.get_rank() == 0:
        torch.save(results, folder / "trainers.pt")
    end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
