"""The examples in docstrings run."""

import doctest
import importlib

import pytest

MODULES = (
    "sparse.digest",
    "sparse.tensor",
    "sparse.encoding",
    "hub.privacy",
    "hub.profiles",
    "probe.posterior",
    "probe.prior",
    "probe.race",
    "runs.ranking",
    "rl.advantages",
    "rl.algorithms",
    "records.fields",
    "records.locate",
    "records.run",
    "records.text",
    "rl.settings",
    "sweep.engines",
    "sweep.metric",
    "sweep.run_layer",
    "tasks.arithmetic",
    "tasks.sort",
    "tasks.gsm8k",
    "tasks.reasoning_gym",
    "rollouts.evaluation",
    "tasks.humaneval",
    "sandbox",
    "tasks.textworld",
    "layers",
    "tuner.model",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # of the games
    results = doctest.testmod(importlib.import_module(f"peft_onelayer.{name}"))
    assert results.attempted > 0 and results.failed == 0
