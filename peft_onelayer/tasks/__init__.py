"""Tasks with verifiable answers: one file per task, with its data, its prompt and its reward.

What every task offers:

- `rows(split, n, seed)`: dicts with a "prompt" and the data set's other columns, the same for the same arguments. The
  problems of "train" and "test" never overlap.
- one reward whose name holds "reward", in TRL's signature: `reward(prompts, completions, <columns>, **kwargs)` returns
  one float per completion. Completions are plain strings or chat lists (`[{"role": "assistant", "content": "..."}]`).

- `MAX_COMPLETION_TOKENS`, where a completion is cut.

Importing this package imports no task. It knows nothing about models, tokenizers or trainers; the helpers below are
what the tasks share.
"""

import importlib
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

TASKS = ("arithmetic", "sort")


class Task(NamedTuple):
    """A task as the trainers and the evaluation take it; see the module's docstring for the fields."""

    name: str
    rows: Callable[[str, int, int], list[dict[str, str]]]
    reward: Callable[..., list[float]]
    max_completion_tokens: int


def load_task(name: str) -> Task:
    """Import the task `name`.

    Raises:
        ValueError: for a name that is not in `TASKS`.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not known; expected {' or '.join(TASKS)}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Task(name, module.rows, getattr(module, f"{name}_reward"), module.MAX_COMPLETION_TOKENS)


HELD_OUT = 8  # one problem in eight belongs to the test split
_MULTIPLIER = 61_803_399  # golden section x 10^8; ends in 9, so multiplying by it permutes range(10^k)


def draw_problems(split: str, n: int, seed: int, space: int) -> list[int]:
    """Draw `n` problem numbers of a split from `range(space)`, `space` a power of ten.

    Test problems are distinct; train problems may repeat.

    Raises:
        ValueError: for an unknown split, n < 1, or more test problems than exist.
    """
    # The splits are two ranges of the multiplicative hash of a problem (problem = hash * multiplier mod space, one to
    # one), so that no problem is in both. Membership is decided by the hash's high digits, and those depend on every
    # digit of the problem. A hash that is linear mod 10, such as (3a + 7b) % 10 == 0, would tie the last digits
    # together: a + b of every held-out sum could then end in the same digit.
    held_out = space // HELD_OUT
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rng = random.Random(f"{split} {seed}")
    if split == "train":
        hashes = [rng.randrange(held_out, space) for _ in range(n)]
    elif split == "test":
        if n > held_out:
            raise ValueError(f"the test split has {held_out} problems, got n={n}")
        hashes = rng.sample(range(held_out), n)
    else:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    return [number * _MULTIPLIER % space for number in hashes]


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """Return the text of a completion: the string itself, or the content of the last message of a chat list."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_match(completions: Sequence[str | Sequence[dict[str, Any]]], answer: Sequence[str]) -> list[float]:
    """Score 1.0 where a completion up to its first "." (or its end) is the answer up to its ".", else 0.0.

    The "." may be missing because a tokenizer that has it as end-of-sequence token drops it when decoding.
    """
    texts = [completion_text(completion) for completion in completions]
    return [
        float(text.partition(".")[0] == expected.partition(".")[0])
        for text, expected in zip(texts, answer, strict=True)
    ]
