"""Ranks the blocks, and goes from a ranking to the blocks to train and the sentences that say why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._output import progress_bar

POINTS = 100  # percentage points of reward

if TYPE_CHECKING:
    from peft_onelayer.records.ranking import LayerRanking
    from peft_onelayer.tasks import Task


def rank_blocks(base: Any, tokenizer: Any, task: Task, **settings: Any) -> LayerRanking:
    """`probe_layers`; `settings` are its other arguments."""
    from peft_onelayer.probe.probe import probe_layers

    with progress_bar("ranking the blocks", 100) as bar:
        return probe_layers(
            base,
            tokenizer,
            task,
            on_candidate=lambda number, layer, spent: bar.update(
                round(100 * spent), f"round {number + 1}: block {layer}"
            ),
            **settings,
        )


def pick_layers(ranking: LayerRanking) -> tuple[list[int], str]:
    """The pick, or mid-5 where nothing gained; and its gain, its ties and its cost in words."""
    from peft_onelayer.tuner import resolve_layers

    layers = resolve_layers("mid-5", ranking.num_layers) if ranking.pick is None else [ranking.pick]
    return layers, "; ".join(describe(ranking))


def describe(ranking: LayerRanking) -> list[str]:
    """What a ranking says, line by line: the best block and its ties, what to train, and what it cost."""
    best = ranking.order[0] if ranking.pick is None else ranking.pick
    if not ranking.measured:
        where = "by depth alone, as in seven published profiles"
        if ranking.method == "profile":
            where = "by the profile; profiles of one model on two tasks correlate .59 to .76 (arXiv 2607.01232)"
        lines = [f"block {best} is the first choice {where}"]
        return [f"no race: {ranking.fallback}", *lines] if ranking.fallback else lines
    score, error = POINTS * (ranking.scores[best] or 0), POINTS * (ranking.errors[best] or 0)
    updates = max(measured[-1][0] for measured in (ranking.rounds or {}).values() if measured)
    gain = f"{score:+.1f} points of reward after {updates:.0f} updates (standard error {error:.1f})"
    others = sorted(layer for layer in ranking.tied if layer != best)
    if not others:
        tie = "ahead of every other"
    elif len(others) + 1 == len(ranking.order):
        tie = "indistinguishable from all others"
    else:
        tie = f"indistinguishable from {', '.join(map(str, others))}"
    cost = ranking.cost
    spent = (
        f"the ranking took {cost['tokens_generated']:,.0f} tokens generated, {cost['tokens_trained']:,.0f} passed "
        f"through the model and {cost['seconds']:.0f} s: {cost['share']:.0%} of the tokens of the training run"
    )
    if ranking.pick is None:
        return [
            f"no block gained beyond noise (most: block {best}, {gain}), so none is picked; mid-5 needs no profile",
            spent,
        ]
    lines = [f"block {best} gains {gain}, {tie}"]
    if ranking.expected is not None:
        lines.append(f"expected gain of block {best} over that of the best block: {ranking.expected:.2f}")
    if ranking.choice != str(best):
        lines.append(f"{ranking.choice} is the better bet: nothing tells the middle blocks apart")
    return [*lines, spent]
