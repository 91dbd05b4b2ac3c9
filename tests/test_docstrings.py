"""The examples in docstrings run: of every module that has any."""

import doctest
import importlib
from pathlib import Path

import pytest

import onelayer_cli
import peft_onelayer

SECONDS = ["textworld", "reasoning_gym"]  # whose libraries take seconds


def modules_with_examples():
    for package in (peft_onelayer, onelayer_cli):
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join((package.__name__, *parts)).removesuffix(".__init__")
                yield pytest.param(name, marks=pytest.mark.more) if parts[-1] in SECONDS else name


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_the_examples_of(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # of the games
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0 and results.failed == 0
