"""What the rewards of a run's first steps say of its score: whether early gains are final ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from itertools import permutations

from figures import Study
from planned import SEEDS

from peft_onelayer.statistics import rank_correlation

STEPS = (4, 8, 12, 16, 24)  # of the first ones
BLOCKS = (3, 5, 8, 15)  # that run, evenly spread, beside all


def early_rewards(study: Study) -> list[str]:
    """A table from whole sweeps of both seeds: rewards of one seed against scores of the other, whose prompts and
    completions are others. Nothing before these are there."""
    sweeps = [study.blocks(seed) for seed in SEEDS]
    if not study.of("base") or not all(sweep.keys() >= {*range(study.depth)} for sweep in sweeps):
        return []
    gains = [study.gains(seed) for seed in SEEDS]
    rewards = [[sweep[k][0]["rewards"] for k in range(study.depth)] for sweep in sweeps]
    counts = (*BLOCKS, study.depth)
    lines = ["### Early rewards", ""]
    lines.append(
        "| steps | rank correlation of the seeds' rewards | with the other seed's score | "
        + " | ".join(f"pick of {n} blocks" for n in counts)
        + " |"
    )
    lines.append("|---" * (3 + len(counts)) + "|")
    for steps in STEPS:
        early = [[statistics.fmean(block[:steps]) for block in sweep] for sweep in rewards]
        pairs = [(early[a], [gains[b][k] for k in range(study.depth)]) for a, b in permutations(range(len(SEEDS)), 2)]
        cells = [_mean([rank_correlation(*early)]), _mean([rank_correlation(*pair) for pair in pairs])]
        for n in counts:
            ran = [round(i * (study.depth - 1) / (n - 1)) for i in range(n)]
            picks = [(max(ran, key=seen.__getitem__), final) for seen, final in pairs]
            reached = _mean(final[pick] / max(final) for pick, final in picks)
            cells.append(f"{reached} of {_mean(max(final[k] for k in ran) / max(final) for _, final in picks)}")
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    said = (
        "The mean reward of the first steps of one seed's runs picks a block among so many, evenly spread. C(pick) / "
        "C(best) is that of the other seed, and behind it stands what the best of these blocks has there. Means over "
        "both ways round."
    )
    return ["\n".join(lines), said]


def _mean(values: Iterable[float | None]) -> str:
    """In two digits; a correlation that is undefined is left out."""
    return f"{statistics.fmean(value for value in values if value is not None):.2f}"
