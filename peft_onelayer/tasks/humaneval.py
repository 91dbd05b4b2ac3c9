"""HumanEval (arXiv 2107.03374): complete a Python function from its docstring; graded by unit tests in a sandbox.

A row has the data set's own columns. HumanEval/53, shortened:

    task_id             HumanEval/53
    prompt              # Complete the function below. Answer with Python code only, without examples of its use.

                        def add(x: int, y: int):
                            [its docstring]
    entry_point         add
    canonical_solution      return x + y
    test                def check(candidate):
                            assert candidate(0, 1) == 1
                            ...

Its "prompt" is one comment line and then the data set's prompt, word for word. The whole is Python, which a base model
continues, and to a chat model the comment says what to answer.

    humaneval              the Hub data set openai/openai_humaneval
    humaneval:SOURCE       another Hub data set, a .jsonl or .jsonl.gz file, or a folder of them with the same columns

HumanEval is an evaluation set: all its 164 problems, and those of a file whose name does not say "train", are "test",
and there is nothing to train on. To train, give a folder with a train.jsonl of other problems (see files.py).

The tests may call the function, also by its own name, and what the prompt defines above it.
`peft_onelayer/sandbox/__init__.py` says how the code is held, and what that does not cover.
"""

import ast
import functools
import os
import re
import symtable
import textwrap
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_onelayer import sandbox
from peft_onelayer.records.text import one_line
from peft_onelayer.tasks import Shown, Task, answer_text, behind_thinking, completion_text, limits
from peft_onelayer.tasks.files import load_problems

HUB = "openai/openai_humaneval"
COLUMNS = ("prompt", "test", "entry_point")
INSTRUCTION = "# Complete the function below. Answer with Python code only, without examples of its use.\n"
MAX_COMPLETION_TOKENS = 512
PARALLEL = min(16, os.cpu_count() or 1)  # sandboxes at a time
CHECKED = 24  # canonical solutions that are run when the problems are loaded, evenly spread over them
LONGEST = 100_000  # characters of a completion; a longer one scores 0
PARSED = 20_000  # characters of a program that is looked at as Python; a longer one runs as it is
READINGS = 50  # places at which the end of a completion is cut in search of what compiles

_FENCE = re.compile(r"([ \t]*)(?:```|~~~|\[/?PYTHON\]).*\n?")
_STATEMENT = re.compile(
    r"^[ \t]*(?:(?:async[ \t]+)?def\s|(?:return|yield|raise|assert|import|class)\s|pass$|@\w|(?:if|for|while|with)\s.*:"
    r"|(?:try|else):|[A-Za-z_][\w.]*(?:\[[^\n]*\])?[ \t]*[-+*/|&]?=[^=]|[A-Za-z_][\w.]*\()",
    re.MULTILINE,
)
_CODE_STARTS = re.compile(r"(?:def|class|async|from|import)\s|@")
_CLASS = re.compile(r"class[ \t]+(\w+)")
_ASSIGNS = re.compile(r"[A-Za-z_]\w*[ \t]*(?::[^=\n]*)?=[^=]")
_DEFINES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_SHOWS = {"assert", "input", "stdin", "argv", "exit", "_exit", "quit", "unittest", "doctest", "pytest"}

_filters = threading.Lock()  # `catch_warnings` replaces those of the process, and completions are read in threads


def humaneval_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    test: Sequence[str],
    entry_point: Sequence[str],
    *,
    unsafe: bool = False,
    **kwargs: Any,
) -> list[float]:
    """Reward 1.0 for code that passes all unit tests and 0.0 for any other, in TRL's signature.

    A completion is a program that defines the function, or only the function's body, in or without a fence; prose
    around it is ignored, and so is what stands before </think>. `readings` has the rules.

    Args:
        prompts: hold the imports, helpers and head of the function, as plain text or chat lists.
        completions: strings or chat lists.
        test: the data set's column, source that defines `check(candidate)`.
        entry_point: the data set's column, the name of the function.
        unsafe: run the code without a sandbox where none can be made (see `sandbox.run`).
        kwargs: the data set's "prompt", where it is given, is taken in place of `prompts`; `log_metric` is told how
            many programs passed a limit of time; the others are not used.

    Raises:
        SandboxError: where no sandbox can be made and `unsafe` is not set.
        ValueError: for tests that are not Python, or that call the function with something that is not plain data.

    >>> prompt = "def double(x):\\n    '''Twice x.'''\\n"
    >>> test = "def check(candidate):\\n    assert candidate(4) == 8"
    >>> completions = ["    return 2 * x", "```python\\ndef double(x):\\n    return x + x\\n```", "    return 8.5"]
    >>> humaneval_reward([prompt] * 3, completions, [test] * 3, ["double"] * 3)
    [1.0, 1.0, 0.0]
    """
    sandbox.require(unsafe=unsafe)

    def grade(problem: tuple[Any, Any, str, str]) -> float | None:
        prompt, completion, tests, function = problem
        stub = _stub(completion_text(prompt), function)
        text = answer_text(completion)
        programs = list(readings(text, stub, function)) if len(text) <= LONGEST else []
        if not programs:
            return 0.0
        tests = f"{_preamble(stub, function)}\n{tests}\n\ncheck({function})\n"
        outcome = sandbox.run(programs, tests, [function], unsafe=unsafe)
        return None if outcome.reason.startswith(sandbox.OVER_TIME) else float(outcome.passed)

    with ThreadPoolExecutor(PARALLEL) as pool:
        problems = zip(kwargs.get("prompt", prompts), completions, test, entry_point, strict=True)
        return limits.settle(list(pool.map(grade, problems)), kwargs)


def readings(completion: str, stub: str, function: str) -> Iterator[str]:
    """Yield the programs that a completion may be read as, the most likely first; the first that compiles counts.

    Of several fenced blocks the last one that defines the function is taken; where none does, the first one. What the
    blocks above it import and define is put ahead of it.

    - A program is put below what the prompt defines above the function. Prose before its first definition is left out,
      and the end of its top level, as far as that does not compile. So are the examples of its use: statements below
      the function that assert, print, call it, or change nothing that it may need. In a class the function is a method.
    - A body is put below the prompt and ends where the next top-level statement begins. It may have lost its
      indentation, or that of its first line.

    Args:
        completion: what the model wrote.
        stub: imports, helpers and the head of the function, with or without a docstring.
        function: its name.

    >>> stub = "import math\\n\\ndef root(x):\\n    'The square root.'\\n"
    >>> next(readings("return math.sqrt(x)", stub, "root"))
    "import math\\n\\ndef root(x):\\n    'The square root.'\\n    return math.sqrt(x)"
    >>> next(readings("Sure:\\n```\\ndef root(x):\\n    return x ** .5\\n```\\nDone.", stub, "root"))
    'import math\\n\\n\\ndef root(x):\\n    return x ** .5\\n'
    """
    head = _head(function)
    blocks = [textwrap.dedent(block) if i % 2 else block for i, block in enumerate(_blocks(completion))]
    defining = [i for i, block in enumerate(blocks) if head.search(textwrap.dedent(block))]
    if not defining and (method := _method(blocks, function)):
        yield from _programs(method[0], stub, function, defines=method[1])
        return
    if defining:
        block = textwrap.dedent(blocks[defining[-1]])
        if block.strip("\n")[:1].isspace():  # a body, and then the function once more
            yield from _bodies(block, stub)
        above = [part for part in blocks[1 : defining[-1] : 2] if not head.search(part) and _only_defines(part)]
        for program in _programs(block, stub, function, defines=function):
            yield "\n".join([*above, program]) if above and "__future__" not in program else program
        return
    # A fence below a body may only close it; otherwise what stands above a fence is prose.
    starts_indented = blocks[0].strip("\n")[:1].isspace()
    for block in blocks[:2] if starts_indented else blocks[1::-1]:
        if block.strip():
            yield from _bodies(block, stub)


def _blocks(text: str) -> list[str]:
    """Split a text at its fences: what stands in a fence has an odd index.

    A fence that is indented by four more than the one that is open belongs to what stands in it, such as a docstring.
    """
    blocks, indent = [""], None
    for line in text.replace("\r\n", "\n").splitlines(keepends=True):
        fence = _FENCE.fullmatch(line)
        if fence and (indent is None or len(fence[1]) < indent + 4):
            indent = len(fence[1]) if indent is None else None
            blocks.append("")
        elif not fence and indent is not None and line.rstrip().endswith("```") and line.count("```") == 1:
            blocks[-1] += line.rstrip().removesuffix("```")
            indent = None
            blocks.append("")
        else:
            blocks[-1] += line
    return blocks


@contextmanager
def _unwarned() -> Iterator[None]:
    """Nothing is said of a program's strings and comparisons."""
    with _filters, warnings.catch_warnings(action="ignore"):
        yield


def _parsed(code: str) -> list[ast.stmt]:
    """The statements of a program, none of one that does not compile or is too long."""
    if len(code) > PARSED:
        return []
    try:
        with _unwarned():
            tree = ast.parse(code)
            compile(tree, "program", "exec")
            return tree.body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _only_defines(block: str) -> bool:
    body = _parsed(block)
    return bool(body) and all(isinstance(node, _DEFINES | ast.Import | ast.ImportFrom) for node in body)


def _method(blocks: Sequence[str], function: str) -> tuple[str, str] | None:
    """The last block in which a class defines the function, with a line that takes it out of there; and the class."""
    method = re.compile(rf"[ \t]+(?:async[ \t]+)?def[ \t]+{re.escape(function)}\b")
    for block in reversed(blocks):
        lines = block.splitlines(keepends=True)
        defined = next((i for i, line in enumerate(lines) if method.match(line)), 0)
        found = next((match for line in reversed(lines[:defined]) if (match := _CLASS.match(line))), None)
        if found:
            end = next((i for i in range(defined, len(lines)) if not lines[i][0].isspace()), len(lines))
            taken = f"\n\n{function} = {found[1]}().{function}\n"
            return "".join([*lines[:end], taken, *lines[end:]]), found[1]
    return None


def _without_examples(program: str, wanted: set[str]) -> str:
    """The program without the statements below what is wanted that show its use and change nothing it may need."""
    body = _parsed(program)
    below = next((i for i, node in enumerate(body) if getattr(node, "name", "") in wanted), len(body)) + 1
    if not body[below:] or "\r" in program:  # which ends a line for the parser only
        return program
    kept = {line for node in _needed(body, below, program, wanted) for line in _lines(node)}
    lines = program.split("\n")
    for node in reversed(body[below:]):
        if not kept.intersection(_lines(node)):
            lines[node.lineno - 1 : node.end_lineno] = [""]
    return "\n".join(lines)


def _needed(body: Sequence[ast.stmt], below: int, program: str, wanted: set[str]) -> set[ast.stmt]:
    """The statements from `below` on that define or import something, set an attribute or an item of what is defined,
    call it or what is imported, unless that tests or asks, or set what a function or another of these reads."""
    with _unwarned():
        read = _global_names(symtable.symtable(program, "program", "exec"))
    stored = set().union(*map(_sets, body)) - wanted
    defined = {node.name: node for node in body if isinstance(node, _DEFINES)}
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    known = {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names} | set(defined)
    shows = _leading_to(wanted | _SHOWS, defined)

    def acts(node: ast.AST) -> bool:
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = any(_root(target) in known for target in targets if not isinstance(target, ast.Name))
            return named and not _SHOWS & _mentions(node)
        called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _root(node.value) in known
        return called and not shows & _mentions(node)

    kept: set[ast.stmt] = set()
    touching: dict[str, list[ast.stmt]] = {}
    todo = list(read)
    for node in body[below:]:
        if isinstance(node, _DEFINES | ast.Import | ast.ImportFrom):
            kept.add(node)
            todo += _reads_at_once(node)
        elif not _is_example(node, wanted):
            acting = acts(node) or (any(map(acts, ast.walk(node))) and not shows & _mentions(node))
            if acting or _sets(node) & wanted:
                kept.add(node)
                todo += _reads(node)
            for name in {part.id for part in _names(node)} & stored:
                touching.setdefault(name, []).append(node)
    while todo:
        for node in touching.pop(todo.pop(), []):
            if node not in kept:
                kept.add(node)
                todo += _reads(node)
    return kept


def _leading_to(names: set[str], defined: Mapping[str, ast.stmt]) -> set[str]:
    """The names, and the functions and classes that mention one of them or another such function."""
    users: dict[str, list[str]] = {}
    for function, node in defined.items():
        for name in _mentions(node):
            users.setdefault(name, []).append(function)
    found, todo = set(names), list(names)
    while todo:
        new = set(users.get(todo.pop(), [])) - found
        found |= new
        todo += new
    return found


def _is_example(node: ast.stmt, wanted: set[str]) -> bool:
    """Whether a statement asserts, prints, calls what is wanted, or is the main part of a script."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return isinstance(node.value.func, ast.Name) and node.value.func.id in wanted | {"print"}
    return isinstance(node, ast.Assert) or (isinstance(node, ast.If) and "__name__" in _mentions(node.test))


def _sets(node: ast.AST) -> set[str]:
    """The names that a node assigns to."""
    return {part.id for part in _names(node) if isinstance(part.ctx, ast.Store)}


def _reads(node: ast.AST) -> set[str]:
    """The names that a node uses and does not assign to itself."""
    return {part.id for part in _names(node)} - _sets(node)


def _reads_at_once(node: ast.stmt) -> set[str]:
    """The names that a definition uses when it is made; those of its body are `_global_names`."""
    fields = [getattr(node, name, []) for name in ("decorator_list", "args", "bases", "keywords")]
    parts = [part for field in fields for part in (field if isinstance(field, list) else [field])]
    return set().union(*map(_reads, parts))


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _root(node: ast.AST) -> str:
    """The name that a chain of attributes, items and calls begins with, "" for any other."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _mentions(node: ast.AST) -> set[str]:
    """The names and attributes in a node, and "assert" where it asserts."""
    names = {part.id for part in _names(node)}
    names |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    return names | {"assert" for part in ast.walk(node) if isinstance(part, ast.Assert)}


def _names(node: ast.AST) -> Iterator[ast.Name]:
    return (part for part in ast.walk(node) if isinstance(part, ast.Name))


def _global_names(table: symtable.SymbolTable) -> set[str]:
    """The global names that the functions and classes of a program use."""
    names: set[str] = set()
    for child in table.get_children():
        names |= {symbol.get_name() for symbol in child.get_symbols() if symbol.is_global()} | _global_names(child)
    return names


def _head(function: str) -> re.Pattern[str]:
    name = re.escape(function)
    return re.compile(rf"^(?:(?:async[ \t]+)?def[ \t]+{name}\b|{name}[ \t]*=[ \t]*lambda\b)", re.MULTILINE)


def _programs(block: str, stub: str, function: str, *, defines: str) -> Iterator[str]:
    """Readings of a block that defines the function, by itself or in the class `defines`."""
    lines = block.splitlines(keepends=True)
    head = _head(function) if defines == function else re.compile(rf"class[ \t]+{re.escape(defines)}\b")
    defined = next(i for i, line in enumerate(lines) if head.match(line))
    code = next((i for i, line in enumerate(lines) if _CODE_STARTS.match(line)), defined)
    assigns = [i for i in range(code) if _ASSIGNS.match(lines[i])][:1]
    ends = [i for i in range(defined + 1, len(lines)) if not lines[i][0].isspace()]
    for start in dict.fromkeys((0, *assigns, code)):
        for end in (len(lines), *reversed(ends[:READINGS])):
            program = _without_examples("".join(lines[start:end]), {function, defines})
            # a __future__ import has to be the first statement
            yield program if "__future__" in program else f"{_preamble(stub, function)}\n{program}"


def _bodies(block: str, stub: str) -> Iterator[str]:
    block = block.strip("\n")
    lines = block.splitlines(keepends=True)
    top = [i for i in range(1, len(lines)) if not lines[i][0].isspace() and lines[i][0] != "#"]
    first_block = "".join(lines[: top[0]] if top else lines)
    stub = stub.rstrip() + "\n"
    if block[:1].isspace():
        yield stub + textwrap.indent(textwrap.dedent(first_block), "    ")
    else:
        # Indented as a whole, a body that has lost only its first indentation does not compile.
        for end in (len(lines), *reversed(top[:READINGS])):
            yield stub + textwrap.indent("".join(lines[:end]), "    ")
    yield stub + "    " + first_block.lstrip()
    yield stub + block  # a string or bracket may hold lines that only look like top-level statements


def _preamble(stub: str, function: str) -> str:
    """Return what the prompt holds above the function."""
    match = _head(function).search(stub)
    return stub[: match.start()] if match else ""


def _stub(prompt: str, function: str) -> str:
    """Return the code of a prompt, without a fence or prose around it."""
    head = _head(function)
    block = next((block for block in reversed(_blocks(prompt)) if head.search(block)), prompt)
    try:
        compile(f"{block.rstrip()}\n    pass\n", "prompt", "exec")
    except SyntaxError:
        lines = block.splitlines(keepends=True)
        return "".join(lines[next((i for i, line in enumerate(lines) if _CODE_STARTS.match(line)), 0) :])
    return block


def load(argument: str = "", *, unsafe: bool = False) -> Task:
    """Return the task.

    Args:
        argument: where the problems are; the head of this module says what it may be.
        unsafe: let the code run without a sandbox where none can be made.

    Raises:
        SandboxError: where no sandbox can be made and `unsafe` is not set.
        ValueError: for data that is not there, lacks a column, or has tests that are not Python; where the rows have a
            "canonical_solution", for one that does not pass its own tests, of up to `CHECKED` of each split.
    """
    sandbox.require(unsafe=unsafe)
    source = argument or HUB
    problems = load_problems(source, COLUMNS)
    if Path(source).expanduser().is_file() and len(problems.splits) == 2:  # a file that names no split
        problems = replace(problems, splits={"test": [row for rows in problems.splits.values() for row in rows]})
    for row in (row for rows in problems.splits.values() for row in rows):
        _check_tests(row)
    for split, of_split in problems.splits.items():
        _check_canonical(f"{source}, split {split!r}", of_split, unsafe)

    def rows(split: str, n: int, seed: int) -> list[dict[str, Any]]:
        if split == "train" and split not in problems.splits:
            raise ValueError(
                f"{source} holds problems for evaluation only; to train on code, give humaneval:FOLDER with a "
                f"train.jsonl (columns {', '.join(COLUMNS)})"
            )
        return [row | {"prompt": INSTRUCTION + row["prompt"]} for row in problems.rows(split, n, seed)]

    @functools.wraps(humaneval_reward)
    def reward(*args: Any, **kwargs: Any) -> list[float]:
        return humaneval_reward(*args, **kwargs, unsafe=unsafe)

    def solution(row: Mapping[str, Any]) -> str:
        if not isinstance(row.get("canonical_solution"), str):
            raise ValueError(f"a row of {source} has no canonical_solution that could be shown; leave out --shots")
        return row["canonical_solution"]

    return Task(
        f"humaneval:{argument}" if argument else "humaneval",
        rows,
        reward,
        MAX_COMPLETION_TOKENS,
        data=problems.data,
        answer=extract_code,
        is_over=body_is_over,
        train_size=problems.train_size,
        shown=Shown(
            question=lambda row: row["prompt"],
            solution=lambda row: solution(row).rstrip(),
            message=lambda row: f"```python\n{row['prompt'].removeprefix(INSTRUCTION)}{solution(row).rstrip()}\n```",
        ),
    )


def body_is_over(text: str) -> bool:
    r"""Return whether a completion is the body of a function with a statement below that is none of it.

    >>> [body_is_over(text) for text in ("    return 1\n\ndef g():", "    return 1\n# so", "def f():\n    return 1\nx")]
    [True, False, False]
    """
    body = text.strip("\n")
    return body[:1].isspace() and re.search(r"\n[^\s#)\]}]", body) is not None


def extract_code(text: str) -> str | None:
    r"""Return the code that a completion holds, None where it holds none; the reward may read less of it.

    It is the last fenced block that defines a function, else the first one with anything in it; without a fence all of
    the text, if a line of it begins as a statement does.

    >>> extract_code("Sure:\n```python\ndef f():\n    return 1\n```\nDone.")
    'def f():\n    return 1\n'
    >>> extract_code("    return 1"), extract_code("I cannot help with that."), extract_code("<think>def f(): pass")
    ('    return 1', None, None)
    """
    text = behind_thinking(text).replace("\r\n", "\n")
    blocks = _blocks(text)
    if len(blocks) > 1 and not blocks[0].strip("\n")[:1].isspace():
        fenced = [block for block in blocks[1::2] if block.strip()]
        defining = [block for block in fenced if re.search(r"^[ \t]*(?:async[ \t]+)?def\s", block, re.MULTILINE)]
        if found := defining[-1:] or fenced[:1]:
            return found[0]
    return text if _STATEMENT.search(text) else None


def _check_tests(row: dict[str, Any]) -> None:
    try:
        tree = ast.parse(row["test"])
    except SyntaxError as error:
        raise ValueError(f"the tests of {row['entry_point']!r} are not Python: {error}") from error
    if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
        raise ValueError(f"the tests of {row['entry_point']!r} define no check(candidate)")


def _check_canonical(where: str, rows: Sequence[dict[str, Any]], unsafe: bool) -> None:
    """Refuse tests that the data's own solutions fail: they would give every completion 0."""
    solved = [row for row in rows if isinstance(row.get("canonical_solution"), str)]
    chosen = [solved[i * len(solved) // CHECKED] for i in range(CHECKED)] if len(solved) > CHECKED else solved
    for start in range(0, len(chosen), PARALLEL):
        part = chosen[start : start + PARALLEL]
        columns = {name: [row[name] for row in part] for name in ("test", "entry_point")}
        prompts, solutions = ([row[name] for row in part] for name in ("prompt", "canonical_solution"))
        for row, score in zip(part, humaneval_reward(prompts, solutions, **columns, unsafe=unsafe), strict=True):
            if score != 1.0:
                name = row.get("task_id", row["entry_point"])
                raise ValueError(
                    f"{where}: the canonical solution of {name} does not pass its own tests, so"
                    " that no completion could; mend the columns prompt, test and entry_point, or leave out "
                    f"the row or its canonical_solution{_why(row, unsafe)}"
                )


def _why(row: dict[str, Any], unsafe: bool) -> str:
    """What the tests say of the canonical solution of a row, for a message."""
    stub, function = _stub(row["prompt"], row["entry_point"]), row["entry_point"]
    programs = list(readings(row["canonical_solution"], stub, function))
    tests = f"{_preamble(stub, function)}\n{row['test']}\n\ncheck({function})\n"
    reason = sandbox.run(programs, tests, [function], unsafe=unsafe).reason if programs else "it is empty"
    return f" ({one_line(reason)})" if reason else ""
