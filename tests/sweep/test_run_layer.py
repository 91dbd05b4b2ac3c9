"""One run: what its specification is known by, and what comes out."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
from specs import DEMO, SETTINGS, demo_spec

from peft_onelayer.probe.rate import FoundRate, find_learning_rate
from peft_onelayer.records.files import model_digests
from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.sweep.run_layer import RunSpec, run_layer
from peft_onelayer.tasks import load_task


def without_timings(row):
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.fixture(scope="module")
def rows():
    layers = ("base", 5, [5, 6], "full")
    return {str(layer): run_layer(demo_spec(layer, greedy=layer == "base")) for layer in layers}


@pytest.mark.more
def test_the_base_is_what_evaluate_says(rows):
    import demo_model

    model, tokenizer = demo_model.load()
    task = load_task("arithmetic")
    row, problems = rows["base"], task.rows("test", 16, 0)
    sampled = evaluate(model, tokenizer, task, problems, Sampling(samples=2, batch_size=64))
    greedy = evaluate(model, tokenizer, task, problems, Sampling(greedy=True))
    assert row["scores"] == list(sampled.scores) and row["greedy_scores"] == list(greedy.scores)
    assert (row["mean"], row["standard_error"]) == (sampled.mean, sampled.standard_error)
    assert row["tokens_evaluated"] == sampled.tokens_generated + greedy.tokens_generated
    assert (row["rewards"], row["steps"], row["tokens_generated"], row["tokens_trained"]) == ([], 0, 0, 0)


def test_a_row_of_json_with_its_specification(rows):
    for name, row in rows.items():
        again = json.loads(json.dumps(row, allow_nan=False))
        assert again == row
        spec = RunSpec.from_dict(again["spec"])
        assert spec.digest() == row["digest"] and str(spec.layer) == name
        assert len(row["scores"]) == 16 and row["mean"] == pytest.approx(sum(row["scores"]) / 16)
        assert row["versions"]["versions"]["trl"] and row["seconds"] > 0
    assert len({row["digest"] for row in rows.values()}) == 4
    assert len({row["problems_digest"] for row in rows.values()}) == 1


@pytest.mark.parametrize("layer", [5, pytest.param("full", marks=pytest.mark.more)])
def test_without_steps_it_finds_the_rate_that_a_run_would(layer):
    import demo_model

    given = {"per_device_train_batch_size": 16, "num_generations": 4, "temperature": 0.9}
    spec = demo_spec(layer, steps=0, seed=1, settings=given)
    row = json.loads(json.dumps(run_layer(spec)))
    model, tokenizer = demo_model.load()
    task = load_task("arithmetic")
    layers = None if layer == "full" else layer
    found = find_learning_rate(model, tokenizer, task, layers, make_recipe("grpo", task, given), seed=1, batch_size=64)
    assert replace(FoundRate(**row["found"]), seconds=0) == replace(found, seconds=0)
    assert (row["steps"], row["tokens_generated"], row["tokens_trained"]) == (
        0,
        found.tokens_generated,
        found.tokens_trained,
    )
    assert RunSpec.from_dict(row["spec"]).digest() == row["digest"] and "scores" not in row
    assert str(spec) == ("learning rate of all parameters" if layer == "full" else "learning rate of block 5")


def test_where_nothing_can_be_learned_the_row_says_why(tmp_path):
    task = tmp_path / "hopeless.py"
    task.write_text(
        "MAX_COMPLETION_TOKENS = 8\n\n\n"
        "def rows(split, n, seed):\n    return [{'prompt': f'A{i}+2='} for i in range(n)]\n\n\n"
        "def reward(prompts, completions, **kwargs):\n    return [0.0] * len(completions)\n"
    )
    data = dict(load_task(str(task)).data)
    spec = replace(demo_spec(5, steps=0, settings={}), task=str(task), task_data=data)
    row = json.loads(json.dumps(run_layer(spec)))
    assert (
        "mean 0.00), so that there is nothing to learn from. The likely reason: every completion gets 0"
        in row["nothing"]
    )
    assert sum(line.startswith("completion: ") for line in row["shown"]) == 3 and "found" not in row


def test_training_counts_and_changes_the_scores(rows):
    for name in ("5", "[5, 6]", "full"):
        row = rows[name]
        assert row["steps"] == 2 and len(row["rewards"]) == 2
        assert 0 < row["tokens_generated"] <= 2 * 16 * 5
        assert row["tokens_trained"] == row["tokens_generated"] + 2 * 16 * 9
    assert rows["5"]["scores"] != rows["base"]["scores"] != rows["full"]["scores"]


def test_the_same_specification_gives_the_same_row(rows):
    steps = []
    row = run_layer(demo_spec(5), on_step=lambda step, reward: steps.append((step, reward)))
    assert without_timings(row) == without_timings(rows["5"])
    assert steps == list(enumerate(row["rewards"], start=1))


def test_the_digest_is_of_all_that_decides_the_outcome(tmp_path):
    spec = demo_spec(5)
    reordered = replace(spec, settings=dict(reversed(SETTINGS.items())))
    assert reordered.digest() == spec.digest() and len(spec.digest()) == 64
    moved = shutil.copytree(DEMO, tmp_path / "moved")
    assert replace(spec, model=str(moved), model_digests=model_digests(str(moved))).digest() == spec.digest()
    changes = {
        "task": "sort",
        "layer": 6,
        "algorithm": "dr_grpo",
        "steps": 3,
        "seed": 1,
        "settings": SETTINGS | {"learning_rate": 1e-3},
        "revision": "abc",
        "model_digests": {"config.json": "0"},
        "problems": 17,
        "samples": 3,
        "split": "train",
        "evaluation_seed": 1,
        "batch_size": 32,
        "greedy": True,
        "chat": True,
        "system": "Be short.",
        "shots": 2,
        "task_data": {"file": "0"},
        "unsafe": True,
        "sampling": {"temperature": 0.5},
        "trust_remote_code": True,
        "dataset": "rows.jsonl",
        "reward": "reward.py:reward",
    }
    assert changes.keys() | {"model"} == asdict(spec).keys()
    digests = {replace(spec, **{name: value}).digest() for name, value in changes.items()}
    assert len(digests | {spec.digest()}) == len(changes) + 1
    hub = RunSpec("a/b", "sort", 5, "grpo", 1, 0)
    assert hub.digest() != replace(hub, model="a/c").digest()


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layer must be an index"):
        demo_spec("middle")
    with pytest.raises(ValueError, match="settings must be JSON values"):
        demo_spec(5, settings={"learning_rate": object()}).digest()
    changed = shutil.copytree(DEMO, tmp_path / "changed")
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    with pytest.raises(ValueError, match=r"not the one that the run was made for: config\.json differs"):
        run_layer(replace(demo_spec("base"), model=str(changed)))
    with pytest.raises(ValueError, match="dpo is offline"):
        run_layer(replace(demo_spec(5), algorithm="dpo"))
    with pytest.raises(ValueError, match="data of task arithmetic is not what the run was made for"):
        run_layer(replace(demo_spec(5), task_data={"x": "y"}))
