"""A learning rate for a run that was given none: the one that moves the policy as far as the race's candidates."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.layers import resolve_layers
from peft_onelayer.rl.recipe import Recipe
from peft_onelayer.rl.sampling import sampling_of_run
from peft_onelayer.rollouts.sampling import Rollout, Sampling, sample_rollouts
from peft_onelayer.tasks import Task
from peft_onelayer.tuner.stack import find_decoder_stack, layer_kinds

from .batch import Batch, graded_batch
from .race import NothingToLearnError, stream_seed
from .updates import (
    FOUND_RATE_KL,
    SEQUENCES_FOR_KL,
    Candidate,
    log_probabilities,
    measure_noise,
    trained_candidate,
    trained_whole,
    update,
)

SAMPLES = 8  # completions of a prompt
PROMPTS = 8  # completed at a time
MOST_PROMPTS = 64
ENOUGH = 16  # informative completions


@dataclass(frozen=True)
class FoundRate:
    """A learning rate and how it was found.

    Attributes:
        learning_rate: square root of `blocks` times the rate at which a first step of AdamW moves the policy by `kl`.
        kl: nats per token, less the noise.
        kl_noise: what the same policy gives, measured twice.
        tokens_generated: tokens that finding it generated.
        tokens_trained: tokens that it passed through the model.
        seconds: its time.
        blocks: that train together. The first step moves them all in one direction, later ones less and less so.
    """

    learning_rate: float
    kl: float
    kl_noise: float
    tokens_generated: int
    tokens_trained: int
    seconds: float
    blocks: int = 1

    @property
    def reached(self) -> bool:
        """Whether the KL lies within `FOUND_RATE_KL`."""
        return FOUND_RATE_KL[0] <= self.kl <= FOUND_RATE_KL[1]

    def describe(self) -> str:
        """The rate, what it does and what finding it cost, in one line."""
        least, most = FOUND_RATE_KL
        step = ": a first step at it"
        if self.blocks > 1:
            step = f" for {self.blocks} blocks: {math.sqrt(self.blocks):.2g} times that at which a first step"
        return (
            f"learning rate {self.learning_rate:g}{step} moves the policy by {self.kl:.3g} nats a token"
            + ("" if self.reached else f", the nearest that was found to {least} to {most}")
            + f"; finding it took {self.tokens_generated:,} tokens generated, {self.tokens_trained:,} passed through "
            f"the model and {self.seconds:.0f} s"
        )


def informative_completions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    sampling: Sampling,
    *,
    seed: int = 0,
    prompts: int = MOST_PROMPTS,
    enough: int = ENOUGH,
) -> tuple[list[Rollout], Batch]:
    """Completions of the model for some prompts of the task, and those of them that a first step can learn from.

    Args:
        sampling: as the run does, but for the number of samples and the seed. Not its configuration: making one while
            a trainer trains takes accelerate's state away from it.
        prompts: to take at most.
        enough: completions to learn from, behind which no further prompts are taken.

    Raises:
        NothingToLearnError: rewards that are equal within every group of completions of so many prompts.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = task.rows("train", prompts, stream_seed(seed, "prompts, learning rate"))
    groups: list[list[Rollout]] = []
    batch = None
    for first in range(0, len(rows), PROMPTS):
        sampling = replace(sampling, samples=SAMPLES, seed=stream_seed(seed, f"sampling, learning rate {first}"))
        groups += sample_rollouts(model, tokenizer, task, rows[first : first + PROMPTS], sampling)
        batch = graded_batch(groups, pad, model.device)
        if batch is not None and len(batch) >= enough:
            break
    rollouts = [rollout for group in groups for rollout in group]
    if batch is None:
        raise NothingToLearnError(
            f"the rewards of {SAMPLES} completions are equal for each of {len(groups)} prompts of {task.name} (mean "
            f"{fmean(r.reward for r in rollouts):.2f}), so that there is nothing to learn from",
            rollouts,
        )
    return rollouts, batch


def find_learning_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    layers: int | str | Sequence[int] | None,
    recipe: Recipe,
    *,
    mask: str | None = None,
    init_adapter: Path | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> FoundRate:
    """The rate at which a first step of `layers`, or with None of the whole model, moves the policy by `FOUND_RATE_KL`.

    The step is one of AdamW on a batch of graded completions of the model, whose weights are afterwards what they were.
    Of n blocks that train together it moves the policy about n times as far as of one at the same rate, since all move
    in one direction. In later steps they do so less: the best rates that were searched for are 1/3 of one block's for
    5, 1/10 for 12 and 1/3 for 30 (docs/choosing-a-block.md). So n blocks get sqrt(n) times the rate of that step.

    Args:
        recipe: the run's temperature, length of completions and completions in a pass; its rate is where to start.
        mask: file of the entries of `layers` that train, as `SingleLayerConfig` takes it.
        init_adapter: folder of an adapter of `layers` that the run starts from, and so the step and the completions.
        batch_size: completions generated at a time.

    Raises:
        NothingToLearnError: rewards that are equal within every group of completions of `MOST_PROMPTS` prompts.
    """
    start = time.perf_counter()
    config = recipe.config(output_dir="unused")
    temperature = config.to_dict().get("temperature", 1.0)
    micro_batch = config.per_device_train_batch_size
    candidate = Candidate(layers, config.learning_rate, mask=mask)
    with ExitStack() as opened:
        policy: PreTrainedModel | PeftModel = model
        if init_adapter is not None:
            policy = opened.enter_context(trained_candidate(model, candidate))
            set_peft_model_state_dict(policy, load_peft_weights(str(init_adapter), device="cpu"))
        sampling = replace(sampling_of_run(recipe.algorithm, config), batch_size=batch_size)
        rollouts, batch = informative_completions(policy, tokenizer, task, sampling, seed=seed)
        with torch.no_grad():
            logps = [log_probabilities(policy, part, temperature) for part in batch.minibatches(micro_batch)]
        batch = replace(batch, old_logps=torch.cat(logps))
        candidate.kl_noise = measure_noise(policy, batch, temperature)
        trained = policy
        if init_adapter is None:
            trained = opened.enter_context(
                trained_whole(model) if layers is None else trained_candidate(model, candidate)
            )
        passed = (
            batch.tokens
            + batch.part(slice(0, SEQUENCES_FOR_KL)).tokens
            + update(
                trained,
                candidate,
                batch,
                steps=1,
                size=len(batch),
                micro_batch=micro_batch,
                temperature=temperature,
                first_kl=FOUND_RATE_KL,
            )
        )
    assert candidate.kl is not None
    num_layers = len(find_decoder_stack(model).blocks)
    blocks = num_layers if layers is None else len(resolve_layers(layers, num_layers, layer_kinds(model)))
    return FoundRate(
        learning_rate=_two_digits(candidate.learning_rate * math.sqrt(blocks)),
        kl=candidate.kl,
        kl_noise=candidate.kl_noise,
        tokens_generated=sum(r.tokens for r in rollouts),
        tokens_trained=passed,
        seconds=round(time.perf_counter() - start, 1),
        blocks=blocks,
    )


def _two_digits(value: float) -> float:
    """Rounded, since it is no more exact than that.

    >>> _two_digits(0.000123456)
    0.00012
    """
    return float(f"{value:.2g}")
