"""What shapes prompts takes one way: run, ranking, pairs, evaluation and sweep show the same problems."""

import dataclasses
import json
import re

import demo_model
import pytest
from told import Told

from peft_onelayer.runs import (
    EvaluationSettings,
    ProbeSettings,
    TrainingSettings,
    evaluate,
    probe,
    train,
    training,
)
from peft_onelayer.runs.plan import TrainingPlan
from peft_onelayer.sweep.plan import plan_sweep
from peft_onelayer.sweep.run_layer import run_layer
from peft_onelayer.sweep.settings import SweepSettings
from peft_onelayer.tasks import load_task

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
CONFIG = {"per_device_train_batch_size": 16, "gradient_checkpointing": False, "learning_rate": 1e-4}
AHEAD = "".join(row["prompt"] + row["answer"] for row in load_task("arithmetic").rows("train", 2, 1234))
MEASURED = {"problems": 8, "samples": 1, "greedy": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo model with a chat template that takes no system messages; its tokenizer skips line ends."""
    return demo_model.save_with_template(tmp_path_factory.mktemp("model"), TEMPLATE)


@pytest.fixture(scope="module")
def settings(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return TrainingSettings(
        model=model, out=out, task="arithmetic", layer=5, steps=1, config=CONFIG, shots=2, chat=False, eval_problems=0
    )


@pytest.fixture(scope="module")
def run(settings):
    with pytest.MonkeyPatch.context() as patch:  # with shots the demo model solves nothing, of which this is no test
        patch.setattr(training, "informative_completions", lambda *args, **more: None)
        return train(settings)


def prompts(path):
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def measure(tmp_path, **asked):
    """The prompts of an evaluation, its record, and what it told."""
    told, file = Told(), tmp_path / "completions.jsonl"
    record = evaluate(
        EvaluationSettings(**{"task": "arithmetic", **MEASURED, "completions": file, **asked}), progress=told
    )
    return prompts(file), record, told.notes


@pytest.mark.more
def test_a_run_records_its_prompts_and_its_evaluation_takes_them(run, tmp_path):
    source = json.loads((run.folder / "run.json").read_text())["settings"]["task"]
    assert source["shots"] == 2 and "system" not in source
    given, record, notes = measure(tmp_path, model=str(run.folder))
    assert all(prompt.startswith(AHEAD) for prompt in given) and record.task.shots == 2
    assert "prompts as in the run: 2 shots" in notes
    given, record, notes = measure(tmp_path, model=str(run.folder), shots=0)
    assert not any(AHEAD in prompt for prompt in given) and record.task.shots is None
    assert not any("prompts as in the run" in note for note in notes)
    given, record, _ = measure(tmp_path, model=str(run.folder), task="sort")  # shots are of the run's own task
    assert not any(AHEAD in prompt for prompt in given) and record.task.shots is None


def test_a_resumed_run_must_have_the_same_prompts(run, settings):
    other = dataclasses.replace(settings, shots=1, steps=2)
    with pytest.raises(ValueError, match=re.escape("task.shots: 2 -> 1")):
        train(other, resume=True)


def test_a_system_text_that_the_template_refuses_is_the_users(model, run, tmp_path):
    given, record, _ = measure(tmp_path, model=model, system="A1+1=")
    assert all(len(messages) == 1 and messages[0]["role"] == "user" for messages in given)
    assert all(messages[0]["content"].startswith("A1+1=\n\nA") for messages in given) and record.task.system == "A1+1="


OWN = """
def rows(split, n, seed): return [{"prompt": f"A{i:03d}+001="} for i in range(n)]
def solution(row): return "0."
def my_reward(prompts, completions, **kwargs): return [len(set(text)) / 9 for text in completions]
"""


def test_pairs_show_the_same_problems_of_a_file(settings, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    asked = dataclasses.replace(settings, out=tmp_path / "run", task=str(tmp_path / "own.py"), algorithm="dpo")
    run = train(
        dataclasses.replace(asked, pairs_from_task=8, sampling={"temperature": 3.0, "max_completion_tokens": 4})
    )
    rows = prompts(run.folder / "pairs.jsonl")
    assert rows and {prompt[:26] for prompt in rows} == {"A000+001=0.\n\nA001+001=0.\n\n"}
    assert len(set(rows)) == len(rows) and not any(prompt[26:] in prompt[:26] for prompt in rows)


def test_a_ranking_shows_them(model, monkeypatch):
    from peft_onelayer.runs import probing

    asked = []
    monkeypatch.setattr(
        probing, "rank_blocks", lambda base, tokenizer, task, *rest, **more: asked.append(task) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        probe(ProbeSettings(model=model, task="arithmetic", shots=2, chat=False, config=CONFIG))
    assert all(row["prompt"].startswith(AHEAD) for row in asked[0].rows("train", 3, 0))


def test_a_sweep_shows_them_and_other_prompts_are_other_runs(model):
    sweep = SweepSettings(model=model, task="arithmetic", layers=[0], problems=4, samples=1, chat=False, shots=2)
    spec = plan_sweep(sweep).base
    assert (spec.shots, spec.system) == (2, None)
    bare = plan_sweep(dataclasses.replace(sweep, shots=None)).base
    assert run_layer(spec)["problems_digest"] != run_layer(bare)["problems_digest"]
    system = plan_sweep(dataclasses.replace(sweep, shots=None, system="1")).base
    assert len({spec.digest(), bare.digest(), system.digest()}) == 3


TASK = (
    "def rows(split, n, seed): return [{'prompt': 'A1+1='}] * n\ndef my_reward(completions, **kwargs): return [0.0]\n"
)


@pytest.mark.parametrize("command", ["train", "probe", "eval"])
def test_shots_that_a_task_cannot_show_are_refused_before_the_model_is_loaded(command, tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "config.json").write_text("{}")  # a model that cannot be loaded
    (tmp_path / "model.safetensors").touch()
    asked = {"model": str(tmp_path), "task": str(tmp_path / "task.py"), "shots": 1}
    calls = {
        "train": lambda: train(TrainingSettings(**asked, out=tmp_path / "out")),
        "probe": lambda: probe(ProbeSettings(**asked)),
        "eval": lambda: evaluate(EvaluationSettings(**asked)),
    }
    with pytest.raises(ValueError, match="has no solutions that --shots could show"):
        calls[command]()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [{"shots": 1}, {"system": "Be short."}])
def test_rows_of_offline_data_have_prompts_of_their_own(shape, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    asked = TrainingSettings(
        model=str(tmp_path),
        out=tmp_path / "out",
        dataset=str(tmp_path / "data.jsonl"),
        algorithm="sft",
        layer=0,
        **shape,
    )
    with pytest.raises(ValueError, match="--system and --shots are of a task's prompts"):
        train(asked)


def test_an_epoch_leaves_out_what_is_shown(model, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    rows = [{"prompt": f"A{i:03d}+001="} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = TrainingSettings(
        model=model,
        out=tmp_path / "out",
        dataset=str(tmp_path / "train.jsonl"),
        reward=f"{tmp_path / 'own.py'}:my_reward",
        layer=5,
        chat=False,
        shots=4,
        config={"num_train_epochs": 1, "per_device_train_batch_size": 16, "num_generations": 8, "learning_rate": 1e-4},
    )
    plan = TrainingPlan(asked, tmp_path / "checkpoints")
    assert plan.config.max_steps == 8  # of 2 prompts each
    with pytest.raises(ValueError, match="0 prompts, num_train_epochs=1: no step"):
        TrainingPlan(dataclasses.replace(asked, shots=20), tmp_path / "checkpoints")
