"""What the race is compared with: a few GRPO steps on each block alone, then a measurement, and the best is picked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.probe.ranking import LayerRanking
from peft_onelayer.rl.run import Recipe, demo_recipe, train_layer
from peft_onelayer.tasks import Task
from peft_onelayer.tasks.evaluation import Evaluation, evaluate, paired_difference
from peft_onelayer.tuner import find_decoder_stack
from peft_onelayer.tuner.model import commit_hash

Z_95 = 1.959964  # two-sided 95 % point of the normal distribution


def rank_by_short_runs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    layers: Sequence[int] | None = None,
    steps: int = 8,
    problems: int = 256,
    samples: int = 4,
    seed: int = 0,
    training_steps: int = 150,
    recipe: Recipe | None = None,
    batch_size: int = 1024,
    on_step: Callable[[int, int, float], None] = lambda layer, step, reward: None,
) -> LayerRanking:
    """Rank `layers` (default: all) by the accuracy gained in `steps` GRPO steps.

    The score is the mean over `problems` of the task's training split of (accuracy after - accuracy of the base), at
    temperature 1 with `samples` completions each; its error is the paired standard error over problems. `model` is
    wrapped, trained and unwrapped for each block; its weights are bit for bit what they were afterwards.

    Args:
        training_steps: length of the training run that the cost is given as a share of.
        recipe: the algorithm and its settings (default: `demo_recipe`).
        batch_size: completions generated at a time when measuring.
        on_step: called with (layer, step, mean reward).
    """
    start = time.perf_counter()
    stack = find_decoder_stack(model)
    num_layers = len(stack.blocks)
    chosen = list(range(num_layers)) if layers is None else list(layers)
    # The training split, so that a final evaluation on held-out problems has not been selected on.
    rows = task.rows("train", problems, seed + 1)

    def measure() -> Evaluation:
        return evaluate(model, tokenizer, task, rows, samples=samples, seed=seed, batch_size=batch_size)

    base = measure()
    after: dict[int, Evaluation] = {}
    generated = base.tokens_generated
    of_runs = trained = 0  # tokens generated, and trained on, in the short runs
    for layer in chosen:
        result = train_layer(
            model,
            tokenizer,
            task,
            layer,
            steps=steps,
            seed=seed,
            recipe=recipe,
            on_step=lambda step, reward, layer=layer: on_step(layer, step, reward),  # type: ignore[misc]
        )
        after[layer] = measure()
        result.model.unload()
        generated += after[layer].tokens_generated
        of_runs += result.tokens_generated
        trained += result.tokens_trained

    gains = {layer: paired_difference(evaluation, base) for layer, evaluation in after.items()}
    order = sorted(chosen, key=lambda layer: -gains[layer][0])
    best = order[0]
    tied = [layer for layer in order if layer == best or _indistinguishable(after[best], after[layer])]
    gain, error = gains[best]
    generated += of_runs
    one_run = (of_runs + trained) / len(chosen) / steps * training_steps
    return LayerRanking(
        model=model.name_or_path,
        revision=commit_hash(model),
        num_layers=num_layers,
        method="short_rl",
        scores=[gains[layer][0] if layer in gains else None for layer in range(num_layers)],
        errors=[gains[layer][1] if layer in gains else None for layer in range(num_layers)],
        order=order,
        tied=tied,
        pick=best if gain > Z_95 * error else None,
        learning_rate=(recipe or demo_recipe(task, steps)).settings["learning_rate"],
        cost={
            "tokens_generated": generated,
            "tokens_trained": trained,
            "seconds": round(time.perf_counter() - start, 1),
            "share": round((generated + trained) / one_run, 3),
        },
        task=task.name,
        seed=seed,
    )


def _indistinguishable(best: Evaluation, other: Evaluation) -> bool:
    difference, error = paired_difference(best, other)
    return difference <= Z_95 * error
