"""The race: short reinforcement learning of every candidate block, the worse ones dropped on the way.

All candidates learn from the same completions: first of the base, then of all who are still in the race, which generate
on prompts and sampling seeds that all share, to be scored. A posterior over depth (posterior.py) says which other
blocks may join the first ones, and after every round which candidates stay. Every token generated and every token
passed through the model, the base's own among them, counts against the budget, which is never exceeded. It does not
know how the figures will be used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.records.ranking import NO_COST, LayerRanking
from peft_onelayer.rl.recipe import Recipe, demo_recipe
from peft_onelayer.rollouts.sampling import Rollout, sample_rollouts
from peft_onelayer.tasks import Task
from peft_onelayer.tuner import find_decoder_stack
from peft_onelayer.tuner.model import commit_hash

from .posterior import Measured, Posterior, fit
from .prior import depth_prior
from .updates import (
    MOST_TRIES,
    SEQUENCES_FOR_KL,
    TO_COMPARE,
    Batch,
    Candidate,
    at_work,
    graded_batch,
    log_probabilities,
    start_at,
    update,
)

SAMPLES = 8  # completions of a prompt
CHUNK = 32  # prompts that the base completes at a time
SHARED = 256  # informative completions of the base that are wanted
SHARED_SHARE = 0.2  # of the budget, at most, for generating them
ROUNDS = (0.6, 0.25, 0.15)  # shares of the rest for each round
DECAY = (1.0, 0.7, 0.5)  # of the learning rates in each
FIRST, MORE = 0.5, 2  # share of the blocks that start, evenly spread, and how many of the others join them, at least
FINALISTS = (4, 3)  # of the later rounds, at least
FEWEST = 3  # candidates of the first
UPDATES = 4  # of a round
MINIBATCH = 16, 128  # completions of an update, least and most
SCORING = 0.3  # share of a round that is spent on its scores
PROMPTS = 8, 128  # of a score, least and most
Z_95 = 1.959964


class BudgetError(ValueError):
    """The budget has no room for a race.

    Attributes:
        cost: what was spent on finding that out, as in `LayerRanking`.
    """

    def __init__(self, message: str, cost: dict[str, float] = NO_COST) -> None:
        super().__init__(f"{message}, or take the method prior")
        self.cost = cost


class NothingToLearnError(ValueError):
    """All completions of each prompt got the same reward."""


@dataclass
class _Spent:
    """Tokens, generated and passed through the model."""

    limit: float = math.inf
    generated: int = 0
    trained: int = 0

    @property
    def left(self) -> float:
        return self.limit - self.generated - self.trained


@dataclass
class _Round:
    """What all candidates of a round get.

    Attributes:
        reference: the base's completions of the prompts that score the candidates.
        batch: what they learn from.
        size: completions of an update.
        completions: of each candidate that had its turn, in the order of the prompts.
    """

    number: int
    reference: list[list[Rollout]]
    batch: Batch
    size: int
    completions: dict[int, list[list[Rollout]]]


class _Race:
    """One race, from the base's completions to the posterior."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        recipe: Recipe,
        training_steps: int,
        budget: float,
        seed: int,
        batch_size: int,
    ) -> None:
        self.start = time.perf_counter()
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.seed, self.batch_size = seed, batch_size
        settings = recipe.config(output_dir="unused")
        self.learning_rate = settings.learning_rate
        self.temperature = getattr(settings, "temperature", 1.0)
        self.micro_batch = settings.per_device_train_batch_size
        self.max_tokens = getattr(settings, recipe.algorithm.completion_length or "", task.max_completion_tokens)
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.spent = _Spent()
        per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * settings.world_size
        trained = training_steps * per_step
        generated = trained / getattr(settings, "num_iterations", 1)
        # At most so many that generating them costs less than their share of the budget, whatever their length.
        self.chunk = min(CHUNK, int(SHARED_SHARE * budget * generated / SAMPLES))
        if self.chunk < 1:
            raise BudgetError(
                f"a budget of {budget:g} of a run that generates {generated:,.0f} completions has no room for a race; "
                f"allow at least {SAMPLES / SHARED_SHARE / generated:.2g}"
            )
        base = self._generate(0, self.chunk)
        self.of_completion = fmean(r.tokens for group in base for r in group)
        self.of_pass = fmean(len(r.prompt_ids) + len(r.ids) for group in base for r in group)
        self.one_run = generated * self.of_completion + trained * self.of_pass
        self.spent.limit = budget * self.one_run
        self.shared = self._shared(base)

    def _generate(self, number: int, prompts: int) -> list[list[Rollout]]:
        """Completions of the `number`-th set of prompts, which is the same whoever generates."""
        seed = self.seed + 1 + number
        groups = sample_rollouts(
            self.model,
            self.tokenizer,
            self.task,
            self.task.rows("train", prompts, seed),
            samples=SAMPLES,
            temperature=self.temperature,
            seed=seed,
            batch_size=self.batch_size,
            max_completion_tokens=self.max_tokens,
        )
        self.spent.generated += sum(rollout.tokens for group in groups for rollout in group)
        return groups

    def _shared(self, base: list[list[Rollout]]) -> Batch:
        """A batch of the base's completions, of which more are generated until enough of them are informative."""
        most = SHARED_SHARE * self.spent.limit
        number = 1
        while True:
            batch = graded_batch(base, self.pad, self.model.device)
            enough = batch is not None and len(batch) >= SHARED
            expected = self.chunk * SAMPLES * self.of_completion
            if enough or self.spent.generated + expected > most or self._affordable_prompts() < self.chunk:
                break
            base += self._generate(1000 + number, self.chunk)
            number += 1
        if batch is None:
            mean = fmean(r.reward for group in base for r in group)
            raise NothingToLearnError(
                f"the rewards of the base's {SAMPLES} completions are equal for each of {len(base)} prompts of "
                f"{self.task.name} (mean {mean:.2f}), so that there is nothing to learn from; take an easier or harder "
                "task, or warm the model up first"
            )
        batch = batch.shuffled(self.seed).part(slice(0, max(MINIBATCH[0], int(most / self.of_pass))))
        with torch.no_grad():
            old = [
                log_probabilities(self.model, part, self.temperature) for part in batch.minibatches(self.micro_batch)
            ]
        self.spent.trained += batch.tokens
        return replace(batch, old=torch.cat(old))

    @property
    def cost(self) -> dict[str, float]:
        """So far, as in `LayerRanking`."""
        return {
            "tokens_generated": self.spent.generated,
            "tokens_trained": self.spent.trained,
            "seconds": round(time.perf_counter() - self.start, 1),
            "share": round((self.spent.generated + self.spent.trained) / self.one_run, 4),
        }

    def affordable(self) -> int:
        """How many candidates the first round has room for."""
        least = UPDATES * MINIBATCH[0] * self.of_pass + PROMPTS[0] * SAMPLES * self.of_completion
        return int(self.spent.left * ROUNDS[0] / least) - 2

    def room(self, number: int) -> int:
        """How many candidates the `number`-th round has room for when nobody's turn could use more."""
        most = UPDATES * MINIBATCH[1] * self.of_pass / (1 - SCORING)
        return int(self.spent.left * ROUNDS[number] / sum(ROUNDS[number:]) / most) - 2

    def plan(self, number: int, candidates: int) -> _Round | None:
        """The `number`-th round for so many candidates; None where too little of the budget is left."""
        each = self.spent.left * ROUNDS[number] / sum(ROUNDS[number:]) / (candidates + 2)
        prompts = _clamp(SCORING * each / self.of_completion / SAMPLES, *PROMPTS)
        passes = (each - prompts * SAMPLES * self.of_completion) / self.of_pass
        size = _clamp(passes / UPDATES, *MINIBATCH)
        prompts = min(prompts, self._affordable_prompts())
        if prompts < PROMPTS[0]:
            return None
        return _Round(
            number,
            reference=self._generate(2000 + number, prompts),
            batch=self.shared.part(slice(0, UPDATES * size)),
            size=size,
            completions={},
        )

    def learn_from(self, completions: Sequence[list[list[Rollout]]]) -> None:
        """Make what some candidates wrote, each on the same prompts, the batch of the next round."""
        together = [[r for group in groups for r in group] for groups in zip(*completions, strict=False)]
        if batch := graded_batch(together, self.pad, self.model.device):
            self.shared = batch.shuffled(self.seed)

    def run(self, current: _Round, candidates: Sequence[Candidate], on_turn: Callable[[int], None]) -> None:
        """Give every candidate, in the order of depth, its updates and its gain over the base."""
        batch = current.batch
        for candidate in candidates:
            on_turn(candidate.layer)
            width = batch.input_ids.shape[1]
            overhead = (2 * TO_COMPARE + (0 if candidate.updates else MOST_TRIES * SEQUENCES_FOR_KL)) * width
            worst = UPDATES * max(part.tokens for part in batch.minibatches(current.size)) + overhead
            if self._affordable_prompts(worst + batch.tokens) < PROMPTS[0]:
                return
            if candidate.layer > 0:
                compared = 2 * batch.part(slice(0, TO_COMPARE)).tokens
                self.spent.trained += compared + (0 if batch.entering else batch.tokens)
                batch = start_at(self.model, batch, candidate.layer, self.micro_batch, self.temperature)
            with at_work(self.model, candidate) as trained:
                self.spent.trained += update(
                    trained,
                    candidate,
                    batch,
                    steps=UPDATES,
                    size=current.size,
                    micro_batch=self.micro_batch,
                    temperature=self.temperature,
                    decay=DECAY[current.number],
                )
                prompts = min(len(current.reference), self._affordable_prompts())
                rollouts = self._generate(2000 + current.number, prompts)
            candidate.gains[current.number] = [
                fmean(r.reward for r in own) - fmean(r.reward for r in base)
                for own, base in zip(rollouts, current.reference, strict=False)
            ]
            current.completions[candidate.layer] = rollouts

    def _affordable_prompts(self, tokens: int = 0) -> int:
        """Prompts whose completions the budget has room for beside `tokens`, however long they become."""
        return int((self.spent.left - tokens) / SAMPLES / self.max_tokens)


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
    on_candidate: Callable[[int, int, float], None] = lambda number, layer, spent: None,
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
        recipe: that run's algorithm and settings (default: `demo_recipe`): completions a step, learning rate,
            temperature. The race's own updates are GRPO's, whatever the algorithm.
        batch_size: completions generated at a time.
        on_candidate: called before a candidate's turn with the round, the block and the share of the budget spent.

    Raises:
        BudgetError: the budget has no room for a round with three blocks.
        NothingToLearnError: rewards that are equal within every group of completions.
    """
    num_layers = len(find_decoder_stack(model).blocks)
    contest = _Race(
        model,
        tokenizer,
        task,
        recipe=recipe or demo_recipe(task, training_steps),
        training_steps=training_steps,
        budget=budget,
        seed=seed,
        batch_size=batch_size,
    )
    wanted = list(range(num_layers)) if layers is None else sorted(layers)
    affordable = contest.affordable()
    if affordable < min(FEWEST, len(wanted)):
        needed = budget * min(FEWEST, len(wanted)) / max(affordable, 0.5)
        raise BudgetError(
            f"a budget of {budget:g} of a run of {training_steps} steps has no room for a round with "
            f"{min(FEWEST, len(wanted))} blocks; allow about {needed:.2g}",
            contest.cost,
        )
    prior = depth_prior(num_layers) if use_prior else [0.0] * num_layers
    candidates: dict[int, Candidate] = {}

    def turns(current: _Round, layers: Sequence[int]) -> Posterior:
        def on_turn(layer: int) -> None:
            on_candidate(current.number, layer, 1 - contest.spent.left / contest.spent.limit)

        for layer in layers:
            candidates.setdefault(layer, Candidate(layer, contest.learning_rate))
        contest.run(current, [candidates[k] for k in sorted(layers)], on_turn)
        measured = _measured(candidates)
        if not measured:
            raise too_small
        return fit(prior, measured)

    start = max(FEWEST, math.ceil(FIRST * len(wanted)), contest.room(0) - MORE)
    first = _spread(wanted, min(affordable, start))
    more = min(MORE, len(wanted) - len(first), affordable - len(first))
    too_small = BudgetError(
        f"a budget of {budget:g} of a run of {training_steps} steps ends before two blocks had a turn; allow more",
        contest.cost,
    )
    current = contest.plan(0, len(first) + more)
    if current is None:
        raise too_small
    posterior = turns(current, first)
    if more:
        # By their neighbours alone: the prior has had its say where nothing was measured.
        by_neighbours = fit([0.0] * num_layers, _measured(candidates))
        posterior = turns(current, _contenders(by_neighbours, [k for k in wanted if k not in first], more))
    for number, finalists in enumerate(FINALISTS, start=1):
        if len(current.completions) < 2:  # the budget ended before they had a turn
            break
        alive = _contenders(posterior, list(current.completions), max(finalists, contest.room(number)))
        contest.learn_from([current.completions[layer] for layer in alive])
        current = contest.plan(number, len(alive))
        if current is None:
            break
        posterior = turns(current, alive)
    return _ranking(contest, {k: c for k, c in candidates.items() if c.gains}, wanted, posterior, use_prior)


def _clamp(value: float, least: int, most: int) -> int:
    return max(least, min(most, int(value)))


def _spread(layers: list[int], n: int) -> list[int]:
    """`n` of the layers, evenly over their range, the ends included.

    >>> _spread(list(range(9)), 3)
    [0, 4, 8]
    """
    if n >= len(layers):
        return layers
    return [layers[round(i * (len(layers) - 1) / (n - 1))] for i in range(n)]


def _measured(candidates: Mapping[int, Candidate]) -> list[Measured]:
    """Each round's gains, with the covariance that their prompts show, for common prompts and random numbers.

    One correlation for all pairs: of each its prompts say little, and with fewer prompts than blocks the posterior
    would take some combination of gains for certain.
    """
    rounds = []
    for number in range(len(ROUNDS)):
        layers = [k for k, c in sorted(candidates.items()) if number in c.gains]
        if len(layers) > 1:
            prompts = min(len(candidates[k].gains[number]) for k in layers)
            values = np.array([candidates[k].gains[number][:prompts] for k in layers])  # (N, prompts)
            # No completion more or less is the least noise: a few prompts may show none at all.
            covariance = np.cov(values) / prompts + np.eye(len(layers)) * (prompts * SAMPLES) ** -2.0
            error = np.sqrt(np.diag(covariance))
            scale = np.outer(error, error)
            pairs = ~np.eye(len(layers), dtype=bool)
            covariance = np.where(pairs, max(0.0, (covariance / scale)[pairs].mean()) * scale, covariance)
            rounds.append(Measured(layers, UPDATES * (number + 1), values.mean(axis=1), covariance))
    return rounds


def _contenders(posterior: Posterior, layers: Sequence[int], n: int) -> list[int]:
    """The `n` of the layers that are the best of them most often in draws from the posterior."""
    chosen = list(layers)
    wins = np.bincount(posterior.draws()[:, chosen].argmax(axis=1), minlength=len(chosen))
    order = sorted(range(len(chosen)), key=lambda i: (-wins[i], -posterior.mean[chosen[i]]))
    return sorted(chosen[i] for i in order[:n])


def _ranking(
    contest: _Race,
    candidates: dict[int, Candidate],
    wanted: list[int],
    posterior: Posterior,
    use_prior: bool,
) -> LayerRanking:
    num_layers = len(posterior.mean)
    draws = posterior.draws()
    # How well blocks can be told apart, without what all share: the offset of a round, the base's luck.
    error = (draws - draws[:, wanted].mean(axis=1, keepdims=True)).std(axis=0)
    order = sorted(wanted, key=lambda k: -posterior.mean[k])
    # A block that did not run can be the best by its neighbours, but the pick is one that showed it.
    best = max(candidates, key=lambda k: posterior.mean[k])
    spread = (draws[:, [best]] - draws).std(axis=0)  # the paired 95 % interval of the difference from the best holds 0
    tied = [k for k in order if k == best or posterior.mean[best] - posterior.mean[k] <= Z_95 * spread[k]]
    top = float(draws[:, wanted].max(axis=1).mean())

    rounds = _measured(candidates)
    updates = rounds[-1].updates
    # Whether it beats the base is asked of its own gains, since the posterior leaves the rounds' offsets open, and at
    # a level for the best of so many.
    z = NormalDist().inv_cdf(1 - 0.025 / len(candidates))
    own = [(m.gains[i], m.covariance[i, i]) for m in rounds for i, layer in enumerate(m.layers) if layer == best]
    beats_base = sum(gain for gain, _ in own) > z * math.sqrt(sum(variance for _, variance in own))

    def each(values: Mapping[int, float] | Sequence[float] | np.ndarray, among: Iterable[int]) -> list[float | None]:
        found = {k: float(values[k]) for k in among}
        return [found.get(k) for k in range(num_layers)]

    rates = {k: min(c.learning_rate, contest.learning_rate) for k, c in candidates.items()}
    return LayerRanking(
        model=contest.model.name_or_path,
        revision=commit_hash(contest.model),
        num_layers=num_layers,
        method="auto" if use_prior else "race",
        scores=each(updates * posterior.mean, wanted),
        errors=each(updates * error, wanted),
        order=order,
        tied=tied,
        pick=best if beats_base else None,
        learning_rate=contest.learning_rate,
        cost=contest.cost,
        task=contest.task.name,
        seed=contest.seed,
        learning_rates=each(rates, rates),
        expected=round(min(1.0, max(0.0, posterior.mean[best] / top)), 3) if top > 0 else None,
        rounds={
            str(k): [
                [m.updates, float(m.gains[i]), float(math.sqrt(m.covariance[i, i]))]
                for m in rounds
                for i, layer in enumerate(m.layers)
                if layer == k
            ]
            for k in sorted(candidates)
        },
    )
