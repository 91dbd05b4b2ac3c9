"""Tasks with verifiable answers: one file per task, with its data, prompt, reward and, for agents, its environment.

Every task module offers

- `load(argument)`: the `Task`; `argument` is what follows the colon of `reasoning_gym:chain_sum`, "" without one.
- one reward whose name holds "reward", in TRL's signature: `reward(prompts, completions, <columns>, **kwargs)` returns
  one float per completion. Completions are plain strings or chat lists (`[{"role": "assistant", "content": "..."}]`).

Importing this package imports no task. The helpers below are what the tasks share.
"""

import difflib
import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Task", "load_task", "open_task"]

TASKS = ("arithmetic", "sort", "gsm8k", "reasoning_gym", "humaneval", "mbpp", "textworld")
RUNS_CODE = ("humaneval", "mbpp")  # tasks whose reward runs what the model wrote, and so take `unsafe`
EXTRA = ("reasoning_gym", "textworld")  # imported by tasks, installed by the extra "tasks"


@dataclass(frozen=True)
class Shown:
    """How a task shows problems of its train split with their solutions, ahead of the problem that is asked (few-shot).

    Attributes:
        question: a row as a base model is asked it: plain text that the solution continues.
        solution: what continues it.
        message: the solution as the assistant's message of a chat; it answers the row's "prompt".
        between: what stands between two problems in plain text.
        end: with which the next problem would begin. A plain completion is graded up to there, because a base model
            goes on with a problem of its own. None where the reward reads no further by itself.
    """

    question: Callable[[Mapping[str, Any]], str]
    solution: Callable[[Mapping[str, Any]], str]
    message: Callable[[Mapping[str, Any]], str]
    between: str = "\n\n"
    end: str | None = None


@dataclass(frozen=True)
class Task:
    """A task as the trainers and the evaluation take it.

    Attributes:
        name: as given to `load_task`, such as "reasoning_gym:chain_sum".
        rows: `rows(split, n, seed)` returns dicts with a "prompt" (plain text, or a list of chat messages) and the
            columns that the reward takes, the same for the same arguments. The problems of "train" and "test" never
            overlap. At most `n` rows, fewer where the split is smaller; those of "test" are distinct.
        reward: in TRL's signature.
        max_completion_tokens: where a completion is cut by default.
        environment_factory: makes one environment per rollout, as TRL's `environment_factory`; None without turns.
        data: what identifies the data for a repetition of the run: versions, revisions, digests.
        answer: the answer that the reward finds in a completion's text, None where it finds none; None for a task that
            does not say what an answer is.
        train_size: rows of the train split; None where they are drawn without end, or it is not known.
        shown: how its problems are shown with their solutions; None where it has no solutions to show.
        end: with which a plain completion goes over to a problem of its own; it counts up to there. None for no such
            text.
        is_over: whether the answer in a plain completion is over although the completion goes on, as that of a base
            model does, so that a cut behind it cuts nothing. None where `end` says so alone.
    """

    name: str
    rows: Callable[[str, int, int], list[dict[str, Any]]]
    reward: Callable[..., list[float]]
    max_completion_tokens: int
    environment_factory: Callable[[], Any] | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    answer: Callable[[str], str | None] | None = None
    train_size: int | None = None
    shown: Shown | None = None
    end: str | None = None
    is_over: Callable[[str], bool] | None = None


def load_task(name: str, *, unsafe: bool = False) -> Task:
    """Import the task `name`, such as "gsm8k", "reasoning_gym:chain_sum" or "path/to/file.py".

    Args:
        unsafe: let a task that runs the model's code do so where no sandbox can be made.

    Raises:
        ValueError: for a name that is neither in `TASKS` nor a Python file, an argument that the task does not take,
            data not found, or a library of the extra "tasks" that is not installed.
    """
    if name.endswith(".py"):
        from peft_onelayer.tasks.user import load_file_task

        return load_file_task(name)
    base, _, argument = name.partition(":")
    if base not in TASKS:
        file = f"{name}.py"
        near = [file] if Path(file).is_file() else difflib.get_close_matches(base, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"task {name!r} is not known; {hint}expected a Python file or one of {', '.join(TASKS)}")
    try:
        module = importlib.import_module(f"{__name__}.{base}")
        return module.load(argument, unsafe=unsafe) if base in RUNS_CODE else module.load(argument)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise ValueError(f"task {base!r} needs {error.name}: pip install 'peft-onelayer[tasks]'") from error


def open_task(
    task: str | Task | None, dataset: str | None = None, reward: str | None = None, *, unsafe: bool = False
) -> Task:
    """The task that was asked for: by itself, by its name, or as a data set with a reward.

    Args:
        task: a task, or a name for `load_task`; None where `dataset` and `reward` are given.
        dataset, reward: as for `peft_onelayer.tasks.user.load_dataset_task`.
        unsafe: as for `load_task`.

    Raises:
        ValueError: neither or both were given, or what was given is no task.
    """
    if task and (dataset or reward):
        raise ValueError("--task comes with its own data and reward; give --task, or --dataset with --reward, not both")
    if isinstance(task, Task):
        return task
    if task:
        return load_task(task, unsafe=unsafe)
    if not dataset or not reward:
        raise ValueError("give --task, or --dataset with --reward")
    from peft_onelayer.tasks.user import load_dataset_task

    return load_dataset_task(dataset, reward)


def as_chat(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with plain prompts turned into one message of the user; chat prompts stay as they are."""
    return [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}]} if isinstance(row["prompt"], str) else row
        for row in rows
    ]


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


def behind_thinking(text: str) -> str:
    r"""Return what of a completion's text may hold its answer: what stands behind the last </think>.

    An unclosed <think> leaves nothing: the completion was cut while it was thinking.

    >>> behind_thinking("<think>3 or 4?</think>\n4"), behind_thinking("<think>It is 4."), behind_thinking("4")
    ('\n4', '', '4')
    """
    opened, closed = text.rfind("<think>"), text.rfind("</think>")
    if opened > closed:
        return ""
    return text if closed < 0 else text[closed + len("</think>") :]


def answer_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """Return the text of a completion that may hold its answer: `behind_thinking` of its `completion_text`."""
    return behind_thinking(completion_text(completion) or "")


def up_to_end(text: str, end: str | None) -> str:
    """Return a completion's text up to `end` (`Task.end`), which does not count where nothing stands before it.

    >>> up_to_end(" 7\\n\\nQuestion: 1 + 1", "\\nQuestion:"), up_to_end("7", None)
    (' 7\\n', '7')
    """
    start = len(text) - len(text.lstrip())
    return text if end is None or (found := text.find(end, start)) < 0 else text[:found]


def number_before_the_stop(text: str) -> str | None:
    """Return the digits that a completion of `arithmetic` or `sort` has up to its first ".", None for anything else.

    >>> number_before_the_stop("0432. A1"), number_before_the_stop("0432"), number_before_the_stop("It is 432.")
    ('0432', '0432', None)
    """
    answer = behind_thinking(text).partition(".")[0]
    return answer if answer.isascii() and answer.isdigit() else None


def exact_match(completions: Sequence[str | Sequence[dict[str, Any]]], answer: Sequence[str]) -> list[float]:
    """Score 1.0 where a completion up to its first "." (or its end) is the answer up to its ".", else 0.0.

    The "." may be missing because a tokenizer that has it as end-of-sequence token drops it when decoding.
    """
    texts = [answer_text(completion) for completion in completions]
    return [
        float(text.partition(".")[0] == expected.partition(".")[0])
        for text, expected in zip(texts, answer, strict=True)
    ]
