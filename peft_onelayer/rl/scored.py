"""TRL's fused LM head on a CPU, without the positions that no loss asks for.

On a GPU TRL scores the positions with a label. On a CPU it scores every position, prompts too, forward and backward:
with prompts of 43 tokens, completions of 6 and a vocabulary of 49 thousand that is most of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from .hooks import HooksWhileTraining

# What TRL's LM head gives for each token, by trainer; others take all logits.
FUSED = {
    "GRPOTrainer": ("log_probs", "entropy"),
    "RLOOTrainer": ("log_probs", "entropy"),
    "DPOTrainer": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "KTOTrainer": ("log_probs", "entropy", "mean_logits"),
    "SFTTrainer": ("log_probs", "entropy", "is_top1"),
}
BY_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")  # of TRL's output


def scored_positions(trainer: Trainer) -> ScoredPositions:
    """Have TRL's LM head on a CPU start at the first position of a batch that has a label.

    What is scored has the numbers of a smaller batch, and may differ by its rounding. Any model and method; on a GPU
    it changes nothing. Call it before `trainer.train()`.

    Returns:
        What does it, already a callback of the trainer.

    Raises:
        ValueError: it was called for this trainer before.
    """
    return ScoredPositions.of_trainer(trainer)


def fused_outputs(trainer_class: type) -> tuple[str, ...] | None:
    """What a trainer has TRL's LM head give for each token; None where it takes all logits."""
    from trl.trainer import utils

    if not hasattr(utils, "add_fused_lm_head"):
        return None
    return next((FUSED[kind.__name__] for kind in trainer_class.__mro__ if kind.__name__ in FUSED), None)


def check_backbone(model: PreTrainedModel, trainer_class: type) -> None:
    """Raise ValueError for a model whose `base_model`, the part below TRL's LM head, is the whole model.

    Its class names a part that it does not have, as Llama4ForCausalLM and MllamaForCausalLM do.
    """
    if model.base_model is model and fused_outputs(trainer_class) is not None:
        raise ValueError(
            f"TRL's LM head takes the part of a model below its head, which a {type(model).__name__} does not name in "
            f"its base_model_prefix ({model.base_model_prefix!r}), so a {trainer_class.__name__} cannot train it; "
            "choose another model."
        )


class ScoredPositions(HooksWhileTraining):
    """Leaves out what comes before the first label, between the blocks and the LM head, while a trainer trains."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.start = 0  # the first position that is scored in the pass under way

    def hooks(self, args: Any) -> list[Any]:
        if self.decoder is self.model:
            return []
        return [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.decoder.register_forward_hook(self._cut),
            self.model.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        labels = kwargs.get("labels")
        if torch.compiler.is_compiling() or not kwargs.get("fused_lm_head") or kwargs.get("shift_labels") is not None:
            return None
        if model is not self.model or not isinstance(labels, torch.Tensor) or labels.device.type != "cpu":
            return None
        with_label = (labels != -100).any(dim=0).nonzero()
        if len(with_label):
            self.start = max(int(with_label[0]) - 1, 0)  # a position scores the token behind it
        return args, {**kwargs, "labels": labels[:, self.start :]}

    def _cut(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        if self.start and decoder is self.decoder:
            output.last_hidden_state = output.last_hidden_state[:, self.start :]

    def _end(self, model: nn.Module, args: tuple, output: Any) -> None:
        start, self.start = self.start, 0
        for name in BY_TOKEN if start and output is not None else ():
            value = getattr(output, name)
            if value is not None:
                setattr(output, name, torch.nn.functional.pad(value, (start, 0)))
