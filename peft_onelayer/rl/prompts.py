"""Prompts shared in a trainer's generation: the completions of a group are begun by one pass of their prompt."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import Trainer, TrainerCallback

from peft_onelayer.tuner.prompts import sharing_prompts

from .hooks import while_training


def shared_prompts(trainer: Trainer) -> SharedPrompts:
    """Pass each prompt through the model once for all of its completions, where transformers generates them.

    For trainers that generate with the model they train (`use_vllm=False`), of any method: wrapped, LoRA or in full.
    Call it before `trainer.train()`. Beams, `num_return_sequences` and padded prompts share too. A generation then
    begins with a batch of the prompts that differ in place of one of all rows, so that its first numbers may differ by
    the rounding of another batching; tokens differ where two were as likely as each other.

    Returns:
        What does it, already a callback of the trainer.

    Raises:
        ValueError: it was called for this trainer before.
    """
    prompts = SharedPrompts(trainer.accelerator.unwrap_model(trainer.model))
    while_training(trainer, prompts)
    return prompts


class SharedPrompts(TrainerCallback):
    """Shares the prompts of every generation while a trainer trains."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._open = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()
        self._open.enter_context(sharing_prompts(self.model))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """End sharing."""
        self._open.close()
