"""Accuracy of a model on the rows of a task, with standard errors over problems."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.records.figures import CompletionStatistics
from peft_onelayer.tasks import Task
from peft_onelayer.tasks.limits import OVER_LIMIT

from .completions import completion_statistics
from .sampling import DEFAULT, Rollout, sample_rollouts
from .settings import Sampling


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model in one decoding mode.

    Attributes:
        problems: what identifies each problem, in order: its row as JSON.
        scores: one score per problem, the mean reward of its samples.
        samples: completions per problem; 1 for greedy decoding.
        tokens_generated: tokens of all completions, padding behind their end not counted.
        over_limit: completions that the reward stopped scoring at its limit (`tasks/limits.py`); they score 0.
        completions: what the completions look like; None where nothing was sampled for the scores.
        rollouts: the completions of each problem.
    """

    problems: tuple[str, ...]
    scores: tuple[float, ...]
    samples: int
    tokens_generated: int = 0
    over_limit: int = 0
    completions: CompletionStatistics | None = None
    rollouts: Sequence[Sequence[Rollout]] = field(default=(), repr=False, compare=False)

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

    >>> before = Evaluation(problems=("p", "q", "r"), scores=(0.0, 0.5, 1.0), samples=2)
    >>> after = Evaluation(problems=("p", "q", "r"), scores=(0.5, 1.0, 1.0), samples=2)
    >>> difference, error = paired_difference(after, before)
    >>> round(difference, 3), round(error, 3)
    (0.333, 0.167)
    """
    if a.problems != b.problems:
        raise ValueError(f"a paired difference needs the same problems in the same order, got {a.n} and {b.n} problems")
    differences = [x - y for x, y in zip(a.scores, b.scores, strict=True)]
    return statistics.fmean(differences), _standard_error(differences)


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[dict[str, Any]],
    sampling: Sampling = DEFAULT,
    *,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Complete `rows` and score them with the task's reward: avg@k over the samples of a row, or a single greedy one.

    All arguments, what is left as it was, and what is raised: as `sample_rollouts`.
    """
    logged: list[tuple[str, float]] = []
    rollouts = sample_rollouts(
        model,
        tokenizer,
        task,
        rows,
        sampling,
        on_progress=on_progress,
        log_metric=lambda name, value: logged.append((name, value)),
    )
    return Evaluation(
        problems=tuple(map(problem, rows)),
        scores=tuple(statistics.fmean(rollout.reward for rollout in group) for group in rollouts),
        samples=len(rollouts[0]),
        tokens_generated=sum(rollout.tokens for group in rollouts for rollout in group),
        over_limit=sum(int(value) for name, value in logged if name == OVER_LIMIT),
        completions=completion_statistics([rollout for group in rollouts for rollout in group], task),
        rollouts=rollouts,
    )


def problem(row: dict[str, Any]) -> str:
    """What identifies a problem: its row as JSON."""
    try:
        return json.dumps(row, sort_keys=True, default=str)
    except TypeError:  # keys that are no JSON or do not sort
        return json.dumps(str(row))


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
