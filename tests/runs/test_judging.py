"""Held-out problems before, during and after training: the verdict, the best state, and a run that is lost."""

import json
import warnings
from dataclasses import replace
from importlib.resources import files

import demo_model
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from told import Told
from transformers import TrainerCallback

from peft_onelayer.records.figures import Figures
from peft_onelayer.records.run import RunRecord
from peft_onelayer.rollouts.evaluation import Evaluation, evaluate, paired_difference
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs import Progress, TrainingSettings, train
from peft_onelayer.runs import training as runs_training
from peft_onelayer.runs.judging import Judge
from peft_onelayer.runs.plan import TrainingPlan
from peft_onelayer.runs.verdict import below_start as below_start_by_step
from peft_onelayer.runs.verdict import fallen as fallen_by_step
from peft_onelayer.runs.verdict import far_below, verdict
from peft_onelayer.tasks import load_task

BASE = str(files("peft_onelayer") / "demo_model")
TASK = load_task("arithmetic")
NO_SAVING = {"save_strategy": "no"}
CONFIG = {"per_device_train_batch_size": 16, "gradient_checkpointing": False, "learning_rate": 3e-3, "save_steps": 2}


def settings(tmp_path, **changes):
    config = {**CONFIG, **changes.pop("config", {})}
    given = {"model": BASE, "out": tmp_path / "run", "task": "arithmetic", "layer": 5, "steps": 4, "config": config}
    return TrainingSettings(**{**given, **changes})


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.more
def test_base_and_result_are_compared_on_the_same_problems(tmp_path):
    told = Told()
    run = train(settings(tmp_path, steps=1, eval_problems=24, also=["sort"], show=1), progress=told)
    results = run.record.results
    base, tokenizer = demo_model.load()
    tasks = {"arithmetic": results.held_out, **results.also}
    before = {name: score(base, tokenizer, name) for name in tasks}
    adapted = PeftModel.from_pretrained(base, tmp_path / "run")
    after = {name: score(adapted, tokenizer, name) for name in tasks}
    for name, found in tasks.items():
        assert (found.n, found.samples) == (24, 4)
        assert (found.base.mean, found.adapter.mean) == (before[name].mean, after[name].mean)
        difference, error = paired_difference(after[name], before[name])
        assert (found.difference.mean, found.difference.standard_error) == (difference, error)
        assert found.adapter.completions == after[name].completions
    assert f"{results.held_out.difference.mean:+.4f}" in results.verdict
    assert results.completions.completions == 16 and results.completions.no_answer == 0.0
    assert sum(note.startswith("prompt: ") for note in told.notes) == 1 and any("trained: " in n for n in told.notes)
    assert RunRecord.from_file(tmp_path / "run" / "run.json") == run.record
    card = (tmp_path / "run" / "README.md").read_text()
    assert results.verdict in card and "| arithmetic |" in card and "| sort |" in card


def score(model, tokenizer, name):
    task = load_task(name)
    return evaluate(model, tokenizer, task, task.rows("test", 24, 0), Sampling(samples=4, batch_size=64))


@pytest.mark.more
def test_measuring_on_the_way_changes_nothing_and_the_best_state_is_put_out(tmp_path, monkeypatch):
    plain = train(settings(tmp_path, out=tmp_path / "plain", eval_problems=0))
    last = train(settings(tmp_path, out=tmp_path / "last", eval_problems=8, eval_every=1, keep="last"))
    assert same(weights(plain.folder), weights(last.folder))
    assert plain.record.results.rewards == last.record.results.rewards and plain.record.results.verdict is None
    assert [score.step for score in last.record.results.evaluations] == [1, 2, 3, 4]
    assert last.record.results.kept_step is None
    # of a run that is killed after step 3 and goes on from step 2
    scores = iter([0.1, 0.9, 0.3, 0.3, 0.2, 0.3, 0.4, 0.5])
    monkeypatch.setattr("peft_onelayer.runs.judging.Judge._score", lambda judge, model: all_at(judge, next(scores)))
    asked = settings(tmp_path, eval_problems=8, eval_every=1)
    with monkeypatch.context() as patched:
        patched.setattr(runs_training, "train_rows", killed_after(3))
        with pytest.raises(KeyboardInterrupt):
            train(asked)
    best = train(asked, resume=True)
    assert best.record.resumed_from == ["checkpoint-2"] and best.record.results.kept_step == 2
    assert [score.mean for score in best.record.results.evaluations] == [0.1, 0.9, 0.3, 0.2]
    at_2 = weights(best.folder / "checkpoints" / "checkpoint-2")
    assert same(weights(best.folder), at_2) and not same(weights(plain.folder), at_2)
    assert same(get_peft_model_state_dict(best.model), at_2)
    # more steps, all of them worse: what was put out stays
    more = train(replace(asked, steps=6), resume=True)
    assert [score.mean for score in more.record.results.evaluations] == [0.1, 0.9, 0.3, 0.2, 0.3, 0.4]
    assert more.record.results.kept_step == 2 and same(weights(more.folder), at_2)
    # without a checkpoint nothing can go on, and nothing is left of the measuring
    alone = train(settings(tmp_path, out=tmp_path / "alone", steps=1, eval_problems=8, eval_every=1, config=NO_SAVING))
    assert alone.record.results.kept_step == 1 and not list((alone.folder / "checkpoints").glob("*"))


def all_at(judge, mean):
    """Every watched problem with this score."""
    return replace(judge.watched[0], scores=(mean,) * judge.watched[0].n)


def made(mean):
    return Evaluation(tuple(map(str, range(8))), (mean,) * 8, 4)


def killed_after(step):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    def train_rows(*args, callbacks=(), **kwargs):
        return original(*args, callbacks=[*callbacks, Kill()], **kwargs)

    original = runs_training.train_rows
    return train_rows


@pytest.mark.more
@pytest.mark.parametrize("changes", [{"full": True, "layer": "auto"}, {"algorithm": "dpo", "pairs_from_task": 16}])
def test_a_full_run_and_an_offline_one_are_measured_too(tmp_path, monkeypatch, changes):
    scores = iter([0.9, 0.1])
    monkeypatch.setattr("peft_onelayer.runs.judging.Judge._score", lambda judge, model: all_at(judge, next(scores)))
    config = {"per_device_train_batch_size": 8}
    first = train(settings(tmp_path, out=tmp_path / "1", steps=1, eval_problems=0, config=config, **changes))
    run = train(
        settings(tmp_path, steps=2, eval_problems=16, eval_every=1, config={**config, "save_steps": 1}, **changes)
    )
    results = run.record.results
    assert results.kept_step == 1 and results.held_out.n == 16 and results.verdict
    one, kept = (load_file(next(folder.glob("*.safetensors"))) for folder in (first.folder, run.folder))
    last = load_file(next((run.folder / "checkpoints" / "checkpoint-2").glob("*.safetensors")))
    assert not same(kept, last)
    at_1 = load_file(next((run.folder / "checkpoints" / "checkpoint-1").glob("*.safetensors")))
    assert same(kept, at_1) and one.keys() == kept.keys()


@pytest.mark.more
def test_a_run_whose_reward_falls_stops_and_says_so(tmp_path, onelayer):
    (tmp_path / "r.py").write_text(
        "calls = 0\n\ndef reward(completions, **kwargs):\n"
        "    global calls\n    calls += 1\n"
        "    return [(calls < 12) * (0.5 + 0.1 * (i % 2)) for i in range(len(completions))]\n"
    )
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"A{i:03d}+001="}) + "\n" for i in range(64)))
    data = ["--dataset", tmp_path / "p.jsonl", "--reward", f"{tmp_path / 'r.py'}:reward", "--eval-problems", "0"]
    options = [f"--set={name}={str(value).lower()}" for name, value in CONFIG.items()]
    arguments = ["train", BASE, *data, "--layer", "5", "--steps", 60, "--set", "max_completion_length=2", *options]
    code, lines, out = onelayer(*arguments, "--out", tmp_path / "run")
    record = RunRecord.from_file(tmp_path / "run" / "run.json")
    assert code == 1 and record.status == "finished", lines
    assert 20 <= record.results.steps < 60 and record.results.steps == len(record.results.rewards)
    assert record.results.stopped in out and "the mean reward fell from 0.55 (first 10 steps)" in record.results.stopped
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_when_a_reward_has_fallen():
    def fallen(rewards):
        return fallen_by_step(dict(enumerate(rewards, start=1)))

    def below_start(rewards, base):
        return below_start_by_step(dict(enumerate(rewards, start=1)), base)

    start = [0.5, 0.52] * 5
    assert fallen(start + [0.3] * 10) is None and fallen(start + [0.2] * 10)
    assert fallen(start + [0.0] * 9) is None  # before 20 steps nothing is said
    assert fallen([0.0, 0.6] * 5 + [0.0, 0.28] * 5) is None  # half, and within the noise
    assert fallen([-0.5, -0.4] * 5 + [-3.0] * 10) is None  # half of a penalty is more
    # ruined in its first steps: there is no height but the base's and the first step's
    base = Evaluation(made(0.8).problems, (0.7, 0.9) * 4, 4)
    assert "(last 10 steps) from 0.6 (first step)" in below_start([0.6] + [0.05] * 10, base)
    assert below_start([0.6] + [0.05] * 8, base) is None  # before 10 steps nothing is said
    assert below_start([0.2] + [0.15, 0.2] * 5, base) is None  # the run's own prompts are harder
    assert below_start([0.6] + [0.0, 0.9] * 5, base) is None  # noise
    # two steps a generation
    every_other = {2 * k + 1: reward for k, reward in enumerate([0.6] + [0.05] * 10)}
    assert "(last 10 rewards, to step 21) from 0.6 (step 1)" in below_start_by_step(every_other, base)
    base, lost = made(0.8), Evaluation(made(0.8).problems, (0.1, 0.3) * 4, 4)
    assert "fell from 0.8 (the base's) to 0.2" in far_below(Figures.of(*paired_difference(lost, base)), base, lost)
    assert far_below(Figures.of(*paired_difference(made(0.5), base)), base, made(0.5)) is None
    # 8 problems know their noise badly: what is 3 standard errors of a normal distribution is 4.5 of theirs
    noisy = Evaluation(base.problems, (0.8, 0.8, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0), 4)
    difference = Figures.of(*paired_difference(noisy, base))
    assert noisy.mean < 0.4 and -difference.mean > 3 * difference.standard_error
    assert far_below(difference, base, noisy) is None


def test_a_few_problems_tell_nothing():
    """Equal differences of two problems have no spread, and stand for nothing."""
    few, lost = (Evaluation(("a", "b", "c"), (mean,) * 3, 4) for mean in (0.8, 0.1))
    assert far_below(Figures.of(*paired_difference(lost, few)), few, lost) is None
    assert below_start_by_step(dict(enumerate([0.6] + [0.05] * 10, start=1)), few) is None
    for n in range(1, 8):
        for difference in (0.25, -0.25, 0.0):
            said = verdict(Figures(difference, None if n == 1 else 0.0), n, same=0.1)
            assert said.startswith(f"nothing can be said: {difference:+.4f}") and "raise --eval-problems" in said
    assert verdict(Figures(0.25, 0.0), 8, same=0.1).startswith("gained")
    # 2.365 standard errors are the 95 % of 8 problems
    assert verdict(Figures(0.22, 0.1), 8, same=0.1).startswith("nothing changed beyond noise")
    assert verdict(Figures(0.24, 0.1), 8, same=0.1).startswith("gained")
    assert verdict(Figures(-0.22, 0.1), 8, same=0.1).startswith("nothing changed beyond noise")


@pytest.mark.parametrize(
    ("difference", "facts", "said"),
    [
        ((0.1, 0.04), {}, "gained: +0.1000 ± 0.0400 on 64 held-out problems"),
        ((-0.1, 0.04), {}, "got worse: -0.1000 ± 0.0400"),
        ((0.0, 0.0), {"same": 1.0}, "likely reason: the rate: 100% of the completions are the base's"),
        ((0.01, 0.04), {"equal": 0.9}, "likely reason: the reward: for 90% of the prompts"),
        ((0.01, 0.04), {"prompts": 1}, "likely reason: the batch: 1 prompts a step"),
        ((0.01, 0.04), {"prompts": 8}, "a gain below 0.080 cannot be seen"),
        (
            (0.01, 0.04),
            {"prompts": 8},
            "raise --steps or --learning-rate, train another --layer, or raise --eval-problems",
        ),
    ],
)
def test_the_verdict(difference, facts, said):
    assert said in verdict(Figures.of(*difference), 64, **{"same": 0.1, **facts})


def test_an_adapter_that_equals_its_base_is_told_once_at_the_end(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(settings(tmp_path, config={"learning_rate": 1e-30, "save_steps": 1}, steps=3, eval_problems=16))
    assert len([w for w in caught if "equals the base model's" in str(w.message)]) == 1
    results = RunRecord.from_file(tmp_path / "run" / "run.json").results
    assert results.held_out.difference.mean == 0.0
    assert "nothing changed beyond noise" in results.verdict and "the rate: 100%" in results.verdict


@pytest.mark.parametrize(("steps", "problems", "shown"), [(40, 64, 64), (4, 0, 16), (150, 128, 128)])
def test_showing_completions_measures_no_more_than_it_must(tmp_path, steps, problems, shown):
    def of(**changes):
        asked = settings(tmp_path, steps=steps, prompts=8, completions=8, **changes)
        plan = TrainingPlan(asked, tmp_path / "checkpoints")
        return Judge(asked, plan.algorithm, plan.config, plan.task, plan.generate, Progress()).problems

    assert [of(), of(show=3), of(show=3, eval_problems=5)] == [problems, shown, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "first"}, "--keep is one of best, last, got 'first'"),
        ({"eval_problems": 0, "eval_every": 2}, "--eval-problems 0 leaves --eval-every"),
        ({"also": ["arithmetic"]}, "--also arithmetic is measured already"),
        ({"also": ["no_such"]}, "task 'no_such' is not known"),
        ({"eval_every": 0}, "--eval-every must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path, **options))
    assert list(tmp_path.iterdir()) == []
