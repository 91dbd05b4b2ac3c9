"""Writes what the pages of docs/ say of the code: commands, public names, fields of the records, and algorithms.

    python docs/generate.py

cli.md and python.md are written whole; in formats.md and algorithms.md what stands between
`<!-- generated: ... -->` and `<!-- end -->` is.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

DOCS = Path(__file__).parent
MODULES = (
    "peft_onelayer",
    "peft_onelayer.runs",
    "peft_onelayer.rl",
    "peft_onelayer.tasks",
    "peft_onelayer.rollouts",
    "peft_onelayer.tuner",
)
BY_HAND = "Written by `make docs` (docs/generate.py) from the code; changes by hand are lost."
MARKED = re.compile(r"(<!-- generated: (?P<what>[\w.]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
TYPES = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}


def pages() -> dict[Path, str]:
    """The text of every page that is generated, whole or in part."""
    found = {DOCS / "cli.md": cli_page(), DOCS / "python.md": python_page()}
    for name in ("formats.md", "algorithms.md"):
        text = (DOCS / name).read_text(encoding="utf-8")
        found[DOCS / name] = MARKED.sub(lambda match: match[1] + generated(match["what"]), text)
    return found


def generated(what: str) -> str:
    """The table behind a mark: the algorithms, or the fields of a dataclass by its import path."""
    if what == "algorithms":
        return algorithm_table()
    module, _, name = what.rpartition(".")
    return field_table(getattr(importlib.import_module(module), name))


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"


# The commands


def cli_page() -> str:
    import typer

    from onelayer_cli.main import app

    text = f"# Commands\n\n{BY_HAND}\n\n"
    text += (
        "Results go to stdout, progress and warnings to stderr. The exit code is 0 when the command is done, 1 after "
    )
    text += "an\nerror in one line, 2 after wrong usage, and 130 after Ctrl-C. `ONELAYER_DEBUG=1` shows tracebacks.\n"
    callbacks = {info.name: info.callback for info in app.registered_commands}
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        text += f"\n## onelayer {name}\n\n{command.help}\n\n" + "".join(_parameters(name, command, callbacks[name]))
    return text


def _parameters(name: str, command: Any, callback: Callable[..., Any]) -> Iterator[str]:
    hints = typing.get_type_hints(callback)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    words = [p.metavar or p.name.upper() for p in arguments]
    yield f"```\nonelayer {' '.join([name, '[OPTIONS]', *words])}\n```\n\n"
    if arguments:
        yield row("argument", "") + row("---", "---")
        for word, parameter in zip(words, arguments, strict=True):
            yield row(f"`{word}`", parameter.help)
        yield "\n"
    yield row("option", "default", "") + row("---", "---", "---")
    for option in options:
        kind = option.metavar or _type_words(hints[option.name])
        names = [*option.opts, *option.secondary_opts]
        shown = [f"`{n} {kind}`" if kind else f"`{n}`" for n in names]
        yield row(", ".join(shown), _default(option), option.help)


def _type_words(hint: Any) -> str:
    """What stands for the value: "INTEGER", the choices, or "" for a flag."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return _type_words(next(kind for kind in arguments if kind is not NoneType))
    if origin is list:
        return _type_words(arguments[0])
    if origin is Literal:
        return "|".join(arguments)
    return TYPES.get(hint, "")


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.default is None or option.default is False:
        return ""
    if option.default is True:
        return f"`{option.opts[0]}`"
    return f"`{option.default}`"


# The public names


def python_page() -> str:
    text = f"# Python\n\n{BY_HAND}\n\nEvery public name of the package. [Runs](runs.md) has examples.\n"
    seen: set[Any] = set()
    for path in MODULES:
        module = importlib.import_module(path)
        values = {name: getattr(module, name) for name in sorted(module.__all__, key=str.lower) if name[0] != "_"}
        text += f"\n## {path}\n\n{_first_paragraph(module.__doc__)}\n"
        if again := [f"`{name}`" for name, value in values.items() if value in seen]:
            text += f"\nAlso here: {', '.join(again)}.\n"
        for name, value in values.items():
            if value not in seen:
                seen.add(value)
                text += _entry(name, value)
    return text + _reward_section()


def _entry(name: str, value: Any) -> str:
    text = f"\n### {name}\n\n```python\n{_declaration(value)}\n```\n\n{_first_paragraph(value.__doc__)}\n"
    if dataclasses.is_dataclass(value):
        text += "\n" + field_table(value)  # type: ignore[arg-type]
    return text + (_members(value) if inspect.isclass(value) else "")


def _reward_section() -> str:
    from peft_onelayer.tasks import TASKS

    text = "\n## Rewards\n\nEach module `peft_onelayer.tasks.NAME` has one reward in TRL's signature.\n\n"
    text += row("reward", "") + row("---", "---")
    for task in TASKS:
        module = importlib.import_module(f"peft_onelayer.tasks.{task}")
        for name, value in vars(module).items():
            if "reward" in name and inspect.isfunction(value) and value.__module__ == module.__name__:
                text += row(f"`{module.__name__}.{name}`", _first_paragraph(value.__doc__))
    return text


def _first_paragraph(docstring: str | None) -> str:
    """The first paragraph, also where it leads to a list or an example."""
    return re.sub(r":$", ".", inspect.cleandoc(docstring or "").partition("\n\n")[0])


def _declaration(value: Any) -> str:
    """`value` as its source declares it: a function with its signature, a class with its bases and its constructor."""
    node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    if isinstance(node, ast.FunctionDef):
        return _signature(node)
    assert isinstance(node, ast.ClassDef)
    head = f"class {node.name}"
    if node.bases:
        head += f"({', '.join(ast.unparse(base) for base in node.bases)})"
    made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    return "\n".join([head + (":" if made else ""), *(textwrap.indent(_signature(n), "    ") for n in made)])


def _members(kind: type) -> str:
    """One row for each public method and property that the class itself defines and explains."""
    text = ""
    for node in _class_body(kind):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and (said := ast.get_docstring(node)):
            is_property = "property" in map(ast.unparse, node.decorator_list)
            shown = f"{node.name}: {ast.unparse(node.returns)}" if is_property and node.returns else _one_line(node)
            text += row(f"`{shown}`", _first_paragraph(said))
    return "\n" + row("member", "") + row("---", "---") + text if text else ""


def _signature(node: ast.FunctionDef) -> str:
    """`def name(...) -> ...` in one line, or where that is long with one parameter a line."""
    line = f"def {_one_line(node)}"
    if len(line) <= 100:
        return line
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}(\n" + "".join(f"    {part},\n" for part in _parts(node.args)) + f"){result}"


def _one_line(node: ast.FunctionDef) -> str:
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({', '.join(_parts(node.args))}){result}"


def _parts(arguments: ast.arguments) -> list[str]:
    """The parameters as they are declared, without `self` and `cls`."""
    listed = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(listed) - len(arguments.defaults))
    parts = [_part(a, d) for a, d in zip(listed, [*defaults, *arguments.defaults], strict=True)]
    parts = parts[1:] if parts[:1] in (["self"], ["cls"]) else parts
    if arguments.vararg:
        parts.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_part(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [*parts, f"**{ast.unparse(arguments.kwarg)}"] if arguments.kwarg else parts


def _part(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + ("" if default is None else f" = {ast.unparse(default)}")


# The fields of dataclasses


def field_table(kind: type) -> str:
    """One row for each field that the package declares: name, type, default, and what the docstring says of it.

    Raises:
        ValueError: a field that the docstring does not explain, or the reverse.
    """
    text = row("field", "type", "default", "") + row("---", "---", "---", "---")
    for base in reversed(kind.__mro__):
        if not (dataclasses.is_dataclass(base) and base.__module__.startswith("peft_onelayer")):
            continue
        said = _explained(base)
        given = {field.name for field in dataclasses.fields(base) if field.init}
        declared = {ast.unparse(node.target): node for node in _class_body(base) if isinstance(node, ast.AnnAssign)}
        fields = {name: node for name, node in declared.items() if name in given}
        changed = {field.name: "another default" for parent in _dataclass_parents(base) for field in parent}
        if not said.keys() <= fields.keys() <= said.keys() | changed.keys():
            raise ValueError(f"the docstring of {base.__name__} explains {list(said)}, its fields are {list(fields)}")
        for name, node in fields.items():
            default = "" if node.value is None else f"`{_default_value(node.value)}`"
            text += row(f"`{name}`", f"`{ast.unparse(node.annotation)}`", default, (changed | said)[name])
    return text


def _dataclass_parents(kind: type) -> list[tuple[dataclasses.Field[Any], ...]]:
    return [dataclasses.fields(parent) for parent in kind.__bases__ if dataclasses.is_dataclass(parent)]


def _class_body(kind: type) -> list[ast.stmt]:
    node = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(node, ast.ClassDef)
    return node.body


def _default_value(node: ast.expr) -> str:
    """A default as its source has it; of `field(...)` the default or what the factory makes."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "field"):
        return ast.unparse(node)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    return given.get("default") or {"dict": "{}", "list": "[]"}[given["default_factory"]]


def _explained(kind: type) -> dict[str, str]:
    """The entries of "Attributes:" or "Args:" in a class's own docstring."""
    text = inspect.cleandoc(kind.__doc__ or "")
    section = re.search(r"^(?:Attributes|Args):\n((?:[ ]+.*\n?|\n)*)", text, re.MULTILINE)
    entries: dict[str, str] = {}
    for line in textwrap.dedent(section[1]).splitlines() if section else ():
        if entry := re.match(r"(\w[\w, ]*?)(?: \(.*\))?:(?: (.*))?$", line):
            name = entry[1]
            entries[name] = entry[2] or ""
        elif line.strip():
            entries[name] = f"{entries[name]} {line.strip()}".strip()
    return {part.strip(): said for names, said in entries.items() for part in names.split(",")}


# The algorithms


def algorithm_table() -> str:
    from peft_onelayer.rl.algorithms import ALGORITHMS

    text = row("name", "paper", "trainer", "settings", "note") + row("---", "---", "---", "---", "---")
    for name, algorithm in ALGORITHMS.items():
        paper = f"[{algorithm.source}](https://arxiv.org/abs/{algorithm.source})"
        settings = ", ".join(f"`{field}={value!r}`" for field, value in algorithm.settings.items())
        text += row(f"`{name}`", paper, algorithm.trainer.rpartition(".")[2], settings, algorithm.note)
    return text


if __name__ == "__main__":
    for page, content in pages().items():
        page.write_text(content, encoding="utf-8")
