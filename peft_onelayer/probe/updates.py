"""Clipped policy-gradient updates of one block on a graded batch: what a race does to each of its candidates.

GRPO's objective (arXiv 2402.03300) without a KL term. It does not know how batches are made or candidates compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel
from trl.trainer.utils import selective_log_softmax

from peft_onelayer.rollouts.sampling import Rollout
from peft_onelayer.tuner import SingleLayerConfig, find_decoder_stack

from .prefix import Entering, reach

CLIP = 0.2
LEAST_KL, MOST_KL = 0.005, 0.05  # of the first update: per token, sampled policy against the base
SEQUENCES_FOR_KL = 16
TO_COMPARE = 2  # sequences
FAR, MOST_TRIES = 100, 4  # a KL so many times too large is measured again, so often at most


@dataclass(frozen=True)
class Batch:
    """Completions to learn from.

    Attributes:
        input_ids: (B, P + T) int64, prompts padded on the left, completions on the right.
        attention_mask: (B, P + T) int64.
        generated: (B, T) bool, the tokens that the model wrote.
        advantages: (B,) float32.
        entering: where passes may start above the first block.
        old: (B, T) float32, log-probabilities under the policy before the updates; None where not yet computed.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    generated: torch.Tensor
    advantages: torch.Tensor
    old: torch.Tensor | None = None
    entering: Entering | None = None

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
            None if self.old is None else self.old[rows],
            None if self.entering is None else self.entering.part(rows),
        )

    def shuffled(self, seed: int) -> Batch:
        """The same completions in another order, so that a minibatch holds many prompts."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.part(order.to(self.input_ids.device))

    def minibatches(self, size: int) -> list[Batch]:
        """Parts of about `size`."""
        n = max(1, round(len(self) / size))
        return [self.part(slice(i * len(self) // n, (i + 1) * len(self) // n)) for i in range(n)]


def graded_batch(groups: Sequence[Sequence[Rollout]], pad: int, device: torch.device) -> Batch | None:
    """The informative half of each group of completions of one prompt, with their advantages.

    Of a group the half with the greatest variance of rewards is kept (arXiv 2504.13818), at half the cost of a pass;
    a group whose rewards are all equal teaches nothing and is left out. Advantages are normalised by the sample
    standard deviation of what is kept.

    Returns:
        The batch, or None when no group is informative.
    """
    kept: list[Rollout] = []
    advantages: list[float] = []
    for group in groups:
        rollouts = _most_varied(group, max(2, len(group) // 2))
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


@dataclass
class Candidate:
    """A block in the race: its weights and its optimizer's state, on the CPU while another one is at work.

    Attributes:
        learning_rate: of its updates; the first one corrects it.
        updates: how many it has had.
        gains: by round, the (reward - the base's) of each prompt that scored it.
    """

    layer: int
    learning_rate: float
    weights: list[torch.Tensor] | None = None
    optimizer: dict[str, Any] | None = None
    updates: int = 0
    gains: dict[int, list[float]] = field(default_factory=dict)


@contextmanager
def at_work(model: PreTrainedModel, candidate: Candidate) -> Iterator[PeftModel]:
    """`model` with the candidate's block as trained so far; afterwards `model` is as it was."""
    wrapped = get_peft_model(model, SingleLayerConfig(layer=candidate.layer, task_type="CAUSAL_LM"))
    try:
        trained = trainable(wrapped)
        if candidate.weights is not None:
            with torch.no_grad():
                for parameter, weight in zip(trained, candidate.weights, strict=True):
                    parameter.copy_(weight)
        yield wrapped
        candidate.weights = [parameter.detach().to("cpu", copy=True) for parameter in trained]
    finally:
        wrapped.unload()


def trainable(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def update(
    model: PeftModel,
    candidate: Candidate,
    batch: Batch,
    *,
    steps: int,
    size: int,
    micro_batch: int,
    temperature: float = 1.0,
    decay: float = 1.0,
) -> int:
    """`steps` clipped AdamW steps of the candidate, on one minibatch of about `size` completions after the other.

    Where its very first step moves the policy by more than `MOST_KL`, or by less than `LEAST_KL`, the step is scaled,
    and so is its learning rate: at one rate for all, the same step moves the policy up to forty times further in the
    first block than in the last (measured on the demo model), and a rate that suits hundreds of steps shows nothing
    within a few.

    Args:
        micro_batch: completions in one pass.
        decay: factor of the learning rate.

    Returns:
        Tokens passed through the model, those of measuring the KL among them.
    """
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=candidate.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    if candidate.optimizer is not None:
        optimizer.load_state_dict(candidate.optimizer)
    tokens = 0
    minibatches = [part.minibatches(micro_batch) for part in batch.minibatches(size)]
    for step in range(steps):
        parts = minibatches[step % len(minibatches)]
        whole = sum(len(part) for part in parts)
        for i, part in enumerate(parts):
            logps = log_probabilities(model, part, temperature)
            if part.old is None:
                part = parts[i] = replace(part, old=logps.detach())
            ratio = torch.exp(logps - _known(part.old))
            advantages = part.advantages[:, None]
            objective = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            (-_mean(objective, part.generated).sum() / whole).backward()
            tokens += part.tokens
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = candidate.learning_rate * decay
        if candidate.optimizer is None and step == 0:
            few = parts[0].part(slice(0, SEQUENCES_FOR_KL))
            tokens += few.tokens * _first_step(model, candidate, optimizer, few, temperature)
        else:
            optimizer.step()
        optimizer.zero_grad()
    candidate.optimizer = optimizer.state_dict()
    candidate.updates += steps
    return tokens


def start_at(
    model: PreTrainedModel | PeftModel, batch: Batch, layer: int, micro_batch: int, temperature: float = 1.0
) -> Batch:
    """The batch with the hidden states that enter block `layer`, from those it has of a block that is not above it.

    Returns:
        The batch without any where a pass that starts there gives other log-probabilities than a whole one: some models
        hand more from block to block than hidden states.
    """
    blocks = find_decoder_stack(model).blocks
    reached = [
        reach(blocks, layer, lambda part=part: _forward(model, part), part.entering)  # type: ignore[misc]
        for part in batch.minibatches(micro_batch)
    ]
    entering = replace(reached[0], hidden=torch.cat([r.hidden for r in reached]))
    started = replace(batch, entering=entering)
    few = started.part(slice(0, TO_COMPARE))
    with torch.no_grad():
        here, whole = (log_probabilities(model, part, temperature) for part in (few, replace(few, entering=None)))
    return started if torch.allclose(here, whole, atol=0.05) else replace(batch, entering=None)


def _first_step(
    model: PeftModel, candidate: Candidate, optimizer: torch.optim.Optimizer, batch: Batch, temperature: float
) -> int:
    """Step, then scale the step and the learning rate so that the KL lies within its bounds.

    The KL of a small step grows with its square; a far too large one is scaled again.

    Returns:
        Passes of the batch.
    """
    parameters = trainable(model)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    passes = 0
    while passes < MOST_TRIES:
        passes += 1
        with torch.no_grad():
            change = _known(batch.old) - log_probabilities(model, batch, temperature)
            kl = _mean(torch.exp(-change) - 1 + change, batch.generated).mean().item()
            scale = math.sqrt(min(max(kl, LEAST_KL), MOST_KL) / max(kl, 1e-12))
            for parameter, start in zip(parameters, before, strict=True):
                parameter.copy_(start + scale * (parameter - start))
        candidate.learning_rate *= scale
        if kl < FAR * MOST_KL:
            break
    return passes


def log_probabilities(model: PreTrainedModel | PeftModel, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """(B, T) float32: of each token behind the prompt, given those before it."""
    with batch.entering.in_force() if batch.entering else nullcontext():
        logits = _forward(model, batch)
    return selective_log_softmax(logits / temperature, batch.input_ids[:, -batch.generated.shape[1] :])


def _forward(model: PreTrainedModel | PeftModel, batch: Batch) -> torch.Tensor:
    """(B, T, vocabulary) float32: the logits of the tokens behind the prompt."""
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=batch.generated.shape[1] + 1,
        use_cache=False,
    )
    return output.logits[:, :-1].float()


def _known(old: torch.Tensor | None) -> torch.Tensor:
    assert old is not None
    return old


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,): the mean over the tokens of each sequence."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
