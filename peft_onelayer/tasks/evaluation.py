"""Accuracy of a model on the rows of a task, with standard errors over problems.

It knows nothing about a particular task (the rows and the reward come from the caller), about chat templates (prompts
are plain strings) or about training.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model in one decoding mode.

    Attributes:
        prompts: the problems, in order.
        scores: one score per problem, the mean reward of its samples.
        samples: completions per problem; 1 for greedy decoding.
        tokens_generated: tokens of all completions, padding behind their end not counted.
    """

    prompts: tuple[str, ...]
    scores: tuple[float, ...]
    samples: int
    tokens_generated: int = 0

    @property
    def n(self) -> int:
        """Number of problems."""
        return len(self.scores)

    @property
    def mean(self) -> float:
        """Mean score over problems."""
        return statistics.fmean(self.scores)

    @property
    def standard_error(self) -> float:
        """Standard error of `mean`: sample standard deviation (n - 1) of the problems' scores / sqrt(n).

        The samples of a problem are a cluster and count as one observation. NaN for a single problem.
        """
        return _standard_error(self.scores)


def paired_difference(a: Evaluation, b: Evaluation) -> tuple[float, float]:
    """Return the mean of `a - b` over the problems that both were measured on, and its standard error.

    Pairing removes the part of the error that comes from which problems were drawn.

    Raises:
        ValueError: when the two were not measured on the same problems in the same order.

    >>> before = Evaluation(prompts=("p", "q", "r"), scores=(0.0, 0.5, 1.0), samples=2)
    >>> after = Evaluation(prompts=("p", "q", "r"), scores=(0.5, 1.0, 1.0), samples=2)
    >>> difference, error = paired_difference(after, before)
    >>> round(difference, 3), round(error, 3)
    (0.333, 0.167)
    """
    if a.prompts != b.prompts:
        raise ValueError(f"a paired difference needs the same problems in the same order, got {a.n} and {b.n} problems")
    differences = [x - y for x, y in zip(a.scores, b.scores, strict=True)]
    return statistics.fmean(differences), _standard_error(differences)


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, str]],
    reward: Callable[..., list[float]],
    *,
    max_new_tokens: int,
    greedy: bool = False,
    samples: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 1024,
) -> Evaluation:
    """Generate completions for `rows` and score them: `samples` per row, or a single greedy one.

    Sampling is from the full distribution (no top-k, no top-p, no penalties). The model stays on its device; its train
    or eval mode and torch's random state are as before afterwards.

    Args:
        rows: dicts with a "prompt" and the columns that the reward takes.
        reward: a reward in TRL's signature, called with lists.
        max_new_tokens: where a completion is cut that did not end by itself.
        greedy: decode greedily, once per row; `samples` and `temperature` then play no part.
        samples: completions per row.
        temperature: of sampling.
        seed: of sampling; the samples also depend on `batch_size`.
        batch_size: completions generated at a time.

    Raises:
        ValueError: without rows, or with samples < 1.
    """
    if not rows or samples < 1:
        raise ValueError(f"evaluation needs at least one row and one sample, got {len(rows)} rows, samples={samples}")
    samples = 1 if greedy else samples
    # Spelled out because generate() fills every field left out from the model's own generation_config.json.
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **({} if greedy else sampling),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    training_modules = [module for module in model.modules() if module.training]
    repeated = [row for row in rows for _ in range(samples)]
    rewards: list[float] = []
    tokens_generated = 0
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for start in range(0, len(repeated), batch_size):
                batch = repeated[start : start + batch_size]
                columns = {name: [row[name] for row in batch] for name in batch[0]}
                prompts = columns.pop("prompt")
                inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
                tokens = model.generate(**inputs, generation_config=generation_config)  # (B, P + T)
                tokens = tokens[:, inputs["input_ids"].shape[1] :]  # (B, T)
                tokens_generated += int((tokens != tokenizer.pad_token_id).sum())
                completions = tokenizer.batch_decode(tokens, skip_special_tokens=True)
                rewards += reward(prompts=prompts, completions=completions, **columns)
    finally:
        for module in training_modules:
            module.training = True
    return Evaluation(
        prompts=tuple(row["prompt"] for row in rows),
        scores=tuple(statistics.fmean(rewards[i : i + samples]) for i in range(0, len(rewards), samples)),
        samples=samples,
        tokens_generated=tokens_generated,
    )


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
