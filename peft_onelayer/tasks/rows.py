"""The one way from a row to the reward, wherever completions are graded: in training, a ranking or an evaluation.

A row reaches the reward as the task made it. Training data of TRL goes through Arrow, which gives all dicts of a column
the same keys and all numbers of a list one type; so trainers are given prompts and numbers of rows
(`peft_onelayer.rl.rows`), and the columns are taken from here.
"""

import copy
import inspect
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from peft_onelayer.records.text import one_line

LARGEST = 1e18  # of a reward: trainers compute in float32, where the squares of larger ones are infinite

# What TRL passes to every reward beside the columns.
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def reward_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of the rows as a reward takes them: all but "prompt", by name, one value per row.

    The values are copies, so that a reward that changes one changes no row.

    >>> reward_columns([{"prompt": "1+1=", "answer": 2}, {"prompt": "1/2=", "answer": 0.5}])
    {'answer': [2, 0.5]}
    """
    return {name: [copy.deepcopy(row[name]) for row in rows] for name in rows[0] if name != "prompt"}


def checked_scores(where: str, scores: Any, expected: int) -> list[float]:
    """What a reward returned, as one float for each of the `expected` completions: of a list, or of an array or
    a tensor of one dimension, as TRL takes them.

    A trainer gives what is None, NaN or infinite no weight or makes NaN of it, and says little or nothing.

    Args:
        where: the reward, for the message.

    Raises:
        ValueError: no such list.
    """
    scores = _plain(scores)
    listed = isinstance(scores, Sequence) and not isinstance(scores, str | bytes)
    if not listed or len(scores) != expected:
        got = len(scores) if listed else f"a {type(scores).__name__}"
        raise ValueError(f"{where} must return a list of {expected} numbers, one per completion; got {got}")
    return [_checked_score(where, score, " per completion") for score in scores]


def own_reward(environment: Any) -> float:
    """What an environment's `get_reward` returns, which TRL adds to the reward.

    Raises:
        ValueError: no finite number.
    """
    kind = type(environment)
    return _checked_score(f"{kind.__name__}.get_reward", kind.get_reward(environment), "")


async def own_reward_awaited(environment: Any) -> float:
    """As `own_reward`, of an environment whose `get_reward` is a coroutine, which TRL awaits."""
    kind = type(environment)
    return _checked_score(f"{kind.__name__}.get_reward", await kind.get_reward(environment), "")


def check_reset(environment: Any) -> None:
    """Raise ValueError for an environment whose `reset` is a coroutine: TRL awaits tools and `get_reward` alone."""
    kind = type(environment)
    if inspect.iscoroutinefunction(kind.reset):
        raise ValueError(f"{kind.__name__}.reset is async, and a trainer does not await it; write def reset")


def _checked_score(where: str, score: Any, of: str) -> float:
    score = _plain(score)
    size: Any = abs(score) if isinstance(score, numbers.Real) else math.inf
    if not size < math.inf:  # which NaN is not, either
        raise ValueError(f"{where} must return one finite number{of}, got {one_line(repr(score), 60)}")
    if size > LARGEST:
        raise ValueError(
            f"{where} must return numbers of at most {LARGEST:g} in size, for trainers' float32, got {score:g}"
        )
    return float(score)


def _plain(value: Any) -> Any:
    """A result of numpy or torch as Python's lists and numbers; others as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_columns(where: str, row: Mapping[str, Any]) -> None:
    """Raise ValueError for a column that no reward can be given.

    Args:
        where: the data, for the message.
    """
    for name in row:
        if not isinstance(name, str):
            raise ValueError(f"{where}: the name of a column must be text, got {name!r}")
    if taken := [name for name in row if name in PASSED]:
        raise ValueError(
            f"{where}: a column may not be called {taken[0]!r}, which the trainer passes itself; rename it"
        )


def check_values(where: str, row: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that cannot be copied, such as an open file.

    Args:
        where: the row, for the message.
    """
    for name, value in row.items():
        try:
            copy.deepcopy(value)
        except (TypeError, ValueError, AttributeError, RecursionError, copy.Error) as error:
            raise ValueError(
                f"{where}: the {type(value).__name__} in column {name!r} cannot be copied, and rows hold plain data: "
                f"{error}"
            ) from error
