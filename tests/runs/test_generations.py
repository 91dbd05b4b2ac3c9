"""Runs that make several optimizer steps of one generation's completions: resuming, counting, drawing prompts."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from told import Told

from peft_onelayer.rl.algorithms import load_algorithm
from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.rl.training import completions_generated, generation_steps, prompts_needed, steps_of_epochs
from peft_onelayer.runs import TrainingSettings, train
from peft_onelayer.runs.folder import RunFolder
from peft_onelayer.runs.log import RunLog
from peft_onelayer.runs.plan import TrainingPlan
from peft_onelayer.tasks import load_task

BASE = str(files("peft_onelayer") / "demo_model")
TWICE = {"num_iterations": 2, "lr_scheduler_type": "constant"}
FOUR = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 8}


def settings(out, **changes):
    given = {"model": BASE, "out": out, "task": "arithmetic", "layer": 5, "steps": 4, "prompts": 4, "completions": 4}
    return TrainingSettings(**given | {"learning_rate": 1e-3, "eval_problems": 0, "config": TWICE} | changes)


def go(asked, monkeypatch=None, stop=None, resume=False):
    """A run, or what is left of one that is interrupted in step `stop`; with what was told."""
    told, write = Told(), RunLog.write

    def stopping(log, step, logs):
        if step == stop:
            raise KeyboardInterrupt
        write(log, step, logs)

    if stop is None:
        return train(asked, resume=resume, progress=told), told
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(asked, resume=resume, progress=told)
    return None, told


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a)


def config_of(algorithm="grpo", **config):
    return make_recipe(algorithm, load_task("arithmetic"), config).config(output_dir="x", max_steps=10)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 1),
        ({"num_iterations": 2}, 2),
        (FOUR, 4),
        ({**FOUR, "gradient_accumulation_steps": 6}, 4),
        ({**FOUR, "steps_per_generation": 1}, 1),
    ],
    ids=["default", "two iterations", "four updates", "no multiple", "generations in a step"],
)
def test_when_a_step_and_a_generation_end_together(fields, steps):
    config = config_of(**fields)
    batches = config.steps_per_generation * config.num_iterations
    assert generation_steps(config) == steps and steps * config.gradient_accumulation_steps % batches == 0


@pytest.mark.parametrize(
    ("changes", "every"),
    [
        ({}, 0.1),
        ({"config": TWICE}, 4),
        ({"config": TWICE, "steps": 41}, 6),
        ({"config": {**TWICE, "save_steps": 3}}, 3),
    ],
    ids=["default", "two iterations", "rounded up", "given"],
)
def test_checkpoints_lie_between_two_generations(tmp_path, changes, every):
    asked = settings(tmp_path / "run", **{"steps": 40, "config": {}} | changes)
    assert TrainingPlan(asked, tmp_path).config.save_steps == every


@pytest.mark.more
def test_a_run_goes_on_from_between_two_generations(tmp_path, monkeypatch):
    whole, _ = go(settings(tmp_path / "whole"))
    assert whole.results.completions.completions == 32 and whole.results.tokens_generated == 32 * 5
    assert whole.results.reward_steps == [1, 3] and len(whole.results.rewards) == 2
    asked = settings(tmp_path / "run", config={**TWICE, "save_steps": 1})
    _, told = go(asked, monkeypatch, stop=4)
    assert any("save_steps=1" in note and "every 2 steps" in note for note in told.notes), told.notes
    assert any("checkpoint-2 is kept" in note for note in told.notes), told.notes
    _, told = go(asked, resume=True)
    assert [note for note in told.notes if "going on" in note] == [
        "going on from checkpoint-2 and not from checkpoint-3, which is in the middle of a generation, whose "
        "completions no checkpoint holds: from there it would not end as an uninterrupted run"
    ]
    assert same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.more
def test_where_no_checkpoint_lies_between_two_generations(tmp_path, monkeypatch):
    asked = settings(tmp_path / "run", config={**TWICE, "save_steps": 1})
    go(asked, monkeypatch, stop=2)
    _, told = go(asked, resume=True)
    assert any("checkpoint-1" in note and "does not end as an uninterrupted one" in note for note in told.notes), (
        told.notes
    )


def test_the_newest_checkpoint_of_so_many_steps(tmp_path):
    for step in (2, 4, 5):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    folder = RunFolder.__new__(RunFolder)
    folder.checkpoints = tmp_path / "checkpoints"
    found = [folder.last_checkpoint(every) for every in (1, 2, 3)]
    assert [path and path.name for path in found] == ["checkpoint-5", "checkpoint-4", None]


@pytest.mark.more
def test_every_resumption_is_recorded_at_once(tmp_path, monkeypatch):
    asked = settings(tmp_path / "run", config={"save_steps": 1}, steps=2)
    go(asked)
    longer = replace(asked, steps=5)
    go(longer, monkeypatch, stop=4, resume=True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "unfinished" and record["resumed_from"] == ["checkpoint-2 of 2 steps"]
    go(longer, monkeypatch, stop=5, resume=True)
    run, _ = go(longer, resume=True)
    assert run.record.resumed_from == ["checkpoint-2 of 2 steps", "checkpoint-3", "checkpoint-4"]


@pytest.mark.more
def test_a_prolonged_run_whose_checkpoints_follow_its_generations(tmp_path):
    asked = settings(tmp_path / "run", steps=22)
    assert (
        TrainingPlan(asked, tmp_path).config.save_steps
        != TrainingPlan(replace(asked, steps=2), tmp_path).config.save_steps
    )
    go(replace(asked, steps=2))
    run, _ = go(asked, resume=True)
    assert run.results.steps == 22 and run.record.resumed_from == ["checkpoint-2 of 2 steps"]


@pytest.mark.more
def test_four_updates_of_a_generation_are_counted_once(tmp_path):
    run, _ = go(settings(tmp_path / "run", config=FOUR, steps=8, prompts=None, completions=None))
    assert run.results.completions.completions == 128 and run.results.tokens_generated == 128 * 5
    assert run.results.reward_steps == [1, 5]


def test_prompts_are_drawn_for_whole_generations():
    algorithm, config = load_algorithm("grpo"), config_of(**TWICE)
    drawn = [prompts_needed(algorithm, config, steps=steps) for steps in (1, 2, 3, 4)]
    assert drawn == [8, 8, 16, 16]
    assert [completions_generated(config, steps) for steps in (1, 2, 3, 4)] == [64, 64, 128, 128]
    config = config_of(**FOUR)  # 8 x 8 completions in four updates
    assert [prompts_needed(algorithm, config, steps=steps) for steps in (1, 4, 5)] == [8, 8, 16]
    sdft = make_recipe("sdft", None, {"num_generations": 2, "per_device_train_batch_size": 4, "num_iterations": 3})
    assert steps_of_epochs(sdft.algorithm, sdft.config(output_dir="x", num_train_epochs=1), 9) == 4 * 3
