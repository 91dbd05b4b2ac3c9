"""`onelayer sweep`: what it prints and writes, and its mistakes in one line."""

import functools
import json
import shutil
import sys

import fake_runs
import pytest
from specs import DEMO

from onelayer_cli._output import Bar
from onelayer_cli.main import main
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.sweep import sweep as module

pytestmark = pytest.mark.usefixtures("light_workers")


@pytest.fixture
def sweep(monkeypatch, capfd, tmp_path):
    """Runs the command, with runs that compute nothing: (exit code, lines on stderr, stdout)."""
    monkeypatch.setattr(module, "sweep_layers", functools.partial(module.sweep_layers, run_row=fake_runs.run))

    def run(*arguments, model=DEMO, task="arithmetic"):
        named = ["--task", task] if task else []
        command = ["onelayer", "sweep", model, *named, "--out", str(tmp_path / "out"), "--workers", "1", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code, err.splitlines(), out

    return run


def test_it_prints_the_contributions_and_writes_the_profile(sweep, tmp_path, monkeypatch):
    paced, update = [], Bar.update
    monkeypatch.setattr(
        Bar, "update", lambda bar, *args, typical: paced.append(typical) or update(bar, *args, typical=typical)
    )
    arguments = ["--layers", "0,5", "--seeds", "0,1", "--steps", "3", "--problems", "50", "--set", "temperature=0.9"]
    code, lines, out = sweep(*arguments)
    assert code == 0 and any("block 5, seed 1, learning rate 0.003: score" in line for line in lines)
    found = (
        "learning rate 0.003: a first step at it moves the policy by 0.015 nats a token; finding it took 100 tokens "
    )
    assert sum(f"/9 learning rate of block 5: {found}" in line for line in lines) == 1, lines
    assert "Learning rates found: 0.003 for a block, 0.0003 full." in out
    profile = LayerRanking.from_json((tmp_path / "out" / "layer_profile.json").read_text())
    assert profile.sweep.settings == {"temperature": 0.9} and profile.sweep.seeds == [0, 1] and profile.sweep.steps == 3
    for k in (0, 5):
        assert f"{profile.sweep.contribution[k]:.4f} ± {profile.sweep.contribution_errors[k]:.4f}" in out
    assert "Block 5 is the best, ahead of every other." in out and "tokens generated" in out
    assert (tmp_path / "out" / "layer_profile.png").stat().st_size > 10_000
    assert paced == 3 * [False] + 6 * [True]  # the base and two rates are found sooner than a run is done
    paced.clear()
    code, lines, out = sweep(*arguments, "--json")
    assert paced == 9 * [False]  # and what is read tells nothing of what a run takes
    assert code == 0 and json.loads(out) == json.loads(profile.to_json())
    assert sum(fake_runs.started(tmp_path).values()) == 9  # nothing ran again
    assert f"7 of 7 runs are in {tmp_path / 'out' / 'rows'} already and are not run again" in lines


def test_a_data_set_with_a_reward(sweep, tmp_path):
    rows = "".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(64))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    reward = "def reward(prompts, completions, **kwargs):\n    return [0.0] * len(completions)\n"
    (tmp_path / "reward.py").write_text(reward, encoding="utf-8")
    options = ["--dataset", str(tmp_path / "rows.jsonl"), "--reward", f"{tmp_path / 'reward.py'}:reward"]
    few = ["--layers", "0", "--steps", "2", "--problems", "5", "--out", str(tmp_path / "new")]
    code, lines, out = sweep(*options, *few, task=None)
    assert code == 0, lines
    assert (
        "Block 0 is the only one that was measured; it " in out and (tmp_path / "new" / "layer_profile.json").exists()
    )
    specs = [row["spec"] for row in fake_runs.stored(tmp_path / "new").values()]
    assert {spec["dataset"] for spec in specs} == {options[1]} and {spec["reward"] for spec in specs} == {options[3]}
    code, lines, _ = sweep(*options, *few)
    assert code == 1 and "give --task, or --dataset with --reward" in lines[-1]


def test_what_scored_as_the_base_is_named(sweep, monkeypatch, tmp_path):
    few = ["--layers", "0,5", "--steps", "3", "--problems", "50"]
    monkeypatch.setenv("FAKE_RUNS_FATE", json.dumps({"same": ["0"]}))
    code, _, out = sweep(*few, "--out", str(tmp_path / "some"))
    assert code == 0 and "Scored as the base on every problem: block 0; a higher --learning-rate" in out
    monkeypatch.setenv("FAKE_RUNS_FATE", json.dumps({"same": ["0", "5", "full"]}))
    code, _, out = sweep(*few, "--out", str(tmp_path / "all"), "--learning-rate", "5e-6")
    assert code == 0 and "C is undefined: every run scored exactly what the base did on every problem" in out
    assert "Scored as the base" not in out


def test_what_fell_below_the_base_is_named(sweep, monkeypatch, tmp_path):
    few = ["--layers", "0,3,5", "--steps", "3", "--problems", "50", "--learning-rate", "1e-3"]
    monkeypatch.setenv("FAKE_RUNS_FATE", json.dumps({"levels": {"0 0.001": 0.01, "3 0.001": 0.02, "5 0.001": 0.9}}))
    code, _, out = sweep(*few, "--out", str(tmp_path / "some"))
    assert code == 0 and "Below the base, beyond noise: block 0, 3; the learning rate may be too high there" in out
    assert "To try another: --layers 0,3 --learning-rate RATE, with another --out." in " ".join(out.split())
    assert "All parameters ended below" not in out
    monkeypatch.setenv("FAKE_RUNS_FATE", json.dumps({"levels": {"full 0.001": 0.01, "5 0.001": 0.9}}))
    code, _, out = sweep(*few, "--layers", "5", "--out", str(tmp_path / "full"))
    assert code == 0 and "Below the base" not in out
    assert "All parameters ended below the base, beyond noise; a lower --full-learning-rate may mend it." in out


@pytest.mark.parametrize("as_json", [False, True])
def test_a_drawing_that_fails_comes_after_the_result_and_is_one_line(sweep, tmp_path, as_json, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_onelayer.report.plots.plot_profile", full)
    few = ["--layers", "0,5", "--steps", "3", "--problems", "50", *["--json"] * as_json]
    code, lines, out = sweep(*few)
    assert code == 1 and lines[-1].startswith("onelayer: ") and "No space left on device" in lines[-1]
    profile = LayerRanking.from_file(tmp_path / "out" / "layer_profile.json")
    if as_json:
        assert out == profile.to_json()
    else:
        assert "Block 5 is the best, ahead of every other." in out and "layer_profile.png" not in out


def test_nothing_to_learn_shows_completions_and_one_line(sweep, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_RUNS_FATE", json.dumps({"nothing": True}))
    code, lines, out = sweep("--layers", "0,5", "--workers", "1")
    assert (code, out) == (1, "") and lines.count("prompt: 1 + 1") == 1 and not any("kept" in line for line in lines)
    assert lines[-1] == "onelayer: nothing to learn. The likely reason: it is a test."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "slurp"], "engine 'slurp' is not known; expected one of local, shared, ray, slurm"),
        (["--early-stop"], "--early-stop is done by Ray Tune; use it with --engine ray"),
        (["--slurm", "slurm_partition=gpu"], "--slurm sets parameters of --engine slurm"),
        (["--seeds", "0,x"], "--seeds takes whole numbers separated by commas, got '0,x'"),
        (["--seeds", "1,1"], "seeds must be one or more different numbers"),
        (["--layers", "0,99"], "layer='0,99' is out of range: the model has 12"),
        (["--layers", "5,5"], "layer='5,5' names a block twice"),
        (["--layers", "0;5"], "layer='0;5' is not understood"),
        (["--seeds", ""], "seeds must be one or more different numbers from 0, got []"),
        (["--seeds", "-1"], "seeds must be one or more different numbers from 0, got [-1]"),
        (["--search-learning-rates", "1e-4,x"], "--search-learning-rates takes numbers separated by commas"),
        (["--search-learning-rates", "0,1e-4"], "a learning rate must be above 0, got 0.0"),
        (["--chat"], "--chat needs a chat template"),
        (["--set", "per_device_train_batch_size=7"], "GRPOConfig refused per_device_train_batch_size=7"),
        (["--task", "no_such_task"], "task 'no_such_task' is not known"),
        (["--algorithm", "dpo"], "dpo is offline"),
        (["--prompts", "3", "--set", "gradient_accumulation_steps=2"], "both say how large a step is"),
        (["--completions", "4", "--set", "num_generations=2"], "--set num_generations says the same"),
        (["--learning-rate", "0"], "a learning rate must be above 0, got 0.0"),
        (["--set", "learning_rate=1"], "field learning_rate is set by --learning-rate and --full-learning-rate"),
        (["--set", "no_such_field=1"], "has no field 'no_such_field'"),
        (["--out", "/dev/null/folder"], "is not a folder"),
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
    assert lines[-1:] == [f"onelayer: engine {engine!r} needs {library}: pip install 'peft-onelayer[{engine}]'"]


def test_the_models_own_mistakes(sweep, tmp_path, monkeypatch):
    """Found without its weights: those are looked at by the runs alone."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    code, lines, _ = sweep("--layers", "3,5", "--steps", "1", "--problems", "4")
    assert code == 0, lines
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, says in (
        (tmp_path / "nowhere", "no model folder at"),
        (empty, "holds no config.json"),
        (_without_weights(tmp_path), "holds no weights"),
    ):
        code, lines, out = sweep(model=str(name))
        assert (code, out) == (1, "") and says in lines[-1] and lines[-1].startswith("onelayer: ")


def _without_weights(tmp_path):
    folder = tmp_path / "weightless"
    return shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors"))


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(sweep, tmp_path, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("onelayer_cli._output.Bar.update", interrupt)
        code, lines, _ = sweep("--layers", "0,5", "--steps", "3", "--problems", "50", "--workers", "1")
    rows = len(list((tmp_path / "out" / "rows").glob("*.json")))
    kept = f"{rows} finished runs are kept in {tmp_path}/out/rows; the same command goes on with the others"
    assert code == 130 and rows > 0 and kept in lines, lines
    assert sweep("--layers", "0,5", "--steps", "3", "--problems", "50", "--workers", "1")[0] == 0


def test_three_regimes_of_rates(sweep, tmp_path):
    few = ["--layers", "0,5", "--steps", "3", "--problems", "50", "--seeds", "0,1"]
    code, lines, out = sweep(*few, "--search-learning-rates", "1e-4,1e-3", "--learning-rate", "5e-4", "--regimes")
    first = next(i for i, line in enumerate(lines) if "score" in line)
    assert code == 0 and any("--regimes adds 6 runs to the sweep" in line for line in lines[:first]), lines
    assert "C under three regimes of learning rates" in out and "equal rates" in out and "both tuned" in out
    regimes = LayerRanking.from_json((tmp_path / "out" / "layer_profile.json").read_text()).sweep.regimes
    value, error = (regimes["equal rates"][name][5] for name in ("contribution", "contribution_errors"))
    assert f"{value:.2f} [{value - 1.959964 * error:.2f}, {value + 1.959964 * error:.2f}]" in out
    assert "Its tables likely hold what the scripts ran" in " ".join(out.split())
    code, lines, _ = sweep(*few, "--regimes", "--out", str(tmp_path / "other"))
    assert code == 1 and "--regimes compares tuned rates with equal ones" in lines[-1] and len(lines) == 1
    assert not (tmp_path / "other" / "rows").exists()
