"""What the race is compared with: a few GRPO steps on each block alone, then a measurement, and the best is picked."""

from __future__ import annotations

import time

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.rl.recipe import Recipe
from peft_onelayer.rl.training import train_layer
from peft_onelayer.rollouts.evaluation import Evaluation, evaluate, paired_difference
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.statistics import Z_95
from peft_onelayer.tasks import Task
from peft_onelayer.tuner import find_decoder_stack

STEPS, PROBLEMS, SAMPLES = 8, 256, 4


def rank_by_short_runs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    recipe: Recipe,
    training_steps: int,
    seed: int,
) -> LayerRanking:
    """Rank all blocks by the accuracy gained in `STEPS` GRPO steps, paired over `PROBLEMS` of the training split.

    Args:
        training_steps: length of the training run that the cost is given as a share of.
    """
    start = time.perf_counter()
    num_layers = len(find_decoder_stack(model).blocks)
    rows = task.rows("train", PROBLEMS, seed + 1)

    def measure() -> Evaluation:
        return evaluate(model, tokenizer, task, rows, Sampling(samples=SAMPLES, seed=seed, batch_size=1024))

    base = measure()
    after: list[Evaluation] = []
    of_runs = 0  # tokens of the short runs
    for layer in range(num_layers):
        result = train_layer(model, tokenizer, task, layer, steps=STEPS, seed=seed, recipe=recipe)
        after.append(measure())
        result.model.unload()
        of_runs += result.tokens_generated + result.tokens_trained

    gains = [paired_difference(evaluation, base) for evaluation in after]
    order = sorted(range(num_layers), key=lambda k: -gains[k][0])
    best = order[0]
    against = [paired_difference(after[best], other) for other in after]
    measured = sum(evaluation.tokens_generated for evaluation in (base, *after))
    return LayerRanking(
        model=model.name_or_path,
        revision=None,
        num_layers=num_layers,
        method="short_runs",
        scores=[gain for gain, _ in gains],
        errors=[error for _, error in gains],
        order=order,
        tied=[k for k in order if k == best or against[k][0] <= Z_95 * against[k][1]],
        pick=best if gains[best][0] > Z_95 * gains[best][1] else None,
        learning_rate=recipe.settings["learning_rate"],
        cost={
            "tokens": of_runs + measured,
            "seconds": round(time.perf_counter() - start, 1),
            "share": round((of_runs + measured) / (of_runs / num_layers / STEPS * training_steps), 3),
        },
        task=task.name,
        seed=seed,
    )
