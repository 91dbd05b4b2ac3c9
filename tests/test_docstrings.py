"""The examples in docstrings run."""

import doctest
import importlib

import pytest

MODULES = (
    "rl.algorithms",
    "rl.settings",
    "tasks.arithmetic",
    "tasks.sort",
    "tasks.evaluation",
    "tasks.humaneval",
    "tasks.sandbox",
    "tuner.stack",
    "tuner.model",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name):
    results = doctest.testmod(importlib.import_module(f"peft_onelayer.{name}"))
    assert results.attempted > 0 and results.failed == 0
