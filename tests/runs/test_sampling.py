"""A model that thinks unless it is told not to: whatever samples it is told as the run is."""

import dataclasses
import json

import demo_model
import pytest
from told import Told

from peft_onelayer.runs import EvaluationSettings, ProbeSettings, TrainingSettings, evaluate, probe, train
from peft_onelayer.sweep.plan import plan_sweep
from peft_onelayer.sweep.run_layer import run_layer
from peft_onelayer.sweep.settings import SweepSettings

THINKS = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}{% else %}AA{% endif %}"
)
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}
SMALL = {"per_device_train_batch_size": 32, "gradient_checkpointing": False, "learning_rate": 1e-4}
MEASURED = {"task": "arithmetic", "problems": 32, "samples": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return demo_model.save_with_template(tmp_path_factory.mktemp("thinks"), THINKS, skips_line_ends=False)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run that was told not to think, sampled in its own way."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = SMALL | QUIET | {"temperature": 0.6, "top_k": 3, "max_completion_length": 6}
    return train(TrainingSettings(model=model, out=out, task="arithmetic", layer=5, steps=1, config=config))


def test_an_evaluation_samples_as_the_run_did(model, run):
    told = Told()
    record = evaluate(EvaluationSettings(model=str(run.folder), **MEASURED), progress=told)
    assert record.results["sampled"].base.mean > 0.1 and record.results["greedy"].base.mean > 0.1
    assert record.chat is True and record.temperature == 0.6 and record.max_completion_tokens == 6
    assert record.sampling["chat_template_kwargs"] == {"enable_thinking": False} and record.sampling["top_k"] == 3
    (note,) = [note for note in told.notes if "sampled as in the run" in note]
    assert "temperature=0.6" in note and "max_completion_tokens=6" in note and "top_k=3" in note
    alone = evaluate(EvaluationSettings(model=model, **MEASURED))  # of no run
    assert alone.results["greedy"].base.mean == 0.0
    assert alone.temperature == 1.0 and alone.max_completion_tokens == 5 and not alone.sampling["chat_template_kwargs"]
    like_it = evaluate(
        EvaluationSettings(
            model=model, temperature=0.6, max_completion_tokens=6, sampling={**QUIET, "top_k": 3}, **MEASURED
        )
    )
    assert like_it.results["sampled"].base.mean == record.results["sampled"].base.mean
    assert like_it.sampling == record.sampling


def test_what_is_given_goes_before_the_run(run):
    told = Told()
    settings = {"temperature": 1.0, "max_completion_tokens": 5, "sampling": {"chat_template_kwargs": {}, "top_k": 0}}
    record = evaluate(EvaluationSettings(model=str(run.folder), **settings, **MEASURED), progress=told)
    assert record.results["greedy"].base.mean == 0.0 and record.temperature == 1.0
    assert not any("sampled as in the run" in note for note in told.notes)


@pytest.mark.more
def test_prompts_are_chat_messages_as_in_the_run(model, tmp_path):
    settings = TrainingSettings(
        model=model, out=tmp_path / "run", task="arithmetic", layer=5, steps=1, chat=False, config=SMALL
    )
    run = train(settings)
    record = evaluate(EvaluationSettings(model=str(run.folder), **MEASURED))
    assert record.chat is False and record.results["greedy"].base.mean > 0.1
    asked = evaluate(EvaluationSettings(model=str(run.folder), chat=True, **MEASURED))
    assert asked.chat is True and asked.results["greedy"].base.mean == 0.0  # it thinks


def test_the_runs_limit_is_not_that_of_another_task(run):
    record = evaluate(EvaluationSettings(model=str(run.folder), **MEASURED | {"task": "sort", "problems": 2}))
    assert record.max_completion_tokens != 6 and record.temperature == 0.6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampling": {"top_pp": 1}}, "has no field 'top_pp'; did you mean top_p"),
        ({"sampling": {"seed": 1}}, "field seed is set by --seed, not by --sampling"),
        ({"sampling": {"temperature": 1.0}, "temperature": 0.5}, "temperature is given twice"),
        ({"sampling": {"chat_template_kwargs": {"thinking": 1}}}, "sets thinking, which the chat template of"),
        ({"sampling": QUIET, "chat": False}, "the prompts are plain text, not chat messages"),
    ],
)
def test_what_has_no_effect_is_refused(run, given, message):
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluationSettings(model=str(run.folder), **MEASURED, **given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": "hot"}, "settings.config: temperature is hot, expected a number"),
        ({"generation_kwargs": {"num_return_sequences": 9}}, "may not set num_return_sequences"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "may not set chat_template"),
    ],
)
def test_a_damaged_run_json_is_named(run, tmp_path, change, message):
    for file in run.folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    record = json.loads((tmp_path / "run.json").read_text())
    record["settings"]["config"] |= change
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluationSettings(model=str(tmp_path), **MEASURED))


def test_what_only_vllm_understands_can_be_left_out(run, tmp_path):
    for file in run.folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    record = json.loads((tmp_path / "run.json").read_text())
    record["settings"]["config"] |= {"use_vllm": True, "generation_kwargs": {"logit_biases": {}}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    given = {"model": str(tmp_path), **MEASURED, "problems": 2}
    with pytest.raises(ValueError, match=r"logit_biases.* evaluate with --sampling generation_kwargs=\{\}"):
        evaluate(EvaluationSettings(**given))
    assert evaluate(EvaluationSettings(**given, sampling={"generation_kwargs": {}})).temperature == 0.6


@pytest.mark.more
def test_a_ranking_samples_as_the_run_to_come(model):
    """Thinking, the base earns nothing, and there is nothing to rank by."""
    settings = ProbeSettings(model=model, task="arithmetic", budget=0.006, config=SMALL | QUIET, steps=4000)
    assert probe(settings).method == "auto"
    with pytest.raises(ValueError, match="there is nothing to learn from"):
        probe(dataclasses.replace(settings, config=SMALL))


def test_a_sweep_evaluates_as_its_runs_sample(model):
    config = QUIET | {"temperature": 0.5, "max_completion_length": 6, "generation_kwargs": {"min_new_tokens": 2}}
    plan = plan_sweep(SweepSettings(model=model, task="arithmetic", layers=[0], config=config, problems=32, samples=2))
    for spec in plan.specs:
        assert spec.sampling["chat_template_kwargs"] == {"enable_thinking": False}
        assert (spec.sampling["temperature"], spec.sampling["max_completion_tokens"]) == (0.5, 6)
    row = run_layer(plan.base)
    assert row["mean"] > 0.1
    bare = plan_sweep(SweepSettings(model=model, task="arithmetic", layers=[0], problems=32, samples=2))
    assert run_layer(bare.base)["mean"] == 0.0
    assert bare.base.digest() != plan.base.digest()


@pytest.mark.more
def test_pairs_are_sampled_and_trained_on_as_asked(model, tmp_path):
    settings = TrainingSettings(
        model=model,
        out=tmp_path / "run",
        task="arithmetic",
        layer=5,
        algorithm="dpo",
        steps=1,
        pairs_from_task=16,
        sampling={**QUIET, "temperature": 1.3},
        config=SMALL,
    )
    run = train(settings)
    rows = [json.loads(line) for line in (run.folder / "pairs.jsonl").read_text().splitlines()]
    assert rows and all(row["chat_template_kwargs"] == {"enable_thinking": False} for row in rows)
    assert run.record.settings.sampling == {**QUIET, "temperature": 1.3}
    record = evaluate(EvaluationSettings(model=str(run.folder), **MEASURED))
    assert record.temperature == 1.3 and record.results["greedy"].base.mean > 0.1
    with pytest.raises(ValueError, match=r"give nothing to compare|were cut before they ended"):
        train(dataclasses.replace(settings, out=tmp_path / "other", sampling={}))
    with pytest.raises(ValueError, match="--sampling is of --pairs-from-task"):
        train(TrainingSettings(model=model, out=tmp_path / "other", task="arithmetic", sampling=QUIET))
