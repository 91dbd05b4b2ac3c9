"""MBPP (arXiv 2108.07732): write a Python function from a sentence and its tests; graded by them in a sandbox.

A row has the data set's own columns (google-research-datasets/mbpp):

    task_id           11
    text              Write a python function to remove first and last occurrence of a given character from the string.
    code              def remove_Occ(s,ch): ...
    test_setup_code   run before the tests; often ""
    test_list         ['assert remove_Occ("hello","l") == "heo"', ...]

Its "prompt" is the text with the tests, which give the function its name, and asks for Python code only. The columns of
the "sanitized" configuration, "prompt" in place of "text" and "test_imports", are taken too.

    mbpp              the Hub data set google-research-datasets/mbpp, configuration "full"
    mbpp:SOURCE       another Hub data set, a .jsonl or .jsonl.gz file, or a folder of them (see files.py)

A base model is shown problems as in the paper (--shots 3 --plain): "You are an expert Python programmer, and here is
your task: ... Your code should pass these tests: ... [BEGIN]", the code, "[DONE]".

The tests call the program's functions by value (`peft_onelayer/sandbox/__init__.py`). A problem whose tests make
objects of a class that the program defines cannot be graded so, and is left out.
"""

import ast
import builtins
import functools
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from peft_onelayer import sandbox
from peft_onelayer.records.text import one_line
from peft_onelayer.tasks import Shown, Task, answer_text, limits
from peft_onelayer.tasks.files import load_problems
from peft_onelayer.tasks.humaneval import CHECKED, LONGEST, PARALLEL, extract_code, readings

HUB = "google-research-datasets/mbpp:full"
INSTRUCTION = "Answer with Python code only."
MAX_COMPLETION_TOKENS = 512

Row = Mapping[str, Any]


def mbpp_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    test_list: Sequence[Sequence[str]],
    *,
    unsafe: bool = False,
    **kwargs: Any,
) -> list[float]:
    """Reward 1.0 for a program that passes all of its tests and 0.0 for any other, in TRL's signature.

    The program stands in or without a fence; prose around it, what stands before </think>, and what follows "[DONE]"
    are ignored.

    Args:
        prompts: not used.
        completions: strings or chat lists.
        test_list: the data set's column, assertions that call the function.
        unsafe: run the code without a sandbox where none can be made (see `sandbox.run`).
        kwargs: the data set's columns "test_setup_code", "test_imports" and "code" are taken where they are given;
            `log_metric` is told how many programs passed a limit of time; the others are not used.

    Raises:
        SandboxError: where no sandbox can be made and `unsafe` is not set.
        ValueError: for tests that are not Python, or that call the function with something that is not plain data.

    >>> completions = ["Sure:\\n```python\\ndef double(x):\\n    return 2 * x\\n```", "def double(x): return x"]
    >>> mbpp_reward([""] * 2, completions, [["assert double(4) == 8"]] * 2)
    [1.0, 0.0]
    """
    sandbox.require(unsafe=unsafe)
    names = [name for name in ("test_setup_code", "test_imports", "code") if name in kwargs]
    rows = [{"test_list": tests} | {name: kwargs[name][i] for name in names} for i, tests in enumerate(test_list)]

    def grade(problem: tuple[Any, Row]) -> float | None:
        completion, row = problem
        outcome = _outcome(answer_text(completion), row, unsafe)
        return None if outcome.reason.startswith(sandbox.OVER_TIME) else float(outcome.passed)

    with ThreadPoolExecutor(PARALLEL) as pool:
        return limits.settle(list(pool.map(grade, zip(completions, rows, strict=True))), kwargs)


def _outcome(text: str, row: Row, unsafe: bool) -> sandbox.Outcome:
    functions = called_functions(row)
    if len(text) > LONGEST:
        return sandbox.Outcome(False, "the answer is too long")
    programs = list(readings(_program(text), "", functions[0]))
    if not programs:
        return sandbox.Outcome(False, "there is no code")
    return sandbox.run(programs, _tests(row), functions, unsafe=unsafe)


def _program(text: str) -> str:
    """Return a completion without the marks of the paper's prompt and what follows them."""
    return text.partition("[DONE]")[0].rpartition("[BEGIN]")[2]


def extract_answer(text: str) -> str | None:
    """Return the code that a completion holds, None where it holds none; as `extract_code`.

    >>> extract_answer("def f():\\n    return 1\\n[DONE]\\n\\nYou are an expert"), extract_answer("I do not know.")
    ('def f():\\n    return 1\\n', None)
    """
    return extract_code(_program(answer_text(text)))


def _tests(row: Row) -> str:
    imports = row.get("test_imports") or ()
    return "\n".join([*imports, row.get("test_setup_code") or "", *row["test_list"]])


def called_functions(row: Row) -> list[str]:
    """The names of the program's functions that the tests call.

    Raises:
        ValueError: for tests that are not Python or call no function of the program.

    >>> called_functions({"test_list": ["assert set(common((1, 2), (2, 3))) == set((2,))"]})
    ['common']
    """
    try:
        tree = ast.parse(_tests(row))
    except SyntaxError as error:
        raise ValueError(f"the tests of MBPP's {_name(row)} are not Python: {one_line(error)}") from error
    called = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    made = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    made |= {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    functions = [name for name in called if name not in made and (name not in vars(builtins) or _defines(row, name))]
    if not functions:
        raise ValueError(f"the tests of MBPP's {_name(row)} call no function that a program could define")
    return list(dict.fromkeys(functions))


def _defines(row: Row, name: str, kinds: type | tuple[type, ...] = ast.FunctionDef) -> bool:
    """Whether the data set's solution of a row defines `name`; False where there is none to look at."""
    try:
        tree = ast.parse(str(row.get("code") or "").replace("\r\n", "\n"))
    except SyntaxError:
        return False
    return any(isinstance(node, kinds) and getattr(node, "name", None) == name for node in tree.body)


def _name(row: Row) -> str:
    return f"problem {row['task_id']}" if "task_id" in row else f"problem with {str(row['test_list'])[:60]}"


def load(argument: str = "", *, unsafe: bool = False) -> Task:
    """Return the task.

    Up to `CHECKED` of each split's own solutions are run; those that fail their tests in the sandbox are left out, with
    a warning, as are problems whose tests need a class of the program.

    Args:
        argument: where the problems are; the head of this module says what it may be.
        unsafe: let the code run without a sandbox where none can be made.

    Raises:
        SandboxError: where no sandbox can be made and `unsafe` is not set.
        ValueError: for data that is not there, lacks a column, or has tests that are not Python; where more than half
            of the solutions that were run fail.
    """
    sandbox.require(unsafe=unsafe)
    source = argument or HUB
    problems = load_problems(source, columns=("test_list",))
    for row in (row for rows in problems.splits.values() for row in rows):
        _check(source, row)
    kept = {split: _gradable(f"{source}, split {split!r}", rows, unsafe) for split, rows in problems.splits.items()}
    problems = replace(problems, splits=kept)

    def rows(split: str, n: int, seed: int) -> list[dict[str, Any]]:
        return [row | {"prompt": _prompt(row)} for row in problems.rows(split, n, seed)]

    @functools.wraps(mbpp_reward)
    def reward(*args: Any, **kwargs: Any) -> list[float]:
        return mbpp_reward(*args, **kwargs, unsafe=unsafe)

    return Task(
        f"mbpp:{argument}" if argument else "mbpp",
        rows,
        reward,
        MAX_COMPLETION_TOKENS,
        data=problems.data,
        answer=extract_answer,
        is_over=lambda text: "[DONE]" in text,
        train_size=problems.train_size,
        shown=Shown(
            question=_question,
            solution=lambda row: f"{_solution(row)}\n[DONE]",
            message=lambda row: f"```python\n{_solution(row)}\n```",
        ),
    )


def _text(row: Row) -> str:
    return row["text"] if "text" in row else row["prompt"]


def _prompt(row: Row) -> str:
    tests = "\n".join(row["test_list"])
    return f"{_text(row)} Your code should pass these tests:\n\n{tests}\n\n{INSTRUCTION}"


def _question(row: Row) -> str:
    # "text" is not in the rows of the sanitized configuration; what stands before the tests is
    text = row["prompt"].partition(" Your code should pass these tests:\n\n")[0]
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
        f"{tests}\n[BEGIN]\n"
    )


def _solution(row: Row) -> str:
    if not isinstance(row.get("code"), str):
        raise ValueError(f"MBPP's {_name(row)} has no column code that could be shown; leave out --shots")
    return row["code"].replace("\r\n", "\n").rstrip()


def _check(source: str, row: Row) -> None:
    tests = row["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"{source}: test_list must be a list of assertions, got {one_line(repr(tests), 60)}")
    if not isinstance(row.get("text", row.get("prompt")), str):
        raise ValueError(f"{source}: {_name(row)} has no text in a column 'text' or 'prompt'")
    called_functions(row)


def _gradable(where: str, rows: Sequence[dict[str, Any]], unsafe: bool) -> list[dict[str, Any]]:
    """The rows without those that the sandbox cannot grade."""
    of_class = [row for row in rows if any(_defines(row, name, ast.ClassDef) for name in called_functions(row))]
    kept = [row for row in rows if row not in of_class]
    solved = [row for row in kept if isinstance(row.get("code"), str)]
    chosen = [solved[i * len(solved) // CHECKED] for i in range(CHECKED)] if len(solved) > CHECKED else solved

    def why_not(row: dict[str, Any]) -> str:
        try:
            return _outcome(row["code"], row, unsafe).reason
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(PARALLEL) as pool:
        failed = {_name(row): why for row, why in zip(chosen, pool.map(why_not, chosen), strict=True) if why}
    if failed:
        name, why = next(iter(failed.items()))
        said = f"{name}, whose own code does not pass its tests ({one_line(why)})"
        if 2 * len(failed) > len(chosen):
            raise ValueError(f"{where}: {len(failed)} of {len(chosen)} problems tried cannot be graded, such as {said}")
        warnings.warn(f"{where}: left out {len(failed)} of {len(chosen)} problems tried, such as {said}", stacklevel=4)
    if of_class:
        warnings.warn(
            f"{where}: left out {len(of_class)} problems whose tests need a class of the program, such as "
            f"{_name(of_class[0])}",
            stacklevel=4,
        )
    return [row for row in kept if _name(row) not in failed]
