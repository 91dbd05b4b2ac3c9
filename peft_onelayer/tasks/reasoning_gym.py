r"""Any data set of the reasoning_gym library by its name, with the library's own scorer as the reward.

    reasoning_gym:chain_sum

    {"prompt": "State the final answer to the following arithmetic problem: 4 + 3 =\n\n"
               "Reason step by step, and put the final answer between <answer> and </answer>.",
     "question": "State the final answer to the following arithmetic problem: 4 + 3 =",
     "answer": "7", "dataset": "chain_sum", "entry": "..."}

The problems are procedural. Whether one is held out is decided by the hash of its question, whatever the seed, so that
the splits cannot overlap. A test problem takes eight draws on average: minutes where one draw takes seconds, as in
knight_swap and futoshiki. "entry" is the library's own entry as text, since columns cannot hold its mixed types.

The library evaluates some answers as Python (`EVALUATED`) or with sympy (`FORMULAS`), which evaluates Python too. Here
the first may only be literals and the second only formulas, of which nothing can run; others count as no answer. There
is no time limit: a formula that keeps sympy's simplify busy delays the reward. Each data set has its default
configuration. Many scorers give something for a well-formed wrong answer.
"""

import ast
import difflib
import functools
import hashlib
import importlib.metadata
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy

from peft_onelayer.tasks import Task, completion_text
from peft_onelayer.tasks.files import is_held_out

MAX_COMPLETION_TOKENS = 1024
INSTRUCTION = "Reason step by step, and put the final answer between <answer> and </answer>."

# Scorers that call eval(answer) or sympy.parse_expr(answer), in reasoning_gym 0.1.25.
EVALUATED = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
ARITHMETIC = ("countdown", "puzzle24")
FORMULAS = ("intermediate_integration", "polynomial_multiplication", "simple_integration", *ARITHMETIC)

_CHUNK = 500  # entries drawn per seed; some data sets prepare all of them when they are made
_PATIENCE = 300  # draws without a new question, after which all questions count as seen
_ARITHMETIC = re.compile(r"(?:[0-9+\-/() ]|(?<=[0-9])\.(?=[0-9])|(?<!\*)\*(?!\*)){1,300}")
_FUNCTIONS = (
    "sin",
    "cos",
    "tan",
    "exp",
    "log",
    "ln",
    "sqrt",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "pi",
    "Integral",
)
_POWER = (
    r"(?:(?<=[A-Za-z])\*\*(?:-?[0-9]{1,2}|\(-?[0-9]{1,2}(?:/[0-9])?\))"
    r"|(?<=\))\*\*(?:-?[0-9]|\(-?[0-9](?:/[0-9])?\)))(?![0-9])"
)
_FORMULA = re.compile(
    rf"(?:[0-9+\-/(), ]|(?<=[0-9])\.(?=[0-9])|(?<!\*)\*(?!\*)|{_POWER}"
    rf"|(?<![A-Za-z])(?:{'|'.join(_FUNCTIONS)}|[A-Za-z])(?![A-Za-z])){{1,600}}"
)


def reasoning_gym_reward(
    prompts: Sequence[Any], completions: Sequence[Any], dataset: Sequence[str], entry: Sequence[str], **kwargs: Any
) -> list[float]:
    """Score the text in the last <answer>...</answer> of each completion by the library, in TRL's signature.

    A completion without one is scored as no answer, which is 0 in almost all data sets; so is, with 0, an answer that
    the library's scorer fails on.

    Args:
        prompts: not used.
        completions: strings or chat lists.
        dataset: the column of the data sets' names.
        entry: the column of the entries.
        kwargs: the other columns and what the trainer adds; not used.

    >>> rows = load("chain_sum").rows("test", 2, seed=0)
    >>> completions = [f"I think <answer>{rows[0]['answer']}</answer>", rows[1]["answer"]]
    >>> reasoning_gym_reward(["", ""], completions, ["chain_sum"] * 2, [row["entry"] for row in rows])
    [1.0, 0.0]
    """
    from reasoning_gym.utils import extract_answer

    return [
        _score(name, extract_answer(completion_text(completion)), from_text(text))
        for completion, name, text in zip(completions, dataset, entry, strict=True)
    ]


def to_text(value: Any) -> str:
    """Return an entry as JSON from which `from_text` makes an equal one, with its tuples and its keys of any type."""

    def tagged(value: Any) -> Any:
        if isinstance(value, dict):
            return {"dict": [[tagged(key), tagged(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [tagged(item) for item in value]}
        return value

    return json.dumps(tagged(value))


def from_text(text: str) -> Any:
    """Undo `to_text`.

    >>> from_text(to_text({1: (2, [3.5, None])}))
    {1: (2, [3.5, None])}
    """

    def untagged(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, items),) = value.items()
        if kind == "dict":
            return {untagged(key): untagged(item) for key, item in items}
        return {"list": list, "tuple": tuple}[kind](untagged(item) for item in items)

    return untagged(json.loads(text))


def load(argument: str) -> Task:
    """Return the task on the library's data set `argument`.

    Raises:
        ValueError: without a name, for one that the library does not have, or for a data set that has no defaults.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if not argument:
        raise ValueError(
            f"task 'reasoning_gym' needs the name of one of {len(DATASETS)} data sets; write, for example, "
            f"'reasoning_gym:chain_sum' ({', '.join(sorted(DATASETS))})"
        )
    if argument not in DATASETS:
        near = difflib.get_close_matches(argument, DATASETS, n=5) or sorted(DATASETS)
        raise ValueError(f"reasoning_gym has no data set {argument!r}; did you mean one of {', '.join(near)}?")
    try:
        reasoning_gym.create_dataset(argument, size=1, seed=0)
    except AssertionError as error:
        raise ValueError(f"reasoning_gym:{argument} cannot be made from its defaults: {error}") from error
    return Task(
        f"reasoning_gym:{argument}",
        functools.partial(_rows, argument),
        reasoning_gym_reward,
        MAX_COMPLETION_TOKENS,
        data={"reasoning-gym": importlib.metadata.version("reasoning-gym")},
    )


def _rows(name: str, split: str, n: int, seed: int) -> list[dict[str, Any]]:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    repeats = 0
    for entry in _entries(name, f"{split} {seed}"):
        question = entry["question"]
        repeats = repeats + 1 if question in seen else 0
        if repeats == _PATIENCE:
            break
        if question not in seen and is_held_out(question) == (split == "test"):
            rows.append(
                {
                    "prompt": f"{question}\n\n{INSTRUCTION}",
                    "question": question,
                    "answer": entry["answer"],
                    "dataset": name,
                    "entry": to_text(entry),
                }
            )
            if len(rows) == n:
                break
        seen.add(question)
    if not rows:
        raise ValueError(
            f"reasoning_gym:{name} has only {len(seen)} questions, and none of them is in the {split} split"
        )
    return rows


def _entries(name: str, seed: str) -> Iterator[dict[str, Any]]:
    """Yield entries without end, the same for the same `seed`."""
    import reasoning_gym

    chunk = 0
    while True:
        # A hash, because the entries of neighbouring seeds are the same ones: entry i is drawn from Random(seed + i).
        number = int.from_bytes(hashlib.sha256(f"{seed} {chunk}".encode()).digest()[:4]) >> 1
        dataset = reasoning_gym.create_dataset(name, size=_CHUNK, seed=number)
        for index in range(_CHUNK):
            # list_functions and codeio draw from the global generators too
            states = random.getstate(), numpy.random.get_state()
            random.seed(number + index)
            numpy.random.seed(number + index)
            try:
                entry = dataset[index]
            finally:
                random.setstate(states[0])
                numpy.random.set_state(states[1])
            yield entry
        chunk += 1


@functools.lru_cache(maxsize=8)
def _scorer(name: str) -> Any:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, size=1, seed=0)
    if name in EVALUATED:
        sys.modules[type(dataset).__module__].eval = ast.literal_eval  # type: ignore[attr-defined]
    return dataset.score_answer


def _score(name: str, answer: str | None, entry: dict[str, Any]) -> float:
    score_answer = _scorer(name)
    if answer is not None and name in FORMULAS and not _is_formula(name, answer):
        answer = None
    try:
        return float(score_answer(answer, entry))
    except Exception:  # scorers raise on what they cannot read: boxnet on "42", prime_factorization on "seven"
        return 0.0


def _is_formula(name: str, answer: str) -> bool:
    """Tell whether sympy may have this answer: nothing that Python could run, and no tower of powers."""
    if name in ARITHMETIC:
        return _ARITHMETIC.fullmatch(answer) is not None
    return _FORMULA.fullmatch(answer) is not None and answer.count(")**") <= 6
