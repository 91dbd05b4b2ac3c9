"""Addition of two three-digit numbers, with leading zeros.

    {"prompt": "A347+085=", "answer": "0432."}

The prompt is always 9 characters, the answer always 4 digits and the full stop that ends it. A million problems, of
which 125,000 are held out; the same sum with its terms exchanged is another problem and may be in the other split. The
reward gives no credit for part of an answer.
"""

from collections.abc import Sequence
from typing import Any

from peft_onelayer.tasks import Shown, Task, draw_problems, exact_match, number_before_the_stop

MAX_COMPLETION_TOKENS = 5  # with one token per character


def rows(split: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Return `n` problems of a split; the same ones for the same arguments.

    Test problems are distinct; train problems may repeat.

    Raises:
        ValueError: for an unknown split, n < 1, or more than the 125,000 test problems.

    >>> rows("test", 1, seed=0)[0].keys()
    dict_keys(['prompt', 'answer'])
    """
    problems = (divmod(number, 1000) for number in draw_problems(split, n, seed, space=10**6))
    return [{"prompt": f"A{a:03d}+{b:03d}=", "answer": f"{a + b:04d}."} for a, b in problems]


def arithmetic_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **kwargs: Any
) -> list[float]:
    """Reward 1.0 for the exact sum and 0.0 for anything else, in TRL's signature.

    Args:
        prompts: not used.
        completions: strings or chat lists; the text after the first "." is ignored, and the "." itself may be missing.
        answer: the data set's column, such as "0432.".
        kwargs: the other columns and what the trainer adds; not used.

    >>> arithmetic_reward(["A347+085="] * 3, ["0432.", "0432", "432."], ["0432."] * 3)
    [1.0, 1.0, 0.0]
    """
    return exact_match(completions, answer)


def load(argument: str = "") -> Task:
    """Return the task; it takes no argument.

    Raises:
        ValueError: for an argument.
    """
    if argument:
        raise ValueError(f"task 'arithmetic' takes no argument, got {argument!r}; write just 'arithmetic'")
    shown = Shown(lambda row: row["prompt"], lambda row: row["answer"], lambda row: row["answer"], between="")
    return Task(
        "arithmetic", rows, arithmetic_reward, MAX_COMPLETION_TOKENS, answer=number_before_the_stop, shown=shown
    )
