"""Ranks the blocks, and goes from a ranking to the blocks to train and the sentence that says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._output import progress_bar

if TYPE_CHECKING:
    from peft_onelayer.probe.ranking import LayerRanking
    from peft_onelayer.tasks import Task


def rank_blocks(base: Any, tokenizer: Any, task: Task, *, steps: int, **settings: Any) -> LayerRanking:
    """`probe_layers` of all blocks by runs of `steps` steps; `settings` are its other arguments."""
    from peft_onelayer.probe.short_rl import probe_layers
    from peft_onelayer.tuner import find_decoder_stack

    num_layers = len(find_decoder_stack(base).blocks)
    with progress_bar(f"ranking {num_layers} blocks", num_layers * steps) as bar:
        return probe_layers(
            base,
            tokenizer,
            task,
            steps=steps,
            on_step=lambda layer, step, reward: bar.update(layer * steps + step, f"block {layer}"),
            **settings,
        )


def pick_layers(ranking: LayerRanking, steps: int) -> tuple[list[int], str]:
    """The ranking's pick, or mid-5 where nothing gained; and the choice, its gain, its ties and its cost in words.

    Args:
        steps: length of the short runs that the ranking was made of.
    """
    from peft_onelayer.tuner import resolve_layers

    best = ranking.order[0]
    gain = f"{100 * (ranking.scores[best] or 0):+.1f} points (standard error {100 * (ranking.errors[best] or 0):.1f})"
    cost = f"the ranking took {ranking.cost['share']:.0%} of the tokens of the training run"
    if ranking.pick is None:
        why = f"no block gained beyond noise in {steps} steps (best: block {best}, {gain}), so mid-5; {cost}"
        return resolve_layers("mid-5", ranking.num_layers), why
    others = ", ".join(str(layer) for layer in sorted(ranking.tied) if layer != best)
    tie = f"indistinguishable from {others}" if others else "ahead of every other"
    middle = f"; of these, block {ranking.pick} is nearest the middle" if ranking.pick != best else ""
    return [ranking.pick], f"block {best} gained the most in {steps} steps, {gain}, {tie}{middle}; {cost}"
