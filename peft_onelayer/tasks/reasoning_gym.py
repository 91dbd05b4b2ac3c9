r"""Any data set of the reasoning_gym library by its name, with the library's own scorer as the reward.

    reasoning_gym:chain_sum

    {"prompt": "State the final answer to the following arithmetic problem: 4 + 3 =\n\n"
               "Reason step by step, and put the final answer between <answer> and </answer>.",
     "question": "State the final answer to the following arithmetic problem: 4 + 3 =",
     "answer": "7", "dataset": "chain_sum", "entry": "..."}

The problems are procedural. Whether one is held out is decided by the hash of its question, whatever the seed, so that
the splits cannot overlap. A test problem takes eight draws on average: minutes where one draw takes seconds, as in
knight_swap and futoshiki. "entry" is the library's own entry as text, since columns cannot hold its mixed types.

The answer stands in the last <answer>...</answer>. Where a data set's answers are whole numbers or single words
(`WHOLE_NUMBERS` and `WORDS` in `gym_answers.py`) the tags may be missing: the answer is then the one in a box, behind
"the answer is", or alone in the last line; a whole number is read as `gsm8k` reads it, also from the last sentence.
What stands before </think> is not looked at.

`gym_answers.py` says which answers the library's scorers may see: nothing that Python could run, and nothing that they
pay for without its being right. Every other answer scores 0, as does a completion without one. A scorer that takes
longer than the limit of `limits.py` on a completion is stopped, and the completion scores 0.

Each data set has its default configuration. Many scorers give something for a well-formed wrong answer, and some for a
constant one: docs/tasks.md has the table.
"""

import ast
import difflib
import functools
import hashlib
import importlib.metadata
import io
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stdout
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy

from peft_onelayer.tasks import Shown, Task, behind_thinking, completion_text, limits
from peft_onelayer.tasks.files import is_held_out
from peft_onelayer.tasks.gsm8k import marked_alike
from peft_onelayer.tasks.gym_answers import (
    EVALUATED,
    INTEGRALS,
    LONGEST,
    UNTAGGED,
    is_answer,
    read,
)

MAX_COMPLETION_TOKENS = 1024
INSTRUCTION = "Reason step by step, and put the final answer between <answer> and </answer>."

_CHUNK = 500  # entries drawn per seed; some data sets prepare all of them when they are made
_PATIENCE = 300  # draws without a new question, after which all questions count as seen


def reasoning_gym_reward(
    prompts: Sequence[Any], completions: Sequence[Any], dataset: Sequence[str], entry: Sequence[str], **kwargs: Any
) -> list[float]:
    """Score the answer of each completion (`extract_answer`) by the library, in TRL's signature.

    A completion scores 0 without an answer, with one that `is_answer` refuses or the library's scorer fails on, and
    where scoring passes the limits. Other scores are the library's own, from 0 to 1.

    Args:
        prompts: not used.
        completions: strings or chat lists.
        dataset: the column of the data sets' names.
        entry: the column of the entries.
        kwargs: the other columns and what the trainer adds; `log_metric` is told how many passed the limit.

    Raises:
        ScorerError: where no process that scores can be kept.

    >>> rows = load("chain_sum").rows("test", 2, seed=0)
    >>> completions = [f"I think <answer>{rows[0]['answer']}</answer>", "I do not know."]
    >>> reasoning_gym_reward(["", ""], completions, ["chain_sum"] * 2, [row["entry"] for row in rows])
    [1.0, 0.0]
    """
    answers = [
        extract_answer(completion_text(completion) or "", name)
        for completion, name in zip(completions, dataset, strict=True)
    ]
    scored: list[float | None] = [0.0] * len(answers)
    for name in dict.fromkeys(dataset):
        calls = {
            i: (answer, text)
            for i, (answer, own, text) in enumerate(zip(answers, dataset, entry, strict=True))
            if own == name and answer is not None and len(answer) <= LONGEST
        }
        results = limits.score(f"{__name__}:scorer", name, list(calls.values()))
        for i, result in zip(calls, results, strict=True):
            scored[i] = result
    return limits.settle(scored, kwargs)


def extract_answer(text: str, dataset: str = "") -> str | None:
    """Return the answer in a completion's text for a data set, None where there is none, in time linear in the text.

    It is what stands in the last <answer>...</answer>, as in reasoning_gym.utils. Without a tag it is a whole number or
    a word where the answers of `dataset` are such; a tag that is not closed leaves no answer.

    >>> extract_answer("<answer>3</answer> or <answer> 4 </answer>"), extract_answer("<answer>4"), extract_answer("4")
    ('4', None, None)
    >>> extract_answer("2 + 2 = 4, so the answer is 4.", "chain_sum"), extract_answer("**True**", "course_schedule")
    ('4', 'True')
    """
    text = marked_alike(behind_thinking(text))
    if "<answer>" not in text:
        return read(dataset, text, tagged=False)
    answer, end = None, 0
    while (start := text.find("<answer>", end)) >= 0 and (end := text.find("</answer>", start)) >= 0:
        answer = text[start + len("<answer>") : end]
        end += len("</answer>")
    return None if answer is None else read(dataset, answer, tagged=True)


def to_text(value: Any) -> str:
    """Return an entry as JSON from which `from_text` makes an equal one, with its tuples and its keys of any type."""

    def tagged(value: Any) -> Any:
        if isinstance(value, dict):
            return {"dict": [[tagged(key), tagged(item)] for key, item in value.items()]}
        if isinstance(value, Fraction):  # in gsm_symbolic, of some rows
            return {"Fraction": [value.numerator, value.denominator]}
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
        if kind == "Fraction":
            return Fraction(*items)
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
        answer=functools.partial(extract_answer, dataset=argument),
        shown=Shown(
            question=lambda row: f"Question: {row['question']}\nAnswer:",
            solution=lambda row: f" {_bare(row)}",
            message=_tagged,
            end="\n\n",
        ),
    )


def _tagged(row: Mapping[str, Any]) -> str:
    if row["answer"] is None:
        raise ValueError(
            f"reasoning_gym:{row['dataset']} comes without solutions, so none can be shown; leave out --shots"
        )
    return f"<answer>{row['answer']}</answer>"


def _bare(row: Mapping[str, Any]) -> str:
    return str(row["answer"]) if row["dataset"] in UNTAGGED else _tagged(row)


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
        if name in INTEGRALS and "Integral" in entry["answer"]:  # sympy could not, and the answer is the question
            continue
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
                with _kept_apart() as folder:
                    entry = dataset[index]
            finally:
                random.setstate(states[0])
                numpy.random.set_state(states[1])
            if folder not in f"{entry['question']}{entry['answer']}":  # a problem of codeio asks for a path in it
                yield entry
        chunk += 1


@contextmanager
def _kept_apart() -> Iterator[str]:
    """In an empty folder, whose random name it yields, and without standard output: codeio runs the programs that it is
    made of, which write files where they are, and several data sets print."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder), redirect_stdout(io.StringIO()):
        yield Path(folder).name


def scorer(name: str) -> Callable[[str, str], float]:
    """Return what scores an answer by the entry's text, from 0 to 1; the process that scores calls this."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, size=1, seed=0)
    if name in EVALUATED:
        sys.modules[type(dataset).__module__].eval = ast.literal_eval  # type: ignore[attr-defined]

    def score(answer: str, text: str) -> float:
        entry = from_text(text)
        if not is_answer(name, answer, entry):
            return 0.0
        try:
            reward = float(dataset.score_answer(answer, entry))
        except MemoryError:
            raise
        except Exception:  # scorers raise on what they cannot read: boxnet on "42", prime_factorization on "seven"
            return 0.0
        # calendar_arithmetic gives e^5 and more for wrong answers where -1 is right
        return reward if 0 <= reward <= 1 else 0.0

    with _kept_apart():
        first = dataset[0]
    score(str(first["answer"]), to_text(first))  # what scorers and sympy load at their first use, outside of the limit
    return score
