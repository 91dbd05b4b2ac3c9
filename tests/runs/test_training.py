"""A training run from Python: what the command does, by one call."""

import json
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from safetensors.torch import save_file
from told import Told

from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.rl.recipe import demo_config
from peft_onelayer.runs import ProbeSettings, TrainingSettings, preparation, train
from peft_onelayer.runs import training as runs_training
from peft_onelayer.runs.folder import RunFolder

BASE = str(files("peft_onelayer") / "demo_model")
FEW = {"per_device_train_batch_size": 16, "gradient_checkpointing": False, "learning_rate": 3e-3}


def settings(tmp_path, **changes):
    given = {"model": BASE, "out": tmp_path / "run", "task": "arithmetic", "layer": 5, "steps": 1, "config": FEW}
    return TrainingSettings(**{**given, **changes})


def without_times(run: dict) -> dict:
    results = {name: value for name, value in run["results"].items() if name != "seconds"}
    return {**run, "command": None, "results": results}


@pytest.mark.more
def test_the_call_writes_the_run_json_of_the_command(tmp_path, onelayer):
    run = train(settings(tmp_path, layer="5", steps=2))
    arguments = [f"--set={name}={str(value).lower()}" for name, value in FEW.items()]
    code, lines, _ = onelayer(
        "train", BASE, "--task", "arithmetic", "--layer", "5", "--steps", 2, *arguments, "--out", tmp_path / "other"
    )
    assert code == 0, lines
    mine, theirs = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "other"))
    assert mine["command"] is None and theirs["command"].startswith("onelayer train")
    assert without_times(mine) == without_times(theirs)
    assert run.record.to_dict() == mine and run.record.layers == [5] and run.folder == tmp_path / "run"
    assert run.model.peft_config["default"].layer_indices == [5]


@pytest.mark.parametrize("layers", [pytest.param("3,5", marks=pytest.mark.more), [5, 3]])
def test_two_blocks_that_are_no_range(tmp_path, layers):
    run = train(settings(tmp_path, layer=layers))
    assert run.record.layers == [3, 5]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["layer_indices"] == [3, 5]


def ranking_of(base, tokenizer, task, progress, *, recipe, seed, **others):
    """A ranking that picks block 7 at a third of the rate that was asked for."""
    rate = recipe.settings["learning_rate"]
    rates = [rate / 3 if k == 7 else rate for k in range(12)]
    scores, cost = [float(k == 7) for k in range(12)], {"tokens_generated": 1}
    return LayerRanking(
        *("m", None, 12, "prior", scores, [None] * 12, [7, *range(7)], [7], 7, rate, cost),
        task.name,
        seed,
        learning_rates=rates,
    )


@pytest.mark.more
def test_the_choice_is_trained_at_the_rate_that_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "rank_blocks", ranking_of)
    told = Told()
    run = train(settings(tmp_path, layer="auto"), progress=told)
    assert run.record.layers == [7]
    assert run.record.settings.config["learning_rate"] == pytest.approx(1e-3)
    assert run.record.settings.layer == "auto" and "learning rate 0.001" in run.record.why
    assert any("learning rate 0.001" in note for note in told.notes)
    profile = LayerRanking.from_json((tmp_path / "run" / "layer_profile.json").read_text())
    assert profile.choice == [7] and profile.choice_learning_rate == run.record.settings.config["learning_rate"]
    # half of the warm-up apart, the trainer had it
    same = train(settings(tmp_path, out=tmp_path / "same", layer=7, config={**FEW, "learning_rate": 3e-3 / 3}))
    assert same.record.results.sha256 == run.record.results.sha256


@pytest.mark.more
@pytest.mark.parametrize("raced", [True, False], ids=["no block gained", "no race"])
def test_without_a_pick_or_a_race_the_rate_is_found_too(tmp_path, monkeypatch, raced):
    def ranked(base, tokenizer, task, progress, *, recipe, seed, **others):
        ranking = ranking_of(base, tokenizer, task, progress, recipe=recipe, seed=seed)
        if raced:  # of blocks among which one of the middle five is missing
            ran = {"errors": [0.1] * 12, "order": [7, 0, 3, 4, 6], "rounds": {"7": [[4, 0.0, 0.1]]}}
            cost = {"tokens_generated": 1, "tokens_trained": 1, "seconds": 1.0, "share": 0.1}
            return replace(ranking, **ran, cost=cost, pick=None, learning_rate=8e-4, rate_together=2e-4)
        return replace(ranking, pick=5, learning_rate=None, learning_rates=None, fallback="no room")

    monkeypatch.setattr(preparation, "rank_blocks", ranked)
    config = {name: value for name, value in FEW.items() if name != "learning_rate"}
    run = train(settings(tmp_path, layer="auto", config=config))
    rate = run.record.settings.config["learning_rate"]
    assert run.record.layers == ([3, 4, 6, 7] if raced else [5])
    assert run.record.learning_rate.by == ("ranking" if raced else "first step")
    assert run.record.learning_rate.blocks == len(run.record.layers)
    assert rate == 2e-4 if raced else 1e-4 < rate < 1e-2


@pytest.mark.parametrize(
    ("name", "shape", "value", "message"),
    [
        ("model.layers.5.mlp.down_proj.weight", (64, 160), False, "has no True entry"),
        ("model.layers.5.mlp.down_proj.weight", (160, 64), True, "has shape"),
        ("model.layers.4.mlp.down_proj.weight", (64, 160), True, "no True entry in block 5"),
        ("layers.5.mlp.down_proj.weight", (64, 160), True, "which is no parameter of the base"),
    ],
    ids=["false", "shape", "block", "name"],
)
def test_a_mask_that_does_not_fit_is_refused_before_a_rate_is_searched_for(
    tmp_path, monkeypatch, name, shape, value, message
):
    def search(*args, **kwargs):
        raise AssertionError("a learning rate is searched for")

    monkeypatch.setattr(preparation, "find_learning_rate", search)
    mask = str(tmp_path / "mask.safetensors")
    save_file({name: torch.full(shape, value)}, mask)
    config = {field: value for field, value in FEW.items() if field != "learning_rate"}
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path, mask=mask, config=config))
    assert not (tmp_path / "run").exists()


def test_a_rate_is_searched_for_with_the_mask(tmp_path, monkeypatch):
    def search(*args, **kwargs):
        raise RuntimeError(kwargs["mask"])

    monkeypatch.setattr(preparation, "find_learning_rate", search)
    mask = str(tmp_path / "mask.safetensors")
    save_file({"model.layers.5.mlp.down_proj.weight": torch.ones(64, 160, dtype=torch.bool)}, mask)
    config = {field: value for field, value in FEW.items() if field != "learning_rate"}
    with pytest.raises(RuntimeError, match=r"mask\.safetensors"):
        train(settings(tmp_path, mask=mask, config=config))


@pytest.mark.more
def test_a_run_that_was_ranked_resumes_with_what_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "rank_blocks", ranking_of)
    asked = settings(tmp_path, layer="auto")
    train_rows = runs_training.train_rows

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs_training, "train_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        train(asked)
    monkeypatch.setattr(runs_training, "train_rows", train_rows)
    other = replace(asked, config={**FEW, "learning_rate": 1e-3})  # the rate it was trained at, not the one asked for
    with pytest.raises(ValueError, match=r"config\.learning_rate: 0\.003 -> 0\.001"):
        train(other, resume=True)
    monkeypatch.delattr(preparation, "rank_blocks")  # the ranking is kept
    run = train(asked, resume=True)
    assert run.record.layers == [7] and run.record.settings.config["learning_rate"] == pytest.approx(1e-3)


def test_fields_with_a_setting_of_their_own_are_refused(tmp_path):
    with pytest.raises(ValueError, match="field seed is set by --seed, not by --set or config"):
        train(settings(tmp_path, config={"seed": 1}))
    with pytest.raises(ValueError, match="GRPOConfig has no field 'leaning_rate'; did you mean learning_rate"):
        train(settings(tmp_path, config={"leaning_rate": 1}))
    assert list(tmp_path.iterdir()) == []


def test_the_demos_recipe_is_the_demos():
    config = demo_config(150)
    assert (config["per_device_train_batch_size"], config["num_generations"], config["warmup_steps"]) == (192, 8, 5)
    assert demo_config(3)["warmup_steps"] == 2
    assert ProbeSettings(model="m").budget == 0.25


SECRETS = {"vllm_server_base_url": "http://me:hunter2@h.co/?token=abcdef", "run_name": "ghp_" + "Ab1" * 12}


def test_a_secret_among_the_settings_reaches_no_file_and_the_run_can_be_resumed(tmp_path, monkeypatch):
    config = {**FEW, **SECRETS, "save_steps": 1}
    command = f"onelayer train m --set vllm_server_base_url={SECRETS['vllm_server_base_url']} --token abcdef"
    real = RunFolder.write_record

    def write_record(folder, record):
        if record.status == "finished":
            raise KeyboardInterrupt
        real(folder, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "write_record", write_record)
        train(settings(tmp_path, config=config, steps=2), command=command)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()
    train(settings(tmp_path, config=config, steps=2), command=command, resume=True)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"run.json", "README.md", "optimizer.pt", "adapter_model.safetensors"}
    for path in written:
        content = path.read_bytes()
        assert not any(secret in content for secret in (b"hunter2", b"abcdef", b"Ab1Ab1")), path
        assert path.name != "training_args.bin"
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    kept = run["settings"]["config"]["vllm_server_base_url"]
    assert kept == "http://<removed>@h.co/?token=<removed>" and "<removed>" in run["command"]
    with pytest.raises(ValueError, match="--set gives a secret, which --report-to would log"):
        train(settings(tmp_path, out=tmp_path / "other", config=config, report_to="tensorboard"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("field", ["push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"])
def test_what_a_trainer_would_send_on_its_own_is_refused_with_the_way(tmp_path, onelayer, field):
    value = "every_save" if field == "hub_strategy" else "true"
    for command in (("train", BASE, "--layer", "5", "--out", tmp_path / "a"), ("sweep", BASE, "--out", tmp_path / "a")):
        code, lines, out = onelayer(*command, "--task", "arithmetic", "--set", f"{field}={value}")
        assert (code, len(lines), out) == (1, 1, "") and field in lines[0] and "onelayer push" in lines[0], lines
    code, lines, _ = onelayer("probe", BASE, "--task", "arithmetic", "--set", f"{field}={value}")
    assert code == 1 and len(lines) == 1 and "onelayer push" in lines[0], lines
    with pytest.raises(ValueError, match=r"onelayer push \(push_adapter\)"):
        train(settings(tmp_path, config={**FEW, field: True}))
    assert list(tmp_path.iterdir()) == [tmp_path / "work"]
