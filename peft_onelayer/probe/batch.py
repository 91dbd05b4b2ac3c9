"""A batch of graded completions as tensors: what the candidates of a race learn from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peft_onelayer.rollouts.sampling import Rollout
from peft_onelayer.tuner.prefix import HiddenStates


@dataclass(frozen=True)
class Batch:
    """Completions to learn from.

    Attributes:
        input_ids: (B, P + T) int64, prompts padded on the left, completions on the right.
        attention_mask: (B, P + T) int64.
        generated: (B, T) bool, the tokens that the model wrote.
        advantages: (B,) float32.
        old_logps: (B, T) float32, log-probabilities under the policy before the updates; None where not yet computed.
        start: hidden states from which passes may start above the first block; None to start at the first.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    generated: torch.Tensor
    advantages: torch.Tensor
    old_logps: torch.Tensor | None = None
    start: HiddenStates | None = None

    @property
    def tokens(self) -> int:
        """Tokens of one pass, prompts included."""
        return int(self.attention_mask.sum())

    def __len__(self) -> int:
        return len(self.advantages)

    def part(self, rows: slice | torch.Tensor) -> Batch:
        return Batch(
            self.input_ids[rows],
            self.attention_mask[rows],
            self.generated[rows],
            self.advantages[rows],
            None if self.old_logps is None else self.old_logps[rows],
            None if self.start is None else self.start.part(rows),
        )

    def shuffled(self, seed: int) -> Batch:
        """The same completions in another order, so that a minibatch holds many prompts."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.part(order.to(self.input_ids.device))

    def minibatches(self, size: int) -> list[Batch]:
        """Parts of about `size`."""
        n = max(1, round(len(self) / size))
        return [self.part(slice(i * len(self) // n, (i + 1) * len(self) // n)) for i in range(n)]


def graded_batch(
    groups: Sequence[Sequence[Rollout]], pad: int, device: torch.device, whole: bool = False
) -> Batch | None:
    """The informative half of each group of completions of one prompt, or all of it, with their advantages.

    Of a group the half with the greatest variance of rewards is kept (arXiv 2504.13818), at half the cost of a pass;
    a group whose rewards are all equal teaches nothing and is left out. Advantages are normalised by the sample
    standard deviation of what is kept.

    Returns:
        The batch, or None when no group is informative.
    """
    kept: list[Rollout] = []
    advantages: list[float] = []
    for group in groups:
        rollouts = group if whole else _most_varied(group, max(2, len(group) // 2))
        rewards = [rollout.reward for rollout in rollouts]
        if len(set(rewards)) > 1:
            mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
            kept += rollouts
            advantages += [(reward - mean) / (deviation + 1e-4) for reward in rewards]
    if not kept:
        return None
    before, behind = max(len(r.prompt_ids) for r in kept), max(len(r.ids) for r in kept)
    ids, mask, generated = [], [], []
    for r in kept:
        left, right = before - len(r.prompt_ids), behind - len(r.ids)
        ids.append([pad] * left + r.prompt_ids + r.ids + [pad] * right)
        mask.append([0] * left + [1] * (len(r.prompt_ids) + len(r.ids)) + [0] * right)
        generated.append(r.generated + [False] * right)
    return Batch(
        torch.tensor(ids, device=device),
        torch.tensor(mask, device=device),
        torch.tensor(generated, device=device),
        torch.tensor(advantages, device=device),
    )


def _most_varied(group: Sequence[Rollout], keep: int) -> list[Rollout]:
    """The `keep` rollouts whose rewards vary most: some of the lowest and some of the highest."""
    ordered = sorted(group, key=lambda rollout: rollout.reward)
    choices = [ordered[:low] + ordered[len(ordered) - (keep - low) :] for low in range(keep + 1)]
    return max(choices, key=lambda rollouts: statistics.pvariance([rollout.reward for rollout in rollouts]))
