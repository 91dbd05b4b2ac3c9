"""`probe_layers`: ranks the blocks of a model for a task by one of several methods."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.layers import resolve_layers
from peft_onelayer.records.ranking import NO_COST, LayerRanking
from peft_onelayer.rl.recipe import Recipe, make_recipe
from peft_onelayer.tasks import Task
from peft_onelayer.tuner import find_decoder_stack
from peft_onelayer.tuner.base import commit_hash
from peft_onelayer.tuner.stack import layer_kinds

from .prior import depth_prior
from .race import BudgetError, OnCandidate, race
from .settings import BUDGET, METHODS, RACES


def probe_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | None,
    *,
    method: str = "auto",
    budget: float = BUDGET,
    layers: str | int | Sequence[int] | None = None,
    training_steps: int = 150,
    recipe: Recipe | None = None,
    profile: LayerRanking | None = None,
    seed: int = 0,
    batch_size: int = 1024,
    on_candidate: OnCandidate = lambda number, layer, spent: None,
) -> LayerRanking:
    """Rank blocks by what training them on `task` is expected to gain; the model's weights are as before afterwards.

    Args:
        task: prompts and reward; None only for "prior" and "profile", which run nothing.
        method: "auto", a race whose belief starts from the depth prior, or where the budget has no room for a race the
            prior alone, which the ranking's `method` and `fallback` say; "race", the same without the prior; "prior",
            the depth prior, at no cost; "profile", a measured profile of the same base.
        budget: of a race: tokens to spend, as a share of those of one training run.
        layers: blocks to rank (default: all), as `SingleLayerConfig` takes them.
        training_steps: length of the training run that the block is chosen for.
        recipe: that run's algorithm and settings (default: `make_recipe("grpo", task)`, what `onelayer train` runs).
        profile: of `load_profile`, for "profile".
        batch_size: completions generated at a time.
        on_candidate: called before each candidate's turn with the round, the block, and the share of the budget spent.

    Raises:
        ValueError: no such method; fewer than two blocks for a race; a budget not above 0; a profile that is missing or
            of another depth. `BudgetError` where a race was asked for and the budget has no room for it,
            `NothingToLearnError` where the rewards are equal within every group of completions.
    """
    num_layers = len(find_decoder_stack(model).blocks)
    chosen = list(range(num_layers)) if layers is None else resolve_layers(layers, num_layers, layer_kinds(model))
    if method not in METHODS:
        raise ValueError(f"no probe {method!r}; the methods are {', '.join(METHODS)}")
    recipe = recipe or make_recipe("grpo", task)
    cost, fallback = NO_COST, None
    if method in RACES:
        if task is None:
            raise ValueError(f"the method {method} runs the model on a task; give one")
        if len(chosen) < 2:
            raise ValueError(f"there is nothing to choose: of {num_layers} blocks only {chosen} may be picked")
        if not 0 < budget < math.inf:
            raise ValueError(f"a budget is a share of a training run, above 0, such as {BUDGET}; got {budget}")
        try:
            return race(
                model,
                tokenizer,
                task,
                layers=chosen,
                use_prior=method == "auto",
                budget=budget,
                training_steps=training_steps,
                recipe=recipe,
                seed=seed,
                batch_size=batch_size,
                on_candidate=on_candidate,
            )
        except BudgetError as error:
            if method == "race":
                raise
            method, cost, fallback = "prior", error.cost, str(error)
    if method == "prior":
        scores: list[float | None] = list(depth_prior(num_layers))
    else:
        scores = _profile_scores(profile, num_layers)
    order = sorted((k for k in chosen if scores[k] is not None), key=lambda k: -(scores[k] or 0.0))
    if not order:
        raise ValueError(f"the profile of {profile and profile.model} measured none of the blocks asked for: {chosen}")
    pick: int | None = order[0]
    if method == "profile" and profile and (profile.pick is None or profile.pick in order):
        pick = profile.pick  # None where no block gained
    return LayerRanking(
        model=model.name_or_path,
        revision=commit_hash(model),
        num_layers=num_layers,
        method=method,
        scores=[scores[k] if k in order else None for k in range(num_layers)],
        errors=[None] * num_layers,
        order=order,
        tied=[k for k in order if scores[k] == scores[order[0]]],
        pick=pick,
        learning_rate=recipe.given.get("learning_rate"),
        cost=dict(cost),
        task=task.name if task else "",
        seed=seed,
        fallback=fallback,
    )


def _profile_scores(profile: LayerRanking | None, num_layers: int) -> list[float | None]:
    if profile is None:
        raise ValueError('the method "profile" needs a profile: give one of load_profile')
    if profile.num_layers != num_layers:
        raise ValueError(
            f"the profile is of {profile.model} with {profile.num_layers} blocks; this model has {num_layers}"
        )
    return profile.worth
