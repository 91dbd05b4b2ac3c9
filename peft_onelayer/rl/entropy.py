"""Training on the high-entropy tokens alone, divided as arXiv 2506.01939 does it: by the number of selected tokens.

TRL's `top_entropy_quantile` selects the same tokens, but divides their loss by the number of all active tokens, so that
at a quantile of .2 the policy term is five times smaller. The mixin works with GRPO and GiGPO alike.
"""

from __future__ import annotations

from typing import Any

import torch

from peft_onelayer.seams import check

PER_SEQUENCE = ("grpo", "sapo")  # a mean over the tokens of each sequence, then over sequences
PER_MICRO_BATCH = ("bnpo",)  # a mean over the tokens of one process's micro-batch
PER_BATCH = ("dapo", "cispo", "vespo")  # a sum, divided by the tokens of the batch over all processes


class TopEntropyMixin:
    """`top_entropy_quantile` of `GRPOTrainer` and its subclasses, with the policy term divided by selected tokens.

    Selected are the tokens whose entropy is in the top `top_entropy_quantile` (the paper: .2) of a micro-batch over all
    processes, as TRL selects them. The policy term is divided, by `loss_type`:

    - "grpo", "sapo": of each sequence by its own selected tokens (0 without any), then the mean over the sequences;
    - "bnpo": of a micro-batch by its selected tokens over all processes, then the mean over the micro-batches of an
      optimizer step;
    - "dapo", "cispo", "vespo": as "bnpo", but micro-batches weigh as they have active tokens. As each has the same
      share selected, but for rounding and ties, that is the policy term of the step divided by its selected tokens;
      with one micro-batch exactly so.

    "dr_grpo" and "luspo" divide by no number of tokens. The KL term stays a mean over all active tokens, the entropy
    bonus one over the selected tokens, both as in TRL. With `top_entropy_quantile=1.0` nothing differs from TRL.

    Raises:
        ValueError: when made with `top_entropy_quantile` below 1 and a `loss_type` that divides by no tokens.

    Example:

        ```py
        class Trainer(TopEntropyMixin, GRPOTrainer): ...
        ```
    """

    accelerator: Any
    loss_type: str
    top_entropy_quantile: float

    def __init_subclass__(cls) -> None:
        check(__name__)
        super().__init_subclass__()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        divided = PER_SEQUENCE + PER_MICRO_BATCH + PER_BATCH
        if self.top_entropy_quantile < 1.0 and self.loss_type not in divided:
            raise ValueError(
                f"loss_type={self.loss_type!r} divides by no number of tokens, so that it cannot be the number of "
                f"selected tokens: use one of {', '.join(divided)}"
            )

    # trl 1.16.0, trainer/grpo_trainer.py, GRPOTrainer._compute_loss: get_high_entropy_mask is called once, before
    # inputs["advantages"] is read; its result multiplies the policy term (before the KL term is added) and selects the
    # tokens of the entropy bonus. Another divisor is a factor on the policy term. Every loss type is homogeneous in the
    # advantages, so that a factor > 0 on them is one on the policy term and leaves KL and bonus alone, where a mask
    # with other values than 0 and 1 would weigh the tokens of the bonus. tests/rl/test_entropy.py holds all of this.

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._loss_inputs = dict(inputs)  # a copy: TRL comes back to the same inputs when num_iterations > 1
        return super()._compute_loss(model, self._loss_inputs)  # type: ignore[misc]

    def get_high_entropy_mask(self, entropies: torch.Tensor, mask: torch.Tensor, threshold: float) -> torch.Tensor:
        selected = super().get_high_entropy_mask(entropies, mask, threshold)  # type: ignore[misc]  # (B, T) bool
        advantages = self._loss_inputs["advantages"]  # (B,) or (B, T)
        factor = self._active_per_selected(mask.sum(1), selected.sum(1)).to(advantages.dtype)  # (B,)
        self._loss_inputs["advantages"] = advantages * (factor if advantages.dim() == 1 else factor.unsqueeze(1))
        return selected

    def _active_per_selected(self, active: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        """Return TRL's divisor over the one wanted, (B,), from the tokens of each sequence, both (B,)."""
        if self.loss_type in PER_SEQUENCE:
            return active / selected.clamp(min=1)
        total = self.accelerator.reduce(torch.stack([active.sum(), selected.sum()]), reduction="sum")
        here = active.sum() * self.accelerator.num_processes if self.loss_type in PER_MICRO_BATCH else total[0]
        return (here / total[1].clamp(min=1)).expand(len(active))
