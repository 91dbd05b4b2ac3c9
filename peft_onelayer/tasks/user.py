"""A user's own task: a Python file with rows and a reward, or a data set with a reward from a Python file.

    --task path/to/file.py                          rows(split, n, seed), one reward named *reward*; optionally
                                                      MAX_COMPLETION_TOKENS, environment_factory, extract_answer and
                                                      solution
    --dataset file.jsonl --reward file.py:function    a column "prompt"; the other columns reach the reward; the file
                                                      may have extract_answer and solution

`extract_answer(text)` returns the answer that the reward finds in a completion's text, or None: evaluations then say
how many completions hold none. It is given what stands behind </think>. `solution(row)` returns what a model should
write for a row, so that problems can be shown with their solutions (--shots).

A reward may be what TRL takes: a function, also `async def`, a functools.partial, or a callable object. It is called in
the trainer's process, as TRL calls it, and takes the time that it takes. A file that sets `REWARD_SECONDS` has limits
(`limits.py`): its reward is then called in a process without a GPU, with one completion at a time, and without
`trainer_state`, `log_extra` and `log_metric`; past as many seconds of CPU time, five times as many of the clock, or
1 GiB of memory the completion scores 0.

The file runs with all rights of the user, as any Python script, and imports what lies beside it. examples/own_task
shows both ways.
"""

import copy
import difflib
import functools
import importlib.machinery
import importlib.util
import inspect
import itertools
import json
import math
import pickle
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from peft_onelayer.records.text import one_line
from peft_onelayer.tasks import Shown, Task, awaiting, behind_thinking, limits
from peft_onelayer.tasks.files import digest, load_problems
from peft_onelayer.tasks.rows import PASSED, check_columns, check_values, checked_scores

MAX_COMPLETION_TOKENS = 512

_NOT_COLUMNS = {"trainer_state", "log_extra", "log_metric"}  # of what the trainer passes
_NO_LOG = {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None}

_loads = itertools.count()
_folders: set[str] = set()  # those of the files that were imported

Row = dict[str, Any]
Reward = Callable[..., list[float]]


def load_file_task(name: str) -> Task:
    """Return the task that the Python file `name` makes.

    The file has `rows(split, n, seed)`, as `Task.rows`, and exactly one reward whose name holds "reward", in TRL's
    signature: a function or a functools.partial, or, where it has neither of that name, another callable. It may have
    `MAX_COMPLETION_TOKENS` (512), `environment_factory`, `REWARD_SECONDS` (no limit), `extract_answer` and `solution`.

    Of what `rows` returns the first `n` are taken. Where no environment makes every episode another one, a test row
    that repeats one is left out, with a warning, and prompts that this process drew for both splits are warned of.

    Raises:
        ValueError: for a file that is not there, cannot be imported, lacks one of the two functions or has a constant
            that is none; from the task's `rows`, for rows that are no rows; from its `reward`, for a result that is not
            one number per completion.
    """
    path, module = _import(name)
    if not callable(vars(module).get("rows")):
        raise ValueError(f"{path} has no function rows(split, n, seed)")
    named = {key: value for key, value in _callables(module).items() if "reward" in key.lower()}
    functions = [key for key, one in named.items() if inspect.isfunction(one) or isinstance(one, functools.partial)]
    rewards = functions or list(named)  # a model that the reward asks is none
    if len(rewards) != 1:
        found = f"several: {', '.join(sorted(rewards))}" if rewards else "none"
        raise ValueError(f"{path} must have exactly one function whose name holds 'reward'; found {found}")
    (reward_name,) = rewards
    limit = "REWARD_SECONDS" in vars(module)
    environment_factory = _optional(path, module, "environment_factory")
    if environment_factory and limit:
        raise ValueError(f"{path}: REWARD_SECONDS cannot be kept with an environment_factory, whose objects stay here")
    tokens = vars(module).get("MAX_COMPLETION_TOKENS", MAX_COMPLETION_TOKENS)
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"{path}: MAX_COMPLETION_TOKENS must be a whole number of at least 1, got {tokens!r}")
    watched = _Watched(path)

    def rows(split: str, n: int, seed: int) -> list[Row]:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        made = _their_errors(f"{path}:rows")(module.rows)(split, n, seed)
        where = f"rows({split!r}, {n}, {seed}) of {path}"
        _check_rows(where, made, sent=limit)
        given = [*made[0], *(["environments"] if environment_factory else [])]
        _check_signature(f"{path}:{reward_name}", named[reward_name], given, limit)
        return made[:n] if environment_factory else watched.taken(where, split, made[:n])

    return Task(
        name,
        rows,
        _limited(path, module, reward_name),
        tokens,
        environment_factory,
        data={path.name: digest(path)},
        answer=_answer(path, module),
        shown=_shown(path, module),
    )


class _Watched:
    """Tells, once each, that a file's rows repeat test rows or have a prompt in both splits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prompts: dict[str, set[int]] = {"train": set(), "test": set()}  # hashes of those that were drawn
        self.told: set[str] = set()

    def taken(self, where: str, split: str, rows: list[Row]) -> list[Row]:
        """The rows without those of "test" that repeat one."""
        kept = rows if split == "train" else list({repr(row): row for row in rows}.values())
        if repeated := len(rows) - len(kept):
            remedy = "return distinct ones, fewer where there are no more"
            self._tell("repeats", f"{where}: {repeated} of {len(rows)} rows repeat others and are left out; {remedy}")
        self.prompts[split] |= {hash(repr(row["prompt"])) for row in kept}
        if both := self.prompts["train"] & self.prompts["test"]:
            share = f"{len(both)} of the {len(self.prompts['test'])} test prompts are train prompts too"
            self._tell("overlap", f"{self.path}: {share}, so that their score says little of new ones; keep them apart")
        return kept

    def _tell(self, what: str, line: str) -> None:
        if what not in self.told:
            self.told.add(what)
            warnings.warn(line, stacklevel=4)


def load_dataset_task(dataset: str, reward: str) -> Task:
    """Return the task made of a data set and a reward.

    Args:
        dataset: a .jsonl, .jsonl.gz, .csv or .parquet file, a folder with a train and a test file, or a Hub data set
            (`peft_onelayer.tasks.files` says how they are split), with a column "prompt": text, or chat messages.
        reward: "path/to/file.py:function", in TRL's signature.

    Raises:
        ValueError: for data that is not there or is bad, or a reward that is not there or does not take the columns.
    """
    file, _, function = reward.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(f"reward must be 'path/to/file.py:function', got {reward!r}")
    path, module = _import(file)
    functions = _callables(module)
    if function not in functions:
        near = difflib.get_close_matches(function, functions) or sorted(functions)
        raise ValueError(f"{path} has no function {function!r}; it has {', '.join(near) or 'none'}")
    problems = load_problems(dataset, columns=("prompt",))
    for split, rows in problems.splits.items():
        if rows:
            _check_rows(f"{dataset}, split {split!r}", rows)
            _check_signature(reward, functions[function], list(rows[0]), "REWARD_SECONDS" in vars(module))
    return Task(
        dataset,
        problems.rows,
        _limited(path, module, function),
        MAX_COMPLETION_TOKENS,
        data={**problems.data, path.name: digest(path)},
        answer=_answer(path, module),
        train_size=problems.train_size,
        shown=_shown(path, module),
    )


def _optional(path: Path, module: ModuleType, name: str) -> Callable[..., Any] | None:
    found = vars(module).get(name)
    if found is not None and not callable(found):
        raise ValueError(f"{name} of {path} must be a function, got {one_line(repr(found), 60)}")
    return found


def _answer(path: Path, module: ModuleType) -> Callable[[str], str | None] | None:
    """The file's `extract_answer` with its result checked, given what stands behind a completion's thinking."""
    extract = _optional(path, module, "extract_answer")
    if extract is None:
        return None

    def answer(text: str) -> str | None:
        with _their_errors(f"{path}:extract_answer", "mend it, or have it return None where it finds no answer"):
            found = extract(behind_thinking(text))
        if found is not None and not isinstance(found, str):
            raise ValueError(f"extract_answer of {path} must return text or None, got {one_line(repr(found), 60)}")
        return found

    return answer


def _shown(path: Path, module: ModuleType) -> Shown | None:
    """How the file's `solution` shows a row; None where it has none."""
    solve = _optional(path, module, "solution")
    if solve is None:
        return None

    def solution(row: Mapping[str, Any]) -> str:
        with _their_errors(f"{path}:solution"):
            found = solve(copy.deepcopy(dict(row)))
        if not isinstance(found, str):
            raise ValueError(f"solution of {path} must return text, got {one_line(repr(found), 60)}")
        return found

    def question(row: Mapping[str, Any]) -> str:
        return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]

    return Shown(question, solution, solution, end="\n\n")


def _import(name: str, as_module: str | None = None) -> tuple[Path, ModuleType]:
    """Import a task's file anew.

    Args:
        name: its path.
        as_module: the module's name, by which objects of its classes are pickled; None for one of its own.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(as_module or f"onelayer_task_{next(_loads)}", path)
    assert spec is not None and spec.loader is not None  # both are there for a name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look the module up
    try:
        with _as_a_script(str(path.resolve().parent)):
            spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        line = f":{found}" if (found := _line_of(error, path)) else ""
        raise ValueError(f"{path}{line} cannot be imported: {type(error).__name__}: {error}") from error
    return path, module


@contextmanager
def _as_a_script(folder: str) -> Iterator[None]:
    """Modules are looked for in `folder` first; afterwards last, so that none there hides a library from others.

    A module of a name that is in `folder` too is imported anew if another task has it from beside its own file.
    """
    for name in [name for name in sys.modules if "." not in name]:
        file = Path(getattr(sys.modules[name], "__dict__", {}).get("__file__") or "")
        home = str(file.parent.parent if file.name == "__init__.py" else file.parent)
        if home in _folders - {folder} and importlib.machinery.PathFinder.find_spec(name, [folder]):
            for one in [one for one in sys.modules if one.partition(".")[0] == name]:
                del sys.modules[one]
    _folders.add(folder)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _callables(module: ModuleType) -> dict[str, Reward]:
    """Its public functions and other callables, without classes and types."""
    return {
        name: value
        for name, value in vars(module).items()
        if name[0] != "_" and callable(value) and not inspect.isclass(value) and typing.get_origin(value) is None
    }


def _check_rows(where: str, rows: Sequence[Row], *, sent: bool = False) -> None:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{where}: expected a list of at least one dict, got {str(rows)[:60]}")
    for number, row in enumerate(rows):
        prompt = row.get("prompt")
        chat = isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt)
        if not chat and not isinstance(prompt, str):
            raise ValueError(
                f"{where}: row {number} has no 'prompt' that is text or a list of chat messages: "
                f"{one_line(repr(prompt), 60)}"
            )
        if isinstance(prompt, str) != isinstance(rows[0]["prompt"], str):
            kinds = ["chat messages", "text"] if isinstance(prompt, str) else ["text", "chat messages"]
            raise ValueError(
                f"{where}: the prompt of row 0 is {kinds[0]} and that of row {number} {kinds[1]}; give all of them one "
                "form"
            )
        if row.keys() != rows[0].keys():
            raise ValueError(f"{where}: row {number} has the columns {', '.join(row)}, row 0 has {', '.join(rows[0])}")
    check_columns(where, rows[0])
    for number, row in enumerate(rows):
        check_values(f"{where}, row {number}", row)
        if sent:
            _check_sent(f"{where}, row {number}", row)


def _check_sent(where: str, row: Row) -> None:
    for name, value in row.items():
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{where}: the {type(value).__name__} in column {name!r} cannot be sent to the process that scores "
                f"within REWARD_SECONDS, which takes plain data: {one_line(error)}"
            ) from error


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()


def _check_signature(where: str, reward: Reward, columns: Sequence[str], limit: bool) -> None:
    parameters = inspect.signature(reward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(f"{where} must take **kwargs, because the trainer passes more than the columns")
    kept = _NOT_COLUMNS if limit else set()
    given = {*PASSED, *columns} - {"prompt"} - kept - ({"environments"} - set(columns))
    for parameter in parameters:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        optional = parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD
        if not optional and parameter.name in kept:
            raise ValueError(
                f"{where} takes {parameter.name!r}, which no reward with REWARD_SECONDS is given; give it a default, "
                "or leave REWARD_SECONDS out"
            )
        if not optional and not (named and parameter.name in given):
            raise ValueError(f"{where} takes {parameter.name!r}, but is given only {', '.join(sorted(given))}, by name")


def _line_of(error: Exception, path: Path) -> int | None:
    """The last line of the file that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return lines[-1] if lines else None


@contextmanager
def _their_errors(where: str, remedy: str = "mend it") -> Iterator[None]:
    """Turn what a user's function `where`, "file.py:function", raises into one line with the line of the file.

    Args:
        remedy: what to do about it.

    Raises:
        ValueError: the function raised.
    """
    file, _, function = where.rpartition(":")
    try:
        yield
    except Exception as error:
        line = _line_of(error, Path(file).expanduser())
        place = f"{file}:{line}" if line else file
        raise ValueError(
            f"{place}: {function} raised {type(error).__name__}: {one_line(error)}; {remedy} "
            "(ONELAYER_DEBUG=1 shows the traceback)"
        ) from error


def _remedy(completions: Sequence[Any], plays: bool) -> str:
    """What to do about a reward that raised for `completions`; `plays` is whether the task has environments."""
    remedy = "mend it, or have it give 0 to what it cannot grade"
    if not completions or isinstance(completions[0], str):
        return remedy
    strings = "" if plays else ", and --plain gives strings where a row's prompt is text"
    messages = 'lists of messages ([{"role": "assistant", "content": ...}])'
    return f"the model has a chat template, so that completions are {messages}{strings}; {remedy}"


def _checked(where: str, reward: Reward, plays: bool = False) -> Reward:
    """Return `reward`, awaited where it is a coroutine, with its result checked and its errors in one line.

    Args:
        where: "file.py:name".
        plays: as for `_remedy`.
    """
    parameters = inspect.signature(reward).parameters.items()
    needed = [name for name, one in parameters if one.default is one.empty and name in PASSED[2:]]

    def checked(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        kwargs = {name: log for name, log in _NO_LOG.items() if name in needed} | kwargs
        for name in needed:
            if name not in kwargs:
                raise ValueError(f"{where} takes {name!r}, which this trainer does not pass; give it a default")
        with _their_errors(where, _remedy(completions, plays)):
            scores: Any = reward(prompts=prompts, completions=completions, **kwargs)
            if inspect.iscoroutine(scores):
                scores = awaiting.run(scores)
        return checked_scores(where, scores, len(completions))

    checked.__name__ = where.rpartition(":")[2]  # trainers name the metric after it
    return checked


def _limited(path: Path, module: ModuleType, name: str) -> Reward:
    """Return the reward `name` with its result checked and, where its file sets REWARD_SECONDS, within that limit."""
    where = f"{path}:{name}"
    if "REWARD_SECONDS" not in vars(module):
        return _checked(where, vars(module)[name], bool(vars(module).get("environment_factory")))
    seconds = vars(module)["REWARD_SECONDS"]
    if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ValueError(f"{path}: REWARD_SECONDS must be a number above 0, got {seconds!r}")
    function, own = json.dumps([str(path.resolve()), name, digest(path), module.__name__]), "ValueError: "

    def limited(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        columns = {name: values for name, values in kwargs.items() if name not in _NOT_COLUMNS}
        calls = [
            (prompt, completion, {name: values[i] for name, values in columns.items()})
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        try:
            scored = limits.score(f"{__name__}:scorer", function, calls, seconds=float(seconds))
        except limits.ScorerError as error:
            # the file's own errors were put into words, with the place, in the process that scores
            said = one_line(error, 1000)
            raise ValueError(said.removeprefix(own) if said.startswith(own) else f"{where}: {said}") from error
        return limits.settle(scored, kwargs)

    limited.__name__ = name  # trainers name the metric after it
    return limited


def scorer(function: str) -> Callable[[Any, Any, Row], float]:
    """Return what scores one completion by a reward; the process that scores calls this.

    Args:
        function: JSON of the file's path, the reward's name, the file's digest when the task was loaded, and the
            name of its module there.
    """
    name, attribute, expected, as_module = json.loads(function)
    path, module = _import(name, as_module)
    if digest(path) != expected:
        raise ValueError(f"{path} has changed since the task was loaded")
    reward = _checked(f"{path}:{attribute}", vars(module)[attribute])

    def score(prompt: Any, completion: Any, columns: Row) -> float:
        try:
            (value,) = reward([prompt], [completion], **{name: [value] for name, value in columns.items()})
        except ValueError as error:
            if isinstance(error.__cause__, MemoryError):  # past the limit
                raise error.__cause__ from None
            raise
        return value

    return score
