"""`onelayer sweep`: what it prints and writes, and its mistakes in one line."""

import functools
import json
import sys

import fake_runs
import pytest
from specs import DEMO

from onelayer_cli.main import main
from peft_onelayer.sweep import sweep as module
from peft_onelayer.sweep.profile import SweepProfile

pytestmark = pytest.mark.usefixtures("light_workers")


@pytest.fixture
def sweep(monkeypatch, capfd, tmp_path):
    """Runs the command, with runs that compute nothing: (exit code, lines on stderr, stdout)."""
    monkeypatch.setattr(module, "sweep_layers", functools.partial(module.sweep_layers, run_row=fake_runs.run))

    def run(*arguments):
        command = ["onelayer", "sweep", DEMO, "--task", "arithmetic", "--out", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code, err.splitlines(), out

    return run


def test_it_prints_the_contributions_and_writes_the_profile(sweep, tmp_path):
    arguments = ["--layers", "0,5", "--seeds", "0,1", "--steps", "3", "--problems", "50", "--set", "temperature=0.9"]
    code, lines, out = sweep(*arguments)
    assert code == 0 and any("block 5, seed 1, learning rate 5e-06: score" in line for line in lines)
    profile = SweepProfile.from_json((tmp_path / "out" / "layer_profile.json").read_text())
    assert profile.settings == {"temperature": 0.9} and profile.seeds == [0, 1] and profile.steps == 3
    for k in (0, 5):
        assert f"{profile.contribution[k]:.4f} ± {profile.contribution_errors[k]:.4f}" in out
    assert "Block 5 is the best, ahead of every other." in out and "tokens generated" in out
    assert (tmp_path / "out" / "layer_profile.png").stat().st_size > 10_000
    code, lines, out = sweep(*arguments, "--json")
    assert code == 0 and json.loads(out) == json.loads(profile.to_json())
    assert sum(fake_runs.started(tmp_path).values()) == 7  # nothing ran again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "slurp"], "engine 'slurp' is not known; expected one of local, ray, slurm"),
        (["--early-stop"], "--early-stop is done by Ray Tune; use it with --engine ray"),
        (["--slurm", "slurm_partition=gpu"], "--slurm sets parameters of --engine slurm"),
        (["--seeds", "0,x"], "--seeds takes numbers separated by commas, got '0,x'"),
        (["--seeds", "1,1"], "seeds must be one or more different numbers"),
        (["--layers", "0,99"], "layer='99' is out of range"),
        (["--algorithm", "dpo"], "dpo is offline"),
        (["--learning-rate", "0"], "a learning rate must be above 0, got 0.0"),
        (["--set", "learning_rate=1"], "field learning_rate is set by --learning-rate and --full-learning-rate"),
        (["--set", "no_such_field=1"], "has no field 'no_such_field'"),
        (["--out", "no/such/folder"], "does not exist; create it"),
        (["--out", "/"], "exists and holds other files"),
    ],
)
def test_mistakes_in_one_line(sweep, tmp_path, arguments, message):
    code, lines, out = sweep(*arguments)
    assert (code, out) == (1, "") and message in lines[-1] and lines[-1].startswith("onelayer: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("engine", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed(sweep, monkeypatch, engine, library):
    monkeypatch.setitem(sys.modules, library, None)
    for name in ("ray_engine", "slurm"):
        monkeypatch.delitem(sys.modules, f"peft_onelayer.sweep.engines.{name}", raising=False)
    code, lines, out = sweep("--engine", engine)
    assert (code, out) == (1, "")
    assert lines == [f"onelayer: engine {engine!r} needs {library}: pip install 'peft-onelayer[{engine}]'"]
