"""One GRPO run on a task: TRL's trainer, set up the way the demo and the probe need it.

It knows nothing about how the layers were chosen or what becomes of the trained model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from peft_onelayer.tasks import Task
from peft_onelayer.tuner import SingleLayerConfig

PROMPTS_PER_STEP = 24
GENERATIONS_PER_PROMPT = 8
LEARNING_RATE = 3e-3  # for one block of the demo model
WARMUP_STEPS = 5


@dataclass
class RunResult:
    """What a run leaves: the trained model, the mean reward of every step, and what it cost in tokens."""

    model: PeftModel
    rewards: list[float] = field(default_factory=list)
    tokens_generated: int = 0
    tokens_trained: int = 0  # prompts and completions


class _Progress(TrainerCallback):
    """Collects what TRL logs after each step and reports the reward."""

    def __init__(self, on_step: Callable[[int, float], None]) -> None:
        self.on_step = on_step
        self.rewards: list[float] = []
        self.tokens_generated = 0.0

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "reward" in logs:
            self.rewards.append(logs["reward"])
            self.tokens_generated += logs["completions/mean_length"] * PROMPTS_PER_STEP * GENERATIONS_PER_PROMPT
            self.on_step(state.global_step, logs["reward"])


def train_layer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    layer: int | str | list[int],
    *,
    steps: int,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, reward: None,
) -> RunResult:
    """Train `layer` of `model` with on-policy GRPO for `steps` steps of 24 prompts x 8 completions.

    Plain GRPO (arXiv 2402.03300: advantages normalised by the group's standard deviation, no KL term), AdamW without
    weight decay, gradient norm clipped at 1, linear warm-up and linear decay to 0. `model` is wrapped in place; the
    same seed on the same machine gives the same weights.

    Args:
        steps: optimizer steps, at least 1.
        on_step: called after every step with its number and mean reward.
    """
    progress = _Progress(on_step)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model,
            reward_funcs=task.reward,
            args=GRPOConfig(
                output_dir=scratch,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1,
                seed=seed,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,  # the base's own dtype; the trained block is float32 anyway
                gradient_checkpointing=False,
                max_steps=steps,
                per_device_train_batch_size=PROMPTS_PER_STEP * GENERATIONS_PER_PROMPT,
                num_generations=GENERATIONS_PER_PROMPT,
                max_completion_length=task.max_completion_tokens,
                temperature=1.0,
                top_k=0,
                beta=0.0,
                loss_type="grpo",
                scale_rewards="group",
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="linear",
                warmup_steps=min(WARMUP_STEPS, steps - 1),
                adam_beta2=0.99,
                weight_decay=0.0,
                max_grad_norm=1.0,
            ),
            train_dataset=Dataset.from_list(task.rows("train", steps * PROMPTS_PER_STEP, seed)),
            processing_class=tokenizer,
            peft_config=SingleLayerConfig(layer=layer, task_type="CAUSAL_LM"),
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)  # it prints every log to stdout
        trainer.train()
    return RunResult(
        model=trainer.model,
        rewards=progress.rewards,
        tokens_generated=round(progress.tokens_generated),
        tokens_trained=int(trainer.state.num_input_tokens_seen),
    )
