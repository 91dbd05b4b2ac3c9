"""What the code imports is what pyproject.toml declares; what some systems lack is used on the others only."""

import ast
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
MODULES = [*ROOT.glob("peft_onelayer/**/*.py"), *ROOT.glob("cli/*.py")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Modules and names of the standard library that Windows or macOS lack.
NOT_EVERYWHERE = {"fcntl", "grp", "pwd", "resource", "termios", "pty"}
NAMES = {
    "os": {"fork", "getuid", "geteuid", "killpg", "memfd_create", "sched_getaffinity", "sendfile", "setsid", "umask"},
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "alarm", "setitimer"},
}


def imported(tree: ast.AST):
    """Every module that is imported anywhere: node and absolute name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node, node.module or ""


def requirements(lines):
    names = {Requirement(line).name.replace("-", "_") for line in lines}
    return {"yaml" if name == "pyyaml" else name for name in names}


def test_what_is_imported_is_declared_and_the_other_way_round():
    found = set()
    for path in MODULES:
        names = {name.partition(".")[0] for _, name in imported(ast.parse(path.read_text(encoding="utf-8")))}
        found |= names - sys.stdlib_module_names - {"peft_onelayer", "onelayer_cli"}
    extras = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "dev"}
    optional = requirements(line for lines in extras.values() for line in lines)
    assert found - optional == requirements(PROJECT["dependencies"])
    assert found & optional == optional


def behind_a_platform_check(tree: ast.AST) -> set[ast.AST]:
    """What runs only where sys.platform says so: inside an `if` or a conditional expression that asks, or behind an
    early return by such an `if`."""
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for i, statement in enumerate(body):
                if isinstance(statement, ast.If) and "sys.platform" in ast.unparse(statement.test):
                    ends = isinstance(statement.body[-1], (ast.Return, ast.Raise))
                    for part in [statement, *(body[i + 1 :] if ends else [])]:
                        guarded |= set(ast.walk(part))
        if isinstance(node, ast.IfExp) and "sys.platform" in ast.unparse(node.test):
            guarded |= set(ast.walk(node))
    return guarded


def not_everywhere(text: str) -> list[str]:
    """The uses of what is not on every system, outside of platform checks: line and name."""
    tree = ast.parse(text)
    guarded = behind_a_platform_check(tree)
    found = [(node, name) for node, name in imported(tree) if name.partition(".")[0] in NOT_EVERYWHERE]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    found += [
        (node, f"{node.value.id}.{node.attr}")
        for node in attributes
        if isinstance(node.value, ast.Name) and node.attr in NAMES.get(node.value.id, ())
    ]
    return [f"{node.lineno}: {name}" for node, name in found if node not in guarded]


def test_only_the_sandbox_needs_linux():
    found = {}
    for path in MODULES:
        if path.parent.name != "sandbox" and (uses := not_everywhere(path.read_text(encoding="utf-8"))):
            found[str(path.relative_to(ROOT))] = uses
    assert found == {}
    assert not_everywhere((ROOT / "peft_onelayer/sandbox/child.py").read_text(encoding="utf-8"))


def test_what_the_test_above_sees():
    assert not_everywhere("import fcntl") == ["1: fcntl"]
    assert not_everywhere("import os\nos.killpg(1, 9)") == ["2: os.killpg"]
    assert not_everywhere("if sys.platform == 'linux':\n    import fcntl") == []
    assert not_everywhere("n = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else 1") == []
    assert not_everywhere("def f():\n    if sys.platform != 'linux':\n        return\n    import fcntl") == []
    assert not_everywhere("def f():\n    if sys.platform != 'linux':\n        pass\n    import fcntl") == ["4: fcntl"]


def test_the_classifiers_are_the_versions_of_python_that_are_supported():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert named[0] == PROJECT["requires-python"].removeprefix(">=") and "Typing :: Typed" in PROJECT["classifiers"]
