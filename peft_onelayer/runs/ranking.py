"""Ranks the blocks with progress, and puts a ranking into words."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.probe.probe import probe_layers
from peft_onelayer.probe.race import NothingToLearnError
from peft_onelayer.probe.settings import RACES
from peft_onelayer.probe.updates import LEAST_KL, MOST_KL
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.text import name_blocks
from peft_onelayer.rl.algorithms import Algorithm
from peft_onelayer.statistics import gain_of_rounds
from peft_onelayer.tasks import Task

from .progress import Progress

POINTS = 100  # percentage points of reward


def rank_blocks(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task | None, progress: Progress, **options: Any
) -> LayerRanking:
    """`probe_layers`; `options` are its other arguments. A budget above the run's own tokens is said first."""
    if options["method"] in RACES and (budget := options["budget"]) > 1:
        progress.note(f"a budget of {budget:g} lets the ranking take {budget:.0%} of the tokens of the training run")
    with progress.bar("ranking the blocks", 100) as update:
        if options["method"] in RACES:
            update(0, "completions of the base")
        return probe_layers(
            base,
            tokenizer,
            task,
            on_candidate=lambda number, layer, spent: update(round(100 * spent), f"round {number + 1}: block {layer}"),
            **options,
        )


def explain(error: NothingToLearnError, task: Task, algorithm: Algorithm, progress: Progress) -> ValueError:
    """What to say, in one line, of completions that teach nothing; three of them are shown."""
    shown, why = error.explained(task, algorithm)
    for line in shown:
        progress.note(line)
    return ValueError(why)


def describe(ranking: LayerRanking) -> list[str]:
    """What a ranking says, sentence by sentence: the best block and its ties, what to train, and what it cost."""
    best = ranking.pick
    if not ranking.measured:
        if best is None:
            return [f"the profile has no block that gains beyond noise, so the choice is {name_blocks(ranking.choice)}"]
        where = "by depth alone, as in seven published profiles"
        if ranking.method == "profile":
            where = "by the profile; profiles of one model on two tasks correlate .59 to .76 (arXiv 2607.01232)"
        lines = [f"block {best} is the first choice {where}"]
        return [f"no race: {ranking.fallback}", *lines] if ranking.fallback else lines
    rounds = ranking.rounds or {}
    ran = next(k for k in ranking.order if str(k) in rounds) if best is None else best
    gain, error = (POINTS * value for value in gain_of_rounds(rounds[str(ran)]))
    cost = ranking.cost
    kls = ranking.first_step_kl or {}
    outside = [f"{k} ({kl:.1g}, noise {noise:.1g})" for k, (kl, noise) in kls.items() if not LEAST_KL <= kl <= MOST_KL]
    blind = [
        f"rounding leaves no learning rate at which a first step of block {', '.join(outside)} moves the policy by "
        f"{LEAST_KL} to {MOST_KL} nats a token; the nearest was taken"
    ]
    spent = (
        f"the ranking took {cost['tokens_generated']:,.0f} tokens generated, {cost['tokens_trained']:,.0f} passed "
        f"through the model and {cost['seconds']:.0f} s: {cost['share']:.0%} of the tokens of the training run"
    )
    if best is None:
        return [
            f"no block gained beyond noise (most: block {ran}, in its own rounds {gain:+.1f} points of reward, "
            f"standard error {error:.1f}), so the choice is {name_blocks(ranking.choice)}; a larger --budget sees "
            "smaller gains",
            *blind[: len(outside)],
            spent,
        ]
    others = sorted(layer for layer in ranking.tied if layer != best)
    if not others:
        tie = "more than every other block, beyond noise"
    elif len(others) + 1 == len(ranking.order):
        tie = "but every other block may be as good: the differences are within noise"
    else:
        tie = f"but {name_blocks(others)} may be as good: the differences are within noise"
    lines = [
        f"block {best} gains {gain:+.1f} points of reward in its own {rounds[str(best)][-1][0]:.0f} updates (standard "
        f"error {error:.1f}), {tie}"
    ]
    if ranking.expected is not None:
        lines.append(f"block {best} is expected to gain {ranking.expected:.0%} of what the best block would gain")
    return [*lines, *blind[: len(outside)], spent]
