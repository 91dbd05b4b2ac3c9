"""Where a run may report to is what transformers knows."""

import sys
from types import ModuleType

import pytest
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from peft_onelayer.runs.reporting import INTEGRATIONS, reporters


def test_the_names_are_those_of_transformers():
    assert INTEGRATIONS.keys() >= INTEGRATION_TO_CALLBACK.keys()  # older versions lack a few


@pytest.mark.parametrize("name", ["trackio", "dagshub", "tensorboard", "flyte"])
def test_what_is_installed_is_taken(monkeypatch, name):
    spec = sys.__spec__
    modules = ["tensorboardX" if isinstance(each, tuple) else each for each in INTEGRATIONS[name]]
    found = integration_utils.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda module: spec if module in modules else found(module))
    assert reporters(name) == [name]
    assert reporters("none") == []


def test_one_that_is_there_and_cannot_be_used_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # what an uninstallation leaves
    sys.modules["wandb"].__spec__ = sys.__spec__
    with pytest.raises(ValueError, match="--report-to wandb: wandb is installed, and transformers cannot use it"):
        reporters("wandb")
