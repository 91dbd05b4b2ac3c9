"""Sorting eight digits in ascending order; digits may repeat.

    {"prompt": "S51836270=", "answer": "01235678."}

The prompt is always 10 characters, the answer always 8 digits and the full stop that ends it. A hundred million
problems, of which 12,500,000 are held out. Held out are digit *strings*: another order of the same digits, with the
same answer, may be a train problem. The reward gives no credit for part of an answer.
"""

from collections.abc import Sequence
from typing import Any

from peft_onelayer.tasks import Shown, Task, draw_problems, exact_match, number_before_the_stop

MAX_COMPLETION_TOKENS = 9  # with one token per character


def rows(split: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Return `n` problems of a split; the same ones for the same arguments.

    Test problems are distinct; train problems may repeat.

    Raises:
        ValueError: for an unknown split, n < 1, or more than the 12,500,000 test problems.

    >>> rows("test", 1, seed=0)[0].keys()
    dict_keys(['prompt', 'answer'])
    """
    problems = (f"{number:08d}" for number in draw_problems(split, n, seed, space=10**8))
    return [{"prompt": f"S{digits}=", "answer": "".join(sorted(digits)) + "."} for digits in problems]


def sort_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **kwargs: Any
) -> list[float]:
    """Reward 1.0 for the exactly sorted digits and 0.0 for anything else, in TRL's signature.

    Args:
        prompts: not used.
        completions: strings or chat lists; the text after the first "." is ignored, and the "." itself may be missing.
        answer: the data set's column, such as "01235678.".
        kwargs: the other columns and what the trainer adds; not used.

    >>> sort_reward(["S51836270="] * 3, ["01235678.", "01235678", "01235687."], ["01235678."] * 3)
    [1.0, 1.0, 0.0]
    """
    return exact_match(completions, answer)


def load(argument: str = "") -> Task:
    """Return the task; it takes no argument.

    Raises:
        ValueError: for an argument.
    """
    if argument:
        raise ValueError(f"task 'sort' takes no argument, got {argument!r}; write just 'sort'")
    shown = Shown(lambda row: row["prompt"], lambda row: row["answer"], lambda row: row["answer"], between="")
    return Task("sort", rows, sort_reward, MAX_COMPLETION_TOKENS, answer=number_before_the_stop, shown=shown)
