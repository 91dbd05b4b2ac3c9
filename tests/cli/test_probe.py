"""`onelayer probe`: what it prints and writes, and what it refuses."""

import json
import shlex
from importlib.resources import files

import pytest

from peft_onelayer.records.ranking import LayerRanking

BASE = str(files("peft_onelayer") / "demo_model")
AS_DEMO = ["--set", "per_device_train_batch_size=192", "--set", "learning_rate=3e-3", "--set", "beta=0"]
RACE = ["probe", BASE, "--task", "arithmetic", "--budget", "0.03", *AS_DEMO]


def test_a_race_prints_and_writes_its_ranking(onelayer, tmp_path):
    code, lines, out = onelayer(*RACE, "--out", tmp_path / "ranking.json")
    assert code == 0, lines
    ranking = LayerRanking.from_json((tmp_path / "ranking.json").read_text())
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")
    assert ranking.method == "auto" and len(ranking.order) == 12 and 0 < ranking.cost["share"] <= 0.03
    for word in ("standard error", "learning rate", "tokens generated", "passed", "of the tokens of the training run"):
        assert word in out
    (command,) = (line for line in out.splitlines() if line.startswith("Train it: "))
    arguments = shlex.split(command.removeprefix("Train it: "))
    assert arguments[:2] == ["onelayer", "train"] and arguments[arguments.index("--layer") + 1] == ",".join(
        map(str, ranking.choice)
    )
    assert arguments[arguments.index("--learning-rate") + 1] == repr(ranking.choice_learning_rate)
    assert "beta=0" in arguments
    assert arguments.count("--set") == 2
    # and train takes it
    code, lines, _ = onelayer(*arguments[1:-2], "--steps", "1", "--out", tmp_path / "run")
    assert code == 0, lines


@pytest.mark.parametrize(
    ("options", "pick", "says"),
    [
        (["--method", "prior"], 5, "by depth alone"),
        (["--method", "prior", "--layers", "7-10"], 7, "by depth alone"),
        (
            ["--budget", "0.1", "--steps", "2"],
            5,
            "no race: a budget of 0.1 of a run that generates 384",
        ),  # no room for a race
        (["--method", "profile", "--profile", "PROFILE"], 2, "by the profile"),
    ],
)
def test_without_running_anything(onelayer, tmp_path, options, pick, says):
    profile = {"format": "onelayer-profile-1", "model": "mine", "num_layers": 12}
    profile["contribution"] = [0.1, 0.2, 0.9, None, *[0.3] * 8]
    (tmp_path / "p.json").write_text(json.dumps(profile))
    options = [str(tmp_path / "p.json") if o == "PROFILE" else o for o in options]
    code, lines, out = onelayer("probe", BASE, "--task", "sort", *AS_DEMO, *options)
    assert code == 0, lines
    assert f"block {pick} is the first choice" in out and says in out and f"--layer {pick} " in out
    code, _, out = onelayer("probe", BASE, "--task", "sort", *AS_DEMO, *options, "--json")
    ranking = LayerRanking.from_json(out)
    assert code == 0 and ranking.pick == pick and not ranking.measured and ranking.cost["share"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gradient_norm"], "no probe 'gradient_norm'; the methods are auto, race, prior, profile"),
        (["--method", "profile"], "--profile and --method profile go together"),
        (["--profile", "Qwen/Qwen3-1.7B-Base"], "--profile and --method profile go together"),
        (
            ["--method", "profile", "--profile", "Qwen/Qwen3-1.7B-Base"],
            "the profile is of Qwen/Qwen3-1.7B-Base with 28 blocks; this model has 12",
        ),
        (["--method", "profile", "--profile", "no/such/thing"], "no layer profile no/such/thing"),
        (["--budget", "0"], "--budget is a share of a training run, above 0, such as 0.25; got 0.0"),
        (["--budget", "nan"], "--budget is a share of a training run"),
        (
            ["--method", "race", "--steps", "1"],
            "has no room for a race; it would cost more than the run itself; train longer",
        ),
        (["--algorithm", "dpo"], "dpo is offline"),
        (["--layers", "12"], "out of range"),
        (["--set", "seed=1"], "--seed"),
        (["--set", "learning_rat=1"], "learning_rat"),
        (["--out", "ranking.txt"], "--out takes a JSON file"),
        (["--out", f"{__file__}/ranking.json"], "is not a folder"),
    ],
)
def test_wrong_use_is_one_line(onelayer, tmp_path, options, message):
    code, lines, out = onelayer("probe", BASE, "--task", "arithmetic", *options)
    assert code in (1, 2) and out == ""
    assert message in lines[-1] and not list((tmp_path / "work").iterdir())


def test_an_existing_file_is_kept(onelayer, tmp_path):
    (tmp_path / "ranking.png").write_text("mine")
    code, lines, _ = onelayer("probe", BASE, "--task", "sort", "--method", "prior", "--out", tmp_path / "ranking.json")
    assert code == 1 and "ranking.png exists" in lines[-1]
    assert (tmp_path / "ranking.png").read_text() == "mine" and not (tmp_path / "ranking.json").exists()
