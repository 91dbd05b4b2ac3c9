"""A run that was interrupted, was too short, or is to start from another: what is said, and how it goes on."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import demo_model
import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_onelayer import SingleLayerConfig
from peft_onelayer.runs.log import RunLog

BASE = str(files("peft_onelayer") / "demo_model")
RUN = ["train", BASE, "--task", "arithmetic", "--layer", "5", "--learning-rate", "3e-3"]
RUN += ["--set", "per_device_train_batch_size=8", "--set", "save_steps=1"]


def record(folder):
    return json.loads((folder / "run.json").read_text())


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def stopped_at(step, monkeypatch, error):
    """The next run meets `error` when it has done this step and before it has saved it."""
    write = RunLog.write

    def stop(self, at, logs):
        if at == step:
            raise error
        write(self, at, logs)

    monkeypatch.setattr(RunLog, "write", stop)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(KeyboardInterrupt(), 130, marks=pytest.mark.more),
        pytest.param(ValueError("the reward broke"), 1, marks=pytest.mark.more),
        pytest.param(SystemExit(143), 143, marks=pytest.mark.more),
    ],
    ids=repr,
)
def test_what_is_kept_and_the_command_that_goes_on(onelayer, tmp_path, monkeypatch, error, code):
    out = tmp_path / "a run"
    with monkeypatch.context() as patch:
        stopped_at(3, patch, error)
        ended, lines, _ = onelayer(*RUN, "--steps", "4", "--out", out)
    again = f"onelayer train --resume --out '{out}'"
    kept = [line for line in lines if "checkpoint-2 is kept" in line]
    assert ended == code and kept == [f"checkpoint-2 is kept in {out}/checkpoints; go on from it with: {again}"], lines
    assert [line["step"] for line in log(out)] == [1, 2]
    code, lines, _ = onelayer("train", "--resume", "--out", out, "--seed", "1")
    assert code == 1 and "other settings, so it cannot go on with these: config.seed: 0 -> 1" in lines[-1]
    code, lines, _ = onelayer("train", "--resume", "--out", out)
    assert code == 0 and "going on from checkpoint-2" in lines
    assert onelayer(*RUN, "--steps", "4", "--out", tmp_path / "whole")[0] == 0
    resumed, whole = record(out), record(tmp_path / "whole")
    assert resumed["results"]["sha256"] == whole["results"]["sha256"]
    assert resumed["settings"] == whole["settings"] and resumed["resumed_from"] == ["checkpoint-2"]
    assert [line["step"] for line in log(out)] == [1, 2, 3, 4]
    assert [line["reward"] for line in log(out)] == whole["results"]["rewards"]


def test_nothing_is_kept_of_a_run_that_was_interrupted_before_its_first_checkpoint(onelayer, tmp_path, monkeypatch):
    stopped_at(1, monkeypatch, KeyboardInterrupt())
    code, lines, _ = onelayer(*RUN, "--steps", "2", "--out", tmp_path / "run")
    assert code == 130 and lines[-2:] == [
        "no checkpoint had been written yet (the first comes after step 1; --set save_steps=N makes it N): nothing is "
        "kept",
        "onelayer: interrupted.",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.more
def test_the_number_of_steps_can_be_raised_and_the_schedule_is_told(onelayer, tmp_path):
    out = tmp_path / "run"
    assert onelayer(*RUN, "--steps", "2", "--out", out)[0] == 0
    for arguments, message in (
        ([], "is finished; choose a new output folder, or raise --steps above 2"),
        (["--steps", "1"], "is finished; choose a new output folder, or raise --steps above 2"),
        (["--steps", "4", "--seed", "1"], "cannot go on with these: config.seed: 0 -> 1; seed: 0 -> 1."),
    ):
        code, lines, _ = onelayer("train", "--resume", "--out", out, *arguments)
        assert code == 1 and message in lines[-1], lines
        assert record(out)["status"] == "finished" and not any("kept" in line for line in lines), lines
    code, lines, _ = onelayer("train", "--resume", "--out", out, "--steps", "4")
    assert code == 0, lines
    assert any("4 steps instead of 2" in line and "the linear schedule to the new end" in line for line in lines), lines
    # the first step has the rate that the checkpoint's optimizer had: the old schedule's end
    assert [line["learning_rate"] for line in log(out)] == pytest.approx([3e-3, 1.5e-3, 0, 7.5e-4], abs=1e-9)
    assert record(out)["resumed_from"] == ["checkpoint-2 of 2 steps"]
    assert record(out)["results"]["steps"] == record(out)["settings"]["config"]["max_steps"] == 4
    assert yaml.safe_load((out / "run.yaml").read_text())["steps"] == 4


@pytest.mark.more
def test_steps_can_be_raised_above_those_of_epochs(onelayer, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"A{i:03d}+001="}) + "\n" for i in range(4)))
    (tmp_path / "r.py").write_text(
        "def ones(completions, **_):\n    return [float(c.count('1')) for c in completions]\n"
    )
    source = ["--dataset", tmp_path / "train.jsonl", "--reward", f"{tmp_path / 'r.py'}:ones", "--eval-problems", "0"]
    run = ["train", BASE, *source, "--layer", "5", "--learning-rate", "1e-3", "--prompts", "2"]
    run += ["--set", "max_completion_length=4", "--set", "num_train_epochs=1", "--out", tmp_path / "run"]
    code, lines, _ = onelayer(*run)
    assert code == 0, lines
    code, lines, _ = onelayer("train", "--resume", "--out", tmp_path / "run")
    assert code == 1 and "raise --steps above 2 to train it further" in lines[-1], lines
    code, lines, _ = onelayer("train", "--resume", "--out", tmp_path / "run", "--steps", "3", "--seed", "1")
    assert code == 1 and lines[-1].endswith("cannot go on with these: config.seed: 0 -> 1; seed: 0 -> 1."), lines
    code, lines, _ = onelayer("train", "--resume", "--out", tmp_path / "run", "--steps", "3")
    assert code == 0 and record(tmp_path / "run")["results"]["steps"] == 3, lines


@pytest.mark.more
def test_a_run_from_its_own_yaml_is_the_same(onelayer, tmp_path):
    assert onelayer(*RUN, "--steps", "1", "--set", "temperature=0.7", "--out", tmp_path / "one")[0] == 0
    code, lines, _ = onelayer("train", "--config", tmp_path / "one" / "run.yaml", "--out", tmp_path / "two")
    assert code == 0, lines
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    for run in (one, two):
        del run["command"], run["results"]["seconds"]
    assert one == two
    assert (tmp_path / "one" / "run.yaml").read_text() == (tmp_path / "two" / "run.yaml").read_text()


@pytest.mark.more
def test_training_starts_from_an_adapter(onelayer, tmp_path):
    assert onelayer(*RUN, "--steps", "2", "--out", tmp_path / "first")[0] == 0
    rest = ["train", BASE, "--task", "arithmetic", "--set", "per_device_train_batch_size=8"]
    rest += ["--steps", "1", "--init-adapter", tmp_path / "first"]
    for wrong, message in (
        (["--layer", "4"], "holds block 5 and --layer 4 names others"),
        (["--full"], "--full trains every parameter and --init-adapter a block"),
    ):
        code, lines, _ = onelayer(*rest, *wrong, "--out", tmp_path / "second")
        assert code == 1 and len(lines) == 1 and message in lines[0], lines
    # weight decay is 0 and the rate of the first step of a warm-up as well: what is left is what it started from
    assert onelayer(*rest, "--learning-rate", "1e-3", "--set", "warmup_steps=1", "--out", tmp_path / "second")[0] == 0
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    run = record(tmp_path / "second")
    assert run["layers"] == [5]
    assert run["settings"]["init_adapter"] == {
        "name": str(tmp_path / "first"),
        **record(tmp_path / "first")["results"]["sha256"],
    }


@pytest.mark.more
def test_what_an_adapter_can_do_that_its_base_cannot_is_trained(onelayer, tmp_path):
    """The learning rate is found, and the reward looked at, where the run starts: at the adapter."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"A{i:03d}+001="}) + "\n" for i in range(80)))
    (tmp_path / "r.py").write_text(
        "def first(completions, **kwargs):\n    return [float(len(c) < 4) for c in completions]\n"
    )
    source = ["--dataset", tmp_path / "prompts.jsonl", "--reward", f"{tmp_path / 'r.py'}:first"]
    source += [
        "--set",
        "max_completion_length=5",
        "--set",
        "temperature=0.5",
        "--steps",
        "1",
        "--layer",
        "5",
        "--out",
        tmp_path / "run",
    ]
    code, lines, _ = onelayer("train", BASE, *source)
    assert code == 1 and "so that there is nothing to learn from" in lines[-1], lines
    base, _ = demo_model.load()
    adapter = get_peft_model(base, SingleLayerConfig(layer=5))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(2 * parameter.std() * torch.randn_like(parameter))
    adapter.save_pretrained(tmp_path / "adapter")
    code, lines, _ = onelayer("train", BASE, *source, "--init-adapter", tmp_path / "adapter", "--json")
    assert code == 0 and any("scores and what changed are given against the base" in line for line in lines), lines
    found = record(tmp_path / "run")["learning_rate"]
    assert 0.01 <= found["kl"] <= 0.025


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("trackio", "--report-to trackio: trackio is not installed; pip install trackio, or leave it out"),
        ("tensorboard,wandb", "is not installed; pip install"),
        ("wandbb", "--report-to wandbb is not known; did you mean wandb"),
    ],
)
def test_a_reporter_that_is_not_there_is_refused_before_the_model_is_loaded(
    onelayer, tmp_path, monkeypatch, given, message
):
    from peft_onelayer.runs import training

    monkeypatch.setattr(training, "load_causal_lm", None)
    code, lines, _ = onelayer(*RUN, "--report-to", given, "--out", tmp_path / "run")
    assert code == 1 and len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run").exists()


@pytest.mark.more
def test_a_run_under_a_mask_goes_on_bit_for_bit(onelayer, tmp_path, monkeypatch):
    base = dict(AutoModelForCausalLM.from_pretrained(BASE).named_parameters())
    torch.manual_seed(0)
    masks = {name: torch.rand(p.shape) < 0.1 for name, p in base.items() if ".layers.5." in name}
    save_file(masks, tmp_path / "mask.safetensors")
    run = [*RUN[:8], "--prompts", "8", "--set", "save_steps=1", "--mask", tmp_path / "mask.safetensors", "--steps", "3"]
    run += ["--eval-problems", "0"]
    assert onelayer(*run, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        stopped_at(3, patch, KeyboardInterrupt())
        assert onelayer(*run, "--out", tmp_path / "run")[0] == 130
    code, lines, _ = onelayer("train", "--resume", "--out", tmp_path / "run")
    assert code == 0, lines
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    trained = 0
    for name, mask in masks.items():
        key = f"base_model.model.{name.rpartition('.')[0]}.single_layer_params.weight"
        moved = resumed[key] != base[name]
        assert not (moved & ~mask).any()
        trained += int(moved.sum())
    kept = record(tmp_path / "run")["settings"]["mask"]
    assert 0 < trained <= kept["trained"] == sum(int(mask.sum()) for mask in masks.values())
    save_file({n: ~m for n, m in masks.items()}, tmp_path / "mask.safetensors")
    code, lines, _ = onelayer(*run, "--steps", "4", "--resume", "--out", tmp_path / "run")
    assert code == 1 and "mask" in lines[-1]
    code, lines, _ = onelayer(
        "train", BASE, "--task", "arithmetic", "--mask", tmp_path / "mask.safetensors", "--out", "x"
    )
    assert code == 1 and "--mask trains entries of given blocks" in lines[-1]


@pytest.mark.more
def test_a_boosted_run_goes_on_bit_for_bit(onelayer, tmp_path, monkeypatch):
    (tmp_path / "ranking.json").write_text(json.dumps({"num_layers": 12, "order": [5, 2, 7]}))
    boost = f"top-2@{tmp_path / 'ranking.json'}:2"
    run = ["train", BASE, "--task", "arithmetic", "--full", "--boost", boost, "--learning-rate", "1e-3"]
    run += ["--set", "save_steps=1", "--steps", "3", "--eval-problems", "0"]
    assert onelayer(*run, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        stopped_at(3, patch, KeyboardInterrupt())
        assert onelayer(*run, "--out", tmp_path / "run")[0] == 130
    assert onelayer("train", "--resume", "--out", tmp_path / "run")[0] == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert record(tmp_path / "run")["settings"]["boost"] == {"layers": [2, 5], "factor": 2.0}
    code, lines, _ = onelayer("train", BASE, "--task", "arithmetic", "--boost", "5:2", "--layer", "5", "--out", "x")
    assert code == 1 and "add --full" in lines[-1]


@pytest.mark.more
@pytest.mark.parametrize("first", ["first", "./first", "{folder}/first"])
def test_a_run_goes_on_where_its_base_has_moved(onelayer, tmp_path, monkeypatch, first):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BASE, "first")
    steps = ["--task", "sort", "--layer", "2", "--learning-rate", "1e-3", "--eval-problems", "0", "--prompts", "1"]
    code, lines, _ = onelayer(
        "train", first.format(folder=tmp_path), *steps, "--steps", "1", "--set", "save_steps=1", "--out", "run"
    )
    assert code == 0, lines
    shutil.move("first", "second")
    shutil.move("run", "moved")
    code, lines, _ = onelayer("train", "--resume", "--out", "moved", "--steps", "2")
    assert code == 1 and "name it: onelayer train PATH/TO/first --resume --out moved" in lines[-1], lines
    code, lines, _ = onelayer("train", "second", "--resume", "--out", "moved", "--steps", "2")
    assert code == 0, lines
    run = json.loads((tmp_path / "moved" / "run.json").read_text())
    assert run["settings"]["model"]["name"] == "second" and run["results"]["steps"] == 2


@pytest.mark.more
def test_a_run_goes_on_from_another_folder_than_it_was_begun_in(onelayer, tmp_path, monkeypatch):
    (tmp_path / "begun").mkdir()
    monkeypatch.chdir(tmp_path / "begun")
    shutil.copytree(BASE, "base")
    Path("own.py").write_text(
        "MAX_COMPLETION_TOKENS = 5\n\n\ndef rows(split, n, seed):\n"
        "    return [{'prompt': f'A{i:03d}+001='} for i in range(100, 100 + n)]\n\n\n"
        "def reward(completions, **kwargs):\n    return [float(text.count('1')) for text in completions]\n"
    )
    steps = ["--task", "own.py", "--layer", "2", "--learning-rate", "1e-3", "--eval-problems", "0", "--prompts", "4"]
    code, lines, _ = onelayer("train", "./base", *steps, "--steps", "1", "--set", "save_steps=1", "--out", "run")
    assert code == 0, lines
    monkeypatch.chdir(tmp_path)
    code, lines, _ = onelayer("train", "--resume", "--out", "begun/run", "--steps", "2")
    typed = "onelayer train PATH/TO/base --task PATH/TO/own.py --resume --out begun/run"
    assert code == 1 and lines[-1].endswith(f"./base and own.py could be found, which are not here; name them: {typed}")
    code, lines, _ = onelayer("train", "begun/base", "--resume", "--out", "begun/run", "--steps", "2")
    assert code == 1 and lines[-1].endswith(
        "name it: onelayer train begun/base --task PATH/TO/own.py --resume --out begun/run"
    )
    named = ["train", "begun/base", "--task", "begun/own.py", "--resume", "--out", "begun/run", "--steps", "2"]
    before = Path("begun/own.py").read_text()
    Path("begun/own.py").write_text(f"{before}\n# another reward\n")
    code, lines, _ = onelayer(*named)
    assert code == 1 and "has other settings, so it cannot go on with these: task." in lines[-1]
    Path("begun/own.py").write_text(before)
    code, lines, _ = onelayer(*named)
    assert code == 0, lines
    run = json.loads(Path("begun/run/run.json").read_text())
    assert run["settings"]["task"]["name"] == "begun/own.py" and run["results"]["steps"] == 2
