"""Gives a trainer of TRL the rows of a task so that they reach reward and environment as they are.

The trainer's data set holds the numbers of the rows alone. A prompt is looked up when a batch is drawn, the other
columns when its completions are graded: neither Arrow nor the names of columns that a trainer takes for its own
("completion", "images", "label", "..._logps") play a part.
"""

from __future__ import annotations

import copy
import functools
import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from peft_onelayer.tasks import completion_text
from peft_onelayer.tasks.rows import check_reset, checked_scores, own_reward, own_reward_awaited, reward_columns

Row = Mapping[str, Any]

NUMBER = "onelayer_row"
NO_ANSWER = "completions/no_answer"
OF_TRAINERS = ("prompt", "privileged_context")  # the columns that a trainer reads; the second is SDPOTrainer's


class _Lookup:
    """The transform of the data set: from numbers of rows to what the trainer reads of them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [self.rows[number] for number in batch[NUMBER]]
        names = [name for name in OF_TRAINERS if name in self.rows[0]]
        return {name: [copy.deepcopy(row[name]) for row in rows] for name in names} | {NUMBER: batch[NUMBER]}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Lookup:
        return self  # `Dataset.filter` copies the transform, and the rows are never changed


def numbered(rows: Sequence[Row]) -> Dataset:
    """The data set of the rows for an online trainer."""
    dataset = Dataset.from_dict({NUMBER: list(range(len(rows)))})
    dataset.set_transform(_Lookup(rows))
    return dataset


def graded_by_row(
    reward: Callable[..., list[float]], rows: Sequence[Row], answer: Callable[[str], str | None] | None = None
) -> Callable[..., list[float]]:
    """`reward` for a trainer that was given `numbered(rows)`: with the rows' columns, by name.

    A completion of a chat prompt is a list of messages also with A2POTrainer, which gives its text. Where `answer`
    finds the answer in a completion, the share without one is logged as `NO_ANSWER`.
    """

    @functools.wraps(reward)  # trainers name the metric after it
    def graded(prompts: Sequence[Any], completions: Sequence[Any], **passed: Any) -> list[float]:
        columns = reward_columns([rows[number] for number in passed.pop(NUMBER)])
        completions = [
            completion
            if isinstance(prompt, str) or not isinstance(completion, str)
            else [{"role": "assistant", "content": completion}]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        if answer is not None and "log_metric" in passed:
            none = [answer(completion_text(completion) or "") is None for completion in completions]
            passed["log_metric"](NO_ANSWER, statistics.fmean(none))
        scores = reward(prompts=prompts, completions=completions, **{**columns, **passed})
        return checked_scores(f"the reward {graded.__name__}", scores, len(completions))

    return graded


def reset_by_row(factory: Callable[[], Any], rows: Sequence[Row]) -> Callable[[], Any]:
    """`factory` for a trainer that was given `numbered(rows)`: its environments are reset with the whole row, and what
    they return as a reward of their own is checked.

    Raises:
        ValueError: of `check_reset`, when one is made.
    """

    def make() -> Any:
        environment = factory()
        check_reset(environment)
        reset = environment.reset

        def reset_with_row(**given: Any) -> Any:
            return reset(**copy.deepcopy(dict(rows[given[NUMBER]])))

        environment.reset = reset_with_row
        if hasattr(type(environment), "get_reward"):
            awaited = inspect.iscoroutinefunction(type(environment).get_reward)
            environment.get_reward = functools.partial(own_reward_awaited if awaited else own_reward, environment)
        return environment

    return make
