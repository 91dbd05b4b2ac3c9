"""The race: short reinforcement learning of every candidate block, the worse ones dropped on the way.

All candidates learn from the same completions: first of the base, then of all who are still in the race, which generate
on prompts and sampling seeds that all share, to be scored. A posterior over depth (posterior.py) says which other
blocks may join the first ones, and after every round which candidates stay. Every token generated and every token
passed through the model, the base's own among them, counts against the budget (budget.py), which is never exceeded.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.records.ranking import NO_COST, LayerRanking
from peft_onelayer.rl.algorithms import Algorithm
from peft_onelayer.rl.recipe import Recipe, make_recipe
from peft_onelayer.rl.sampling import sampling_of_run
from peft_onelayer.rl.training import completions_per_step
from peft_onelayer.rollouts.completions import show_completions, why_equal
from peft_onelayer.rollouts.sampling import Rollout, sample_rollouts
from peft_onelayer.tasks import Task
from peft_onelayer.tuner import find_decoder_stack
from peft_onelayer.tuner.base import commit_hash

from .batch import Batch, graded_batch
from .budget import TokenBudget, base_prompts, shares_of_round
from .outcome import likely_best, make_ranking, measured_rounds
from .posterior import Posterior, fit
from .prior import depth_prior
from .settings import DEFAULT_SETTINGS, RaceSettings
from .updates import (
    FOUND_RATE_KL,
    GIVEN_RATE_KL,
    SEQUENCES_FOR_KL,
    Candidate,
    batch_starting_at,
    log_probabilities,
    measure_noise,
    most_tokens,
    trained_candidate,
    update,
)

OnCandidate = Callable[[int, int, float], None]


class BudgetError(ValueError):
    """The budget has no room for a race.

    Attributes:
        cost: what was spent on finding that out, as in `LayerRanking`.
    """

    def __init__(self, message: str, cost: dict[str, float] = NO_COST) -> None:
        super().__init__(f"{message}, or take the method prior")
        self.cost = cost


class NothingToLearnError(ValueError):
    """All completions of each prompt got the same reward.

    Attributes:
        rollouts: these completions.
    """

    def __init__(self, message: str, rollouts: Sequence[Rollout]) -> None:
        super().__init__(message)
        self.rollouts = rollouts

    def explained(self, task: Task, algorithm: Algorithm) -> tuple[list[str], str]:
        """Three of the completions in lines to read, and the message in one line with the likely reason.

        Args:
            task: that the completions are of.
            algorithm: of the run.
        """
        shown = show_completions(self.rollouts[:: max(1, len(self.rollouts) // 3)][:3], task)
        assert algorithm.completion_length is not None
        why = why_equal(self.rollouts, task, algorithm.completion_length)
        return shown.splitlines(), f"{self}. The likely reason: {why}."


def race(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    layers: Sequence[int] | None = None,
    use_prior: bool = True,
    budget: float = 0.25,
    training_steps: int = 150,
    recipe: Recipe | None = None,
    seed: int = 0,
    batch_size: int = 1024,
    settings: RaceSettings = DEFAULT_SETTINGS,
    on_candidate: OnCandidate = lambda number, layer, spent: None,
) -> LayerRanking:
    """Rank `layers` (default: all) of `model` on `task`; its weights are afterwards what they were.

    A score is the gain in mean reward over the base, on prompts of the training split, after as many updates as the
    finalists had: the posterior's mean. Its error is that of the difference from the mean of all blocks. Not all blocks
    run: some start, evenly spread, then those that may be better by their neighbours; the posterior
    speaks for the rest.

    Args:
        use_prior: let the posterior's mean follow the depth prior.
        budget: tokens to spend, as a share of those of one training run.
        training_steps: length of that run.
        recipe: that run's algorithm and settings (default: `make_recipe("grpo", task)`): completions a step, learning
            rate, and how it samples. The race's own updates are GRPO's, whatever the algorithm.
        seed: of prompts, sampling and the order of completions.
        batch_size: completions generated at a time.
        on_candidate: called before a candidate's turn with the round, the block and the share of the budget spent.

    Raises:
        BudgetError: the budget has no room for a round with three blocks.
        NothingToLearnError: rewards that are equal within every group of completions.
        ValueError: the task has fewer than two prompts.
    """
    chosen = list(range(len(find_decoder_stack(model).blocks))) if layers is None else sorted(layers)
    return _Race(
        model,
        tokenizer,
        task,
        fewest=min(settings.fewest, len(chosen)),
        recipe=recipe or make_recipe("grpo", task),
        training_steps=training_steps,
        budget=budget,
        seed=seed,
        batch_size=batch_size,
        settings=settings,
        on_candidate=on_candidate,
    ).rank(chosen, use_prior)


def stream_seed(seed: int, stream: str) -> int:
    """The seed, 0 to 2**31 - 1, of one of the streams of random numbers that a race draws from.

    Streams of different names are independent, and so are those of different seeds.

    >>> stream_seed(0, "sampling, round 0"), stream_seed(1, "sampling, round 0")
    (895086496, 1981811956)
    """
    return random.Random(f"{seed}: {stream}").getrandbits(31)


@dataclass
class _Round:
    """What all candidates of a round get.

    Attributes:
        reference: the base's completions of the prompts that score the candidates.
        batch: what they learn from.
        minibatch: completions of an update.
        completions: of each candidate that had its turn, in the order of the prompts.
    """

    number: int
    reference: list[list[Rollout]]
    batch: Batch
    minibatch: int
    completions: dict[int, list[list[Rollout]]] = field(default_factory=dict)


class _Race:
    """One race, from the base's completions to the ranking."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        fewest: int,
        recipe: Recipe,
        training_steps: int,
        budget: float,
        seed: int,
        batch_size: int,
        settings: RaceSettings,
        on_candidate: OnCandidate,
    ) -> None:
        self.start = time.perf_counter()
        if (prompts := len(task.rows("train", 2, seed))) < 2:  # of one the noise is not known
            raise ValueError(
                f"a race scores blocks on at least 2 prompts, and task {task.name} has {prompts} to train on; give "
                "more rows, or take the method prior"
            )
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.seed, self.settings, self.on_candidate = seed, settings, on_candidate
        config = recipe.config(output_dir="unused")
        values = config.to_dict()
        self.learning_rate: float = config.learning_rate  # that the candidates start from
        self.given_rate: float | None = recipe.given.get("learning_rate")
        self.temperature: float = values.get("temperature", 1.0)  # of the log-probabilities
        self.sampling = replace(
            sampling_of_run(recipe.algorithm, config), samples=settings.samples, batch_size=batch_size
        )
        self.micro_batch: int = config.per_device_train_batch_size
        self.longest: int = self.sampling.max_completion_tokens or task.max_completion_tokens
        self.pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        trained = training_steps * completions_per_step(config)
        self.generated = generated = trained / values.get("num_iterations", 1)
        self.base_prompts = base_prompts(budget, generated, settings)
        least, enough = shares_of_round(generated, trained, fewest, settings)
        if self.base_prompts < 1:
            raise BudgetError(
                f"a budget of {budget:g} of a run that generates {generated:,.0f} completions has no room for a race; "
                f"{_allow(enough)}"
            )
        self.rewards = math.inf, -math.inf  # the lowest and the highest so far
        self.run, self.fewest = f"a budget of {budget:g} of a run of {training_steps} steps", fewest
        if budget < least:
            raise self._no_room(enough, NO_COST)
        base = self._sample("base 0", self.base_prompts)
        rollouts = [rollout for group in base for rollout in group]
        completion = fmean(r.tokens for r in rollouts)
        sequence = fmean(len(r.prompt_ids) + len(r.ids) for r in rollouts)
        one_run = generated * completion + trained * sequence
        self.budget = TokenBudget(budget * one_run, one_run, completion, sequence, self.longest, settings)
        self.budget.generated = _tokens(base)
        self.share = budget
        self.batch = self._base_batch(base)
        self.candidates: dict[int, Candidate] = {}

    @property
    def cost(self) -> dict[str, float]:
        """So far, as in `LayerRanking`."""
        return {
            "tokens_generated": self.budget.generated,
            "tokens_trained": self.budget.trained,
            "seconds": round(time.perf_counter() - self.start, 1),
            "share": round(self.budget.spent / self.budget.one_run, 4),
        }

    def rank(self, layers: Sequence[int], use_prior: bool) -> LayerRanking:
        """Run all rounds that the budget has room for."""
        depth = len(find_decoder_stack(self.model).blocks)
        no_prior = [0.0] * depth
        prior = depth_prior(depth) if use_prior else no_prior
        first, joining = self._starters(list(layers))
        current = self._new_round(0, len(first) + joining)
        if current is not None:
            self._give_turns(current, first)
        if len(self._ran()) < 2:
            raise BudgetError(f"{self.run} ends before two blocks had a turn; allow more", self.cost)
        if current is not None and joining:
            # By their neighbours alone: the prior has had its say where nothing was measured.
            others = [k for k in layers if k not in first]
            self._give_turns(current, likely_best(self._posterior(no_prior), others, joining))
        for number, finalists in enumerate(self.settings.finalists, start=1):
            if current is None or len(current.completions) < 2:  # the budget ended before they had a turn
                break
            wanted = max(finalists, self.budget.useful_candidates(number))
            wanted = min(wanted, self.budget.affordable_candidates(number))
            if wanted < 2:  # a final of one would compare it with nothing
                break
            alive = likely_best(self._posterior(prior), list(current.completions), wanted)
            self._learn_from([current.completions[layer] for layer in alive], number)
            current = self._new_round(number, len(alive))
            if current is not None:
                self._give_turns(current, alive)
        return make_ranking(
            self._ran(),
            self._posterior(prior),
            layers,
            self.settings,
            self._reward_range,
            model=self.model.name_or_path,
            revision=commit_hash(self.model),
            method="auto" if use_prior else "race",
            learning_rate=self.given_rate,
            cost=self.cost,
            task=self.task.name,
            seed=self.seed,
        )

    def _starters(self, layers: list[int]) -> tuple[list[int], int]:
        """The blocks that start, and how many others join them in the first round."""
        s = self.settings
        affordable = self.budget.affordable_candidates()
        if affordable < self.fewest:
            raise self._no_room(self._share_for(self.fewest), self.cost)
        useful = self.budget.useful_candidates(0) - s.joining
        wanted = max(s.fewest, math.ceil(s.starting_share * len(layers)), useful)
        first = _spread(layers, min(affordable, wanted))
        return first, min(s.joining, len(layers) - len(first), affordable - len(first))

    def _no_room(self, needed: float, cost: dict[str, float]) -> BudgetError:
        """The error that says which share of the run, in hundredths, would do."""
        return BudgetError(f"{self.run} has no room for a round with {self.fewest} blocks; {_allow(needed)}", cost)

    def _share_for(self, candidates: int) -> float:
        """About the least budget, in hundredths, with room for so many blocks in the first round; at most 1.

        A tenth more than what the base's completions so far ask for, as others may be longer.
        """
        left, each = 1.1 * self.budget.least_left(candidates), self.budget.spent / self.base_prompts
        for hundredths in range(math.ceil(100 * self.share), 100):
            share = hundredths / 100
            if share * self.budget.one_run - each * base_prompts(share, self.generated, self.settings) >= left:
                return share
        return 1.0

    def _ran(self) -> dict[int, Candidate]:
        return {k: c for k, c in self.candidates.items() if c.gains}

    def _posterior(self, prior: Sequence[float]) -> Posterior:
        return fit(prior, measured_rounds(self.candidates, self.settings, self._reward_range))

    @property
    def _reward_range(self) -> float:
        return self.rewards[1] - self.rewards[0]

    def _sample(self, stream: str, prompts: int) -> list[list[Rollout]]:
        """Completions of a stream's prompts, which are the same whoever generates, and so are the sampling seeds."""
        groups = sample_rollouts(
            self.model,
            self.tokenizer,
            self.task,
            self.task.rows("train", prompts, stream_seed(self.seed, f"prompts, {stream}")),
            replace(self.sampling, seed=stream_seed(self.seed, f"sampling, {stream}")),
        )
        rewards = [rollout.reward for group in groups for rollout in group]
        self.rewards = min(self.rewards[0], *rewards), max(self.rewards[1], *rewards)
        return groups

    def _generate(self, stream: str, prompts: int) -> list[list[Rollout]]:
        groups = self._sample(stream, prompts)
        self.budget.generated += _tokens(groups)
        return groups

    def _base_batch(self, base: list[list[Rollout]]) -> Batch:
        """A batch of the base's completions, of which more are generated until enough of them are informative."""
        most = self.budget.most_shared
        expected = self.base_prompts * self.settings.samples * self.budget.completion
        reserved = 1.05 * self.budget.least_left(self.fewest)
        number = 1
        while True:
            batch = graded_batch(base, self.pad, self.model.device)
            enough = batch is not None and len(batch) >= self.settings.shared_completions
            dear = self.budget.generated + expected > most or self.budget.affordable_prompts() < self.base_prompts
            dear = dear or self.budget.left - expected < reserved
            if enough or dear:
                break
            base += self._generate(f"base {number}", self.base_prompts)
            number += 1
        if batch is None:
            mean = fmean(r.reward for group in base for r in group)
            raise NothingToLearnError(
                f"the rewards of the base's {self.settings.samples} completions are equal for each of {len(base)} "
                f"prompts of {self.task.name} (mean {mean:.2f}), so that there is nothing to learn from",
                [rollout for group in base for rollout in group],
            )
        room = self.budget.left - reserved - SEQUENCES_FOR_KL * self.budget.sequence
        size = max(self.settings.minibatch[0], int(min(most, room) / self.budget.sequence))
        return batch.shuffled(stream_seed(self.seed, "order, round 0")).part(slice(0, size))

    def _with_old_policy(self, batch: Batch) -> Batch:
        """The base's batch with the log-probabilities that it gives its own completions; finds their noise."""
        with torch.no_grad():
            logps = [
                log_probabilities(self.model, part, self.temperature) for part in batch.minibatches(self.micro_batch)
            ]
        batch = replace(batch, old_logps=torch.cat(logps))
        self.kl_noise = measure_noise(self.model, batch, self.temperature)
        self.budget.trained += batch.tokens + batch.part(slice(0, SEQUENCES_FOR_KL)).tokens
        return batch

    def _learn_from(self, completions: Sequence[list[list[Rollout]]], number: int) -> None:
        """Make what some candidates wrote, each on the same prompts, the batch of the `number`-th round."""
        together = [[r for group in groups for r in group] for groups in zip(*completions, strict=False)]
        if batch := graded_batch(together, self.pad, self.model.device):
            self.batch = batch.shuffled(stream_seed(self.seed, f"order, round {number}"))

    def _new_round(self, number: int, candidates: int) -> _Round | None:
        """The `number`-th round for so many candidates; None where too little of the budget is left."""
        size = self.budget.turn_size(number, candidates)
        if number == 0 and size is not None:
            self.batch = self._with_old_policy(self.batch.part(slice(0, self.settings.updates * size.minibatch)))
            size = self.budget.turn_size(number, candidates)  # of what that left
        if size is None:
            return None
        reference = self._generate(f"round {number}", size.prompts)
        batch = self.batch.part(slice(0, self.settings.updates * size.minibatch))
        return _Round(number, reference, batch, size.minibatch)

    def _give_turns(self, current: _Round, layers: Sequence[int]) -> None:
        """Give the candidates, in the order of depth, their updates and their gains over the base, while it lasts."""
        batch = current.batch
        for layer in sorted(layers):
            if layer not in self.candidates:
                self.candidates[layer] = Candidate(layer, self.learning_rate, kl_noise=self.kl_noise)
            candidate = self.candidates[layer]
            self.on_candidate(current.number, layer, self.budget.spent / self.budget.limit)
            reserved = most_tokens(candidate, batch, self.settings.updates, current.minibatch)
            if self.budget.affordable_prompts(reserved) < self.settings.scoring_prompts[0]:
                return
            if layer > 0:
                batch, tokens = batch_starting_at(self.model, batch, layer, self.micro_batch, self.temperature)
                self.budget.trained += tokens
            self._give_turn(current, candidate, batch)
            if self.given_rate is None:
                self.learning_rate = (
                    candidate.learning_rate
                )  # the next block starts from, so that it finds its own soon

    def _give_turn(self, current: _Round, candidate: Candidate, batch: Batch) -> None:
        number = current.number
        with trained_candidate(self.model, candidate) as trained:
            self.budget.trained += update(
                trained,
                candidate,
                batch,
                steps=self.settings.updates,
                size=current.minibatch,
                micro_batch=self.micro_batch,
                temperature=self.temperature,
                rate_factor=self.settings.rate_factors[number],
                first_kl=FOUND_RATE_KL if self.given_rate is None else GIVEN_RATE_KL,
            )
            prompts = min(len(current.reference), self.budget.affordable_prompts())
            rollouts = self._generate(f"round {number}", prompts)
        candidate.gains[number] = [
            fmean(r.reward for r in own) - fmean(r.reward for r in base)
            for own, base in zip(rollouts, current.reference, strict=False)
        ]
        current.completions[candidate.layer] = rollouts


def _allow(share: float) -> str:
    """What to do where a budget, in hundredths, would have room."""
    return f"allow about {share:.2f}" if share < 1 else "it would cost more than the run itself; train longer"


def _tokens(groups: Sequence[Sequence[Rollout]]) -> int:
    return sum(rollout.tokens for group in groups for rollout in group)


def _spread(layers: list[int], n: int) -> list[int]:
    """`n` of the layers, evenly over their range, the ends included.

    >>> _spread(list(range(9)), 3)
    [0, 4, 8]
    """
    if n >= len(layers):
        return layers
    return [layers[round(i * (len(layers) - 1) / (n - 1))] for i in range(n)]
