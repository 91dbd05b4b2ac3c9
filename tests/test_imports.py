"""Imports point one way: the order that CONTRIBUTING states, held for every module of the package and the commands."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def stated_order() -> dict[str, int]:
    """The height of each room: those before an arrow stand above those behind it, those between commas beside them."""
    (chain,) = re.findall(r"^```\n(cli -> .*?)```", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    levels = [re.findall(r"\w+", level) for level in chain.split("->")]
    return {room: -depth for depth, level in enumerate(levels) for room in level}


ORDER = stated_order()


def room_of(module: str) -> str | None:
    """ "peft_onelayer.rl.gigpo" -> "rl"; None for the package itself, which imports on first use only."""
    parts = module.split(".")
    if parts[0] == "onelayer_cli":
        return "cli"
    return parts[1] if parts[0] == "peft_onelayer" and len(parts) > 1 and parts[1] != "__main__" else None


def modules():
    for folder, package in (("cli", "onelayer_cli"), ("peft_onelayer", "peft_onelayer")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            yield ".".join(parts[:-1] if is_package else parts), is_package, path


def imported(name: str, is_package: bool, path: Path):
    """The modules of ours that a module imports, wherever in it: line and absolute name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (
                (node.lineno, f"{module}.{alias.name}" if module.count(".") < 1 else module) for alias in node.names
            )


@pytest.mark.parametrize(
    ("name", "is_package", "path"), modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_it_imports_only_what_is_below(name, is_package, path):
    own = room_of(name)
    if own is None:
        pytest.skip("the package's own names are imported on their first use")
    assert own in ORDER, f"CONTRIBUTING does not say where {own} stands"
    for line, module in imported(name, is_package, path):
        other = room_of(module)
        if other is None or other == own or not module.startswith(("peft_onelayer", "onelayer_cli")):
            continue
        if other not in ORDER:  # a name of peft_onelayer/__init__, such as __version__
            continue
        assert ORDER[other] < ORDER[own], f"{path}:{line}: {own} imports {other}, which does not stand below it"
