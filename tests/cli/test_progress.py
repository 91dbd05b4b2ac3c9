"""What a command says while it goes on, without a terminal."""

import os
import re
import subprocess
import sys
import time

import pytest

from onelayer_cli import _output


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(_output, "EVERY", 0.02)


def lines_after(capsys, count):
    """The lines on stderr, once there are so many."""
    found = ""
    while len(found.splitlines()) < count:
        time.sleep(0.005)
        found += capsys.readouterr().err
    return found.splitlines()


def test_a_line_now_and_then_says_what_is_done_and_left(often, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(_output.time, "monotonic", lambda: now[0])
    with _output.TerminalProgress().bar("training block 5", 150, "step") as update:
        assert lines_after(capsys, 2)[:2] == ["training block 5 ...", "training block 5: step 0 of 150"]
        update(9, "reward 0.1")  # a resumed run: nothing is known of the pace yet
        lines_after(capsys, 1)
        assert lines_after(capsys, 1)[-1] == "training block 5: step 9 of 150, reward 0.1"
        now[0] += 42
        update(30, "reward 0.25")
        lines_after(capsys, 1)
        assert lines_after(capsys, 1)[-1] == ("training block 5: step 30 of 150, reward 0.25, 2 s per step, 4 min left")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_what_is_quickly_done_tells_nothing_of_what_is_left(monkeypatch):
    """The base of a sweep, and the first steps that find its learning rates."""
    now = [100.0]
    monkeypatch.setattr(_output.time, "monotonic", lambda: now[0])
    bar = _output.Bar("sweep of m", 7, "run")
    for done in (1, 2, 3):
        now[0] += 5
        bar.update(done, "base", typical=False)
    assert bar.line() == "sweep of m: run 3 of 7, base"
    now[0] += 600
    bar.update(4, "block 2")
    assert bar.line() == "sweep of m: run 4 of 7, block 2, 600 s per run, 30 min left"


def test_waiting_is_told_too(often, capsys):
    with _output.status("loading a model ..."):
        assert lines_after(capsys, 2)[:2] == ["loading a model ... 0 s"] * 2
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


SPEAK = """
import time
from onelayer_cli import _output
_output.EVERY = 0.02
with _output.TerminalProgress().bar("training", 4, "step") as update:
    update(1, "reward 0")
    time.sleep(0.2)
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_speaks(rank):
    env = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
    said = subprocess.run([sys.executable, "-c", SPEAK], env=env, capture_output=True, text=True, check=True).stderr
    assert bool(re.search("training: step 1 of 4, reward 0", said)) == (rank == "0") and bool(said) == (rank == "0")


def test_a_terminal_shows_the_time_left(monkeypatch):
    from rich.console import Console

    terminal = Console(force_terminal=True, width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr(_output, "err", terminal)
    with _output.TerminalProgress().bar("training", 10, "step") as update:
        update(1, "reward 0")
        update(2, "reward 0.5")
    said = terminal.export_text()
    assert "2/10" in said and "0 s left" in said and "reward 0.5" in said
