"""A transplant profile: what the blocks of a fully trained model do in its base, without any training.

After one full-parameter run, blocks of its model take the places of the base's: each alone, neighbours together, and
all from below or from above. One evaluation each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.records.ranking import LayerRanking, Sweep
from peft_onelayer.rollouts.evaluation import Evaluation, evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.statistics import Z_95
from peft_onelayer.tasks import Task
from peft_onelayer.tuner import find_decoder_stack
from peft_onelayer.tuner.model import commit_hash

from .metric import gain, layer_contribution

KINDS = ("single", "window", "below", "above")
WINDOW = 3  # neighbours that are put in together


@dataclass(frozen=True)
class Transplant:
    """Blocks that are put in together.

    Attributes:
        kind: "single", "window", "below" (all up to a block) or "above" (all from a block on).
        blocks: ascending.
    """

    kind: str
    blocks: tuple[int, ...]


def transplants(num_layers: int, kinds: Iterable[str] = KINDS, window: int = WINDOW) -> list[Transplant]:
    """All transplants of these kinds; all blocks together are the last of "below".

    >>> [t.blocks for t in transplants(4, ["window", "above"])]
    [(0, 1, 2), (1, 2, 3), (1, 2, 3), (2, 3), (3,)]
    """
    ranges = {
        "single": [range(k, k + 1) for k in range(num_layers)],
        "window": [range(k, k + window) for k in range(num_layers - window + 1)],
        "below": [range(k + 1) for k in range(num_layers)],
        "above": [range(k, num_layers) for k in range(1, num_layers)],
    }
    return [Transplant(kind, tuple(blocks)) for kind in kinds for blocks in ranges[kind]]


@contextmanager
def transplanted(base: PreTrainedModel, donor: PreTrainedModel, blocks: Sequence[int]) -> Iterator[PreTrainedModel]:
    """`base` with these blocks of `donor`, in its own dtype; afterwards bit for bit as before."""
    pairs = [pair for k in blocks for pair in _pairs(base, donor, k)]
    kept = [here.detach().clone() for here, _ in pairs]
    try:
        with torch.no_grad():
            for here, there in pairs:
                here.copy_(there)
        yield base
    finally:
        with torch.no_grad():
            for (here, _), before in zip(pairs, kept, strict=True):
                here.copy_(before)


def check_donor(base: PreTrainedModel, donor: PreTrainedModel) -> None:
    """Raise ValueError unless the two models have the same blocks."""
    depths = [len(find_decoder_stack(model).blocks) for model in (base, donor)]
    if depths[0] != depths[1]:
        raise ValueError(f"the base has {depths[0]} blocks and the trained model {depths[1]}: they are no pair")
    for k in range(depths[0]):
        for here, there in _pairs(base, donor, k):
            if here.shape != there.shape:
                shapes = f"{tuple(here.shape)} in the base and {tuple(there.shape)} in the trained model"
                raise ValueError(f"a tensor of block {k} has shape {shapes}: they are no pair")


def _pairs(
    base: PreTrainedModel, donor: PreTrainedModel, k: int
) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    here, there = (dict(find_decoder_stack(model).blocks[k].named_parameters()) for model in (base, donor))
    if here.keys() != there.keys():
        name = min(here.keys() ^ there.keys())
        raise ValueError(f"only one of the two models has {name} in block {k}: they are no pair")
    return [(here[name], there[name]) for name in sorted(here)]


def evaluate_transplants(
    base: PreTrainedModel,
    donor: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    asked: Sequence[Transplant],
    rows: Sequence[dict[str, Any]],
    sampling: Sampling,
) -> Iterator[tuple[Transplant, Evaluation]]:
    """The base with each transplant, on `rows`, as it is measured.

    Raises:
        ValueError: models with other blocks.
    """
    check_donor(base, donor)
    for transplant in asked:
        with transplanted(base, donor, transplant.blocks):
            found = evaluate(base, tokenizer, task, rows, sampling)
        yield transplant, found


def transplant_profile(
    base: PreTrainedModel,
    donor: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    problems: int = 256,
    samples: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> LayerRanking:
    """What each block of a fully trained model gains in the base, put in alone; the base's weights are then as before.

    Args:
        base: the model before training.
        donor: the same after training all parameters.
        problems: of the test split.
        on_block: called with the evaluations that are done and their number.

    Returns:
        A ranking of the method "transplant": scores are gains in mean score; `sweep` has their shares of the full run's
        gain as "contribution", which are no layer contributions: nothing was trained.

    Raises:
        ValueError: models with other blocks.
    """
    check_donor(base, donor)
    rows = task.rows("test", problems, seed)
    sampling = Sampling(samples=samples, seed=seed, batch_size=batch_size)
    depth = len(find_decoder_stack(base).blocks)
    total, scores = depth + 2, {}
    before, after = (evaluate(model, tokenizer, task, rows, sampling) for model in (base, donor))
    on_block(2, total)
    generated = before.tokens_generated + after.tokens_generated
    measured = evaluate_transplants(base, donor, tokenizer, task, transplants(depth, ["single"]), rows, sampling)
    for k, (_, found) in enumerate(measured):
        scores[k] = found.scores
        generated += found.tokens_generated
        on_block(k + 3, total)
    return profile_of_scores(
        scores,
        before.scores,
        after.scores,
        model=base.name_or_path,
        revision=commit_hash(base),
        task=task.name,
        seed=seed,
        samples=samples,
        tokens=generated,
    )


def profile_of_scores(
    scores: Mapping[int, Sequence[float]],
    base: Sequence[float],
    full: Sequence[float],
    *,
    model: str,
    revision: str | None,
    task: str,
    seed: int,
    samples: int,
    tokens: int,
) -> LayerRanking:
    """The ranking from the scores of every block put in alone, (P,) each, as of base and full."""
    depth = len(scores)
    gains = [gain(scores[k], base) for k in range(depth)]
    shares = [layer_contribution(scores[k], base, full) for k in range(depth)]
    order = sorted(range(depth), key=lambda k: -gains[k][0])
    best = order[0]
    differences = {k: gain(scores[best], scores[k]) for k in order}
    return LayerRanking(
        model=model,
        revision=revision,
        num_layers=depth,
        method="transplant",
        scores=[value for value, _ in gains],
        errors=[error for _, error in gains],
        order=order,
        tied=[k for k, (value, error) in differences.items() if value <= Z_95 * (error or 0.0)],
        pick=best if gains[best][0] > Z_95 * (gains[best][1] or 0.0) else None,
        learning_rate=None,
        cost={"tokens_generated": tokens, "tokens_trained": 0, "seconds": 0.0, "share": 0.0},
        task=task,
        seed=seed,
        sweep=Sweep(
            contribution=[share.value for share in shares],
            base=sum(base) / len(base),
            full=sum(full) / len(full),
            contribution_errors=[share.standard_error for share in shares],
            undefined=next((share.reason for share in shares), None),
            means=[sum(scores[k]) / len(scores[k]) for k in range(depth)],
            full_gain=list(gain(full, base)),
            seeds=[seed],
            problems=len(base),
            samples=samples,
            split="test",
        ),
    )
