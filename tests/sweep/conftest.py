import sys
from pathlib import Path

import pytest


@pytest.fixture
def light_workers(monkeypatch, tmp_path):
    """Processes that engines start import the package without torch and peft, and the tests' own modules.

    Runs of `fake_runs` report to tmp_path/log.
    """
    monkeypatch.setenv("FAKE_RUNS_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_RUNS_FATE", "{}")
    paths = [str(Path(__file__).parent / "light"), str(Path(__file__).parent)]
    monkeypatch.setattr(sys, "path", paths + sys.path)
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # not the working directory, with the whole package, before them
