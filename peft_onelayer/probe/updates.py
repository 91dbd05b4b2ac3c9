"""Clipped policy-gradient updates of one block on a graded batch: what a race does to each of its candidates.

GRPO's objective (arXiv 2402.03300) without a KL term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_onelayer.seams import check
from peft_onelayer.tuner import SingleLayerConfig, find_decoder_stack
from peft_onelayer.tuner.prefix import hidden_states_entering, starting_at

from .batch import Batch

CLIP = 0.2  # of the ratio, on either side of 1
# Nats per token that the first update may move the policy, and that it moves it where no learning rate is given: the
# rates that were best for one block of the demo model (float32, 3e-3) and of SmolLM2-135M (bfloat16, 1e-4) move it so.
GIVEN_RATE_KL = LEAST_KL, MOST_KL = 0.005, 0.05
FOUND_RATE_KL = 0.01, 0.025
SEQUENCES_FOR_KL = 16  # completions that the KL is measured on
MOST_MEASUREMENTS = 8  # of the KL, of one candidate
MOST_SCALE = 30.0  # of one scaling, up or down
ABOVE_NOISE = 3.0  # a scaling up of a step of which nothing but noise is seen
A_JUMP = 1.1  # a scale this much larger than one that was too small, and too large
INSIDE = 1.25  # a scaling aims so many times inside the bounds
SEQUENCES_TO_COMPARE = 2  # completions that a pass from a block is compared on with a whole one


@dataclass
class Candidate:
    """A block in the race: its weights and its optimizer's state, on the CPU while another one trains.

    Attributes:
        layer: its index; outside of a race, whatever `SingleLayerConfig` takes.
        mask: file of the entries of it that train; None for all.
        learning_rate: of its updates; the first one corrects it.
        kl: nats per token that the first update moved the policy, as measured last; None before it.
        kl_noise: what `measure_noise` found, which is taken off.
        updates: how many it has had.
        gains: by round, the (reward - the base's) of each prompt that scored it.
    """

    layer: Any
    learning_rate: float
    weights: list[torch.Tensor] | None = None
    optimizer: dict[str, Any] | None = None
    kl: float | None = None
    kl_noise: float = 0.0
    updates: int = 0
    mask: str | None = None
    gains: dict[int, list[float]] = field(default_factory=dict)


@contextmanager
def trained_candidate(model: PreTrainedModel, candidate: Candidate) -> Iterator[PeftModel]:
    """`model` with the candidate's block as trained so far; afterwards `model` is as it was."""
    config = SingleLayerConfig(layer=candidate.layer, mask=candidate.mask, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    try:
        parameters = trainable_parameters(wrapped)
        if candidate.weights is not None:
            with torch.no_grad():
                for parameter, weight in zip(parameters, candidate.weights, strict=True):
                    parameter.copy_(weight)
        yield wrapped
        candidate.weights = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    finally:
        wrapped.unload()


@contextmanager
def trained_whole(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`model` with all parameters trainable and in float32, as full training has them; afterwards it is as it was."""
    before = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, data, _ in before:
            parameter.data = data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)
        yield model
    finally:
        for parameter, data, trains in before:
            parameter.grad = None
            parameter.data = data
            parameter.requires_grad_(trains)


def trainable_parameters(model: PreTrainedModel | PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def update(
    model: PreTrainedModel | PeftModel,
    candidate: Candidate,
    batch: Batch,
    *,
    steps: int,
    size: int,
    micro_batch: int,
    temperature: float = 1.0,
    rate_factor: float = 1.0,
    first_kl: tuple[float, float] = GIVEN_RATE_KL,
) -> int:
    """`steps` clipped AdamW steps of the candidate, on one minibatch of about `size` completions after the other.

    Where its very first step moves the policy by more or less than `first_kl`, the step is scaled, and so is its
    learning rate: at one rate for all, the same step moves the policy up to forty times further in the first block than
    in the last (measured on the demo model), and a rate that suits hundreds of steps shows nothing within a few.

    Args:
        micro_batch: completions in one pass.
        rate_factor: of the learning rate.
        first_kl: bounds in nats per token.

    Returns:
        Tokens passed through the model, those of measuring the KL among them.
    """
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=candidate.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    if candidate.optimizer is not None:
        optimizer.load_state_dict(candidate.optimizer)
    tokens = 0
    minibatches = batch.minibatches(size)
    passes = [minibatch.minibatches(micro_batch) for minibatch in minibatches]
    for step in range(steps):
        parts = passes[step % len(passes)]
        completions = sum(len(part) for part in parts)
        for i, part in enumerate(parts):
            logps = log_probabilities(model, part, temperature)
            old_logps = logps.detach() if part.old_logps is None else part.old_logps
            parts[i] = replace(part, old_logps=old_logps)
            ratio = torch.exp(logps - old_logps)
            advantages = part.advantages[:, None]
            objective = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            (-_token_mean(objective, part.generated).sum() / completions).backward()
            tokens += part.tokens
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = candidate.learning_rate * rate_factor
        if candidate.optimizer is None and step == 0:
            logps = torch.cat([part.old_logps for part in parts if part.old_logps is not None])
            few = replace(minibatches[0], old_logps=logps).part(slice(0, SEQUENCES_FOR_KL))
            tokens += few.tokens * _first_step(model, candidate, optimizer, few, temperature, first_kl)
        else:
            optimizer.step()
        optimizer.zero_grad()
    candidate.optimizer = optimizer.state_dict()
    candidate.updates += steps
    return tokens


def measure_noise(model: PreTrainedModel | PeftModel, batch: Batch, temperature: float = 1.0) -> float:
    """Nats per token from the policy of `batch.old_logps` to the same one on a sequence at a time: rounding."""
    with torch.no_grad():
        few = batch.part(slice(0, SEQUENCES_FOR_KL))
        return _kl(few, torch.cat([log_probabilities(model, part, temperature) for part in few.minibatches(1)]))


def _first_step(
    model: PreTrainedModel | PeftModel,
    candidate: Candidate,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    temperature: float,
    bounds: tuple[float, float],
) -> int:
    """Step, then scale the step and the learning rate until the KL, less its noise, lies within `bounds`.

    The KL of a small step grows with its square. In bfloat16 and float16 it grows in jumps: AdamW's first step moves
    all weights by the same amount, and those of one magnitude round to their next value together. So the KL is measured
    again after each scaling, and a scale between one that was too small and one that was too large is taken. Where a
    jump leaves none between them, the step remains whose KL is the nearest.

    Returns:
        Passes of the batch.
    """
    parameters = trainable_parameters(model)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    steps = [parameter.detach() - start for parameter, start in zip(parameters, before, strict=True)]
    least, most = bounds
    scale, too_small, too_large = 1.0, 0.0, math.inf
    measured: dict[float, float] = {}  # KL by scale
    while True:
        with torch.no_grad():
            seen = _kl(batch, log_probabilities(model, batch, temperature))
        kl = measured[scale] = seen - candidate.kl_noise if math.isfinite(seen) else math.inf  # an overflow
        if kl < least:
            too_small = scale
            if seen == 0:  # nothing moved
                factor = MOST_SCALE
            elif kl <= candidate.kl_noise:  # whatever moved cannot be seen
                factor = ABOVE_NOISE
            else:
                factor = math.sqrt(least * INSIDE / kl)
            scale *= min(factor, MOST_SCALE)
        elif kl > most:
            too_large = scale
            scale *= max(math.sqrt(most / INSIDE / kl), 1 / MOST_SCALE)
        if least <= kl <= most or len(measured) == MOST_MEASUREMENTS or too_large < A_JUMP * too_small:
            break
        if not too_small < scale < too_large:
            scale = math.sqrt(too_small * too_large)
        _move(parameters, before, steps, scale)
    middle = math.log(least * most) / 2
    scale = min(measured, key=lambda s: abs(math.log(max(measured[s], least / 100)) - middle))
    if scale != next(reversed(measured)):
        _move(parameters, before, steps, scale)
    candidate.kl = measured[scale]
    candidate.learning_rate *= scale
    return len(measured)


def _move(
    parameters: list[torch.nn.Parameter], before: list[torch.Tensor], steps: list[torch.Tensor], scale: float
) -> None:
    with torch.no_grad():
        for parameter, start, step in zip(parameters, before, steps, strict=True):
            parameter.copy_(start + scale * step)


def _kl(batch: Batch, logps: torch.Tensor) -> float:
    """Nats per token from the policy of `batch.old_logps` to that of `logps`, estimated on the batch's tokens.

    The estimator is that of GRPO's KL term (arXiv 2402.03300, equation 4), never negative.
    """
    assert batch.old_logps is not None
    change = batch.old_logps - logps
    return _token_mean(torch.exp(-change) - 1 + change, batch.generated).mean().item()


def batch_starting_at(
    model: PreTrainedModel | PeftModel, batch: Batch, layer: int, micro_batch: int, temperature: float = 1.0
) -> tuple[Batch, int]:
    """The batch with the hidden states that enter block `layer`, found from those it has of a block not above it.

    Returns:
        The batch, and the tokens passed through the whole model. The batch has no hidden states where a pass that
        starts from them gives other log-probabilities than a whole one: some models hand more from block to block.
    """
    tokens = 0 if batch.start else batch.tokens
    blocks = find_decoder_stack(model).blocks
    states = [
        hidden_states_entering(blocks, layer, lambda part=part: _logits(model, part), part.start)  # type: ignore[misc]
        for part in batch.minibatches(micro_batch)
    ]
    started = replace(batch, start=replace(states[0], values=torch.cat([s.values for s in states])))
    few = started.part(slice(0, SEQUENCES_TO_COMPARE))
    with torch.no_grad():
        here, whole = (log_probabilities(model, part, temperature) for part in (few, replace(few, start=None)))
    same = torch.allclose(here, whole, atol=0.05)
    return (started if same else replace(batch, start=None)), tokens + 2 * few.tokens


def most_tokens(candidate: Candidate, batch: Batch, steps: int, size: int) -> int:
    """The most tokens that `batch_starting_at` and `update` pass through the model for this candidate."""
    sequences = 2 * SEQUENCES_TO_COMPARE + (0 if candidate.updates else MOST_MEASUREMENTS * SEQUENCES_FOR_KL)
    of_updates = steps * max(part.tokens for part in batch.minibatches(size))
    return of_updates + batch.tokens + sequences * batch.input_ids.shape[1]


def log_probabilities(model: PreTrainedModel | PeftModel, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """(B, T) float32: of each token behind the prompt, given those before it."""
    check(__name__)
    from trl.trainer.utils import selective_log_softmax

    with starting_at(batch.start) if batch.start else nullcontext():
        logits = _logits(model, batch)
    return selective_log_softmax(logits / temperature, batch.input_ids[:, -batch.generated.shape[1] :])


def _logits(model: PreTrainedModel | PeftModel, batch: Batch) -> torch.Tensor:
    """(B, T, vocabulary) float32: the logits of the tokens behind the prompt."""
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=batch.generated.shape[1] + 1,
        use_cache=False,
    )
    return output.logits[:, :-1].float()


def _token_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,): the mean over the tokens of each sequence."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
