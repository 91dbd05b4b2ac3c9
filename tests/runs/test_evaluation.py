"""An evaluation from Python: one model in memory, and the base exactly as it is without the adapter."""

import json
import statistics
import weakref
from dataclasses import replace
from importlib.resources import files

import demo_model
import pytest
import run_records
import torch
from changes import save_adapter
from peft import LoraConfig, get_peft_model

from peft_onelayer import SingleLayerConfig
from peft_onelayer.records.run import DataSource
from peft_onelayer.rollouts.evaluation import problem
from peft_onelayer.rollouts.prompts import Shape, shaped
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs import EvaluationSettings, evaluate
from peft_onelayer.runs import evaluation as runs_evaluation
from peft_onelayer.runs.heldout import held_out, watched_among
from peft_onelayer.tasks import Task, load_task

BASE = str(files("peft_onelayer") / "demo_model")
CONFIGS = {
    "block": SingleLayerConfig(layer=5, task_type="CAUSAL_LM"),
    "lora": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    "pissa": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"),
}


@pytest.mark.parametrize("kind", ["block", *(pytest.param(kind, marks=pytest.mark.more) for kind in ("lora", "pissa"))])
def test_it_holds_one_model(tmp_path, monkeypatch, kind):
    torch.manual_seed(0)
    adapted = get_peft_model(demo_model.load()[0], CONFIGS[kind])
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path)
    loaded, alive = [], []
    load = runs_evaluation.load_causal_lm

    def counted(*arguments, **options):
        alive.append(sum(model() is not None for model in loaded))
        model, tokenizer = load(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(runs_evaluation, "load_causal_lm", counted)
    given = {"model": BASE, "task": "arithmetic", "problems": 24, "samples": 2}
    with_adapter = evaluate(EvaluationSettings(**given, adapter=str(tmp_path)))
    assert len(loaded) == (2 if kind == "pissa" else 1)
    assert not any(alive)  # nothing else is in memory when a model is loaded
    alone = evaluate(EvaluationSettings(**given))
    for mode, measured in with_adapter.results.items():
        assert measured.base.mean == alone.results[mode].base.mean
        assert measured.adapter is not None and measured.adapter.mean != measured.base.mean
    assert with_adapter.model == alone.model and alone.adapter is None


def small(split, n, seed):
    """A task with 9 test problems."""
    numbers = [(seed + 2 * i) % 9 for i in range(9)]
    return [{"prompt": str(number), "answer": number} for number in numbers[:n]]


@pytest.mark.parametrize("problems", [3, 4, 128])
@pytest.mark.parametrize("name", ["arithmetic", "small"])
def test_the_problems_that_chose_a_step_are_those_that_the_run_measured(name, problems):
    task = load_task(name) if name == "arithmetic" else Task("small", small, lambda **columns: [], 3)
    as_given, _ = shaped(task, demo_model.load()[1], Shape(system="Add."))
    own = held_out(as_given, problems, 7, Sampling(), watched=True)
    run = run_records.choosing(len(own.rows), source=DataSource(task.name, {}, False), seed=7)
    most = {"arithmetic": 1000, "small": 9}[name]
    watched = watched_among([None, run], task, "test", most, 7)
    rows = task.rows("test", most, 7)
    assert [problem(row) for row, seen in zip(rows, watched, strict=True) if seen] == [
        problem({**row, "prompt": row["prompt"].removeprefix("Add.\n\n")}) for row in own.watched
    ]


def test_without_a_choice_no_problem_chose():
    arithmetic = load_task("arithmetic")
    run = run_records.choosing(4)
    assert sum(watched_among([run], arithmetic, "test", 8, 0)) == 4
    last = replace(run, results=replace(run.results, kept_step=None))
    other = run_records.choosing(4, source=DataSource("arithmetic", {"data": "another"}, False))
    for one in (last, other, run_records.choosing(4, steps=1), run_records.RECORD):
        assert watched_among([one], arithmetic, "test", 8, 0) == []
    assert (
        watched_among([run], arithmetic, "train", 8, 0) == [] == watched_among([run], load_task("sort"), "test", 8, 0)
    )


def test_the_gain_without_the_problems_that_chose_the_step(tmp_path):
    save_adapter(tmp_path / "run", BASE, 5, seed=0, size=0.1, share=1.0)
    (tmp_path / "run" / "run.json").write_text(run_records.choosing(8).to_json())
    given = {"model": BASE, "adapter": str(tmp_path / "run"), "task": "arithmetic", "samples": 2, "greedy": False}
    found = evaluate(EvaluationSettings(**given, problems=24, out=tmp_path / "eval.json"))
    figures = found.results["sampled"]
    scores = json.loads((tmp_path / "eval.json").read_text())["scores"]
    differences = [a - b for a, b in zip(scores["adapter"]["sampled"], scores["base"]["sampled"], strict=True)]
    assert (figures.n, figures.watched) == (24, 8) and any(differences[8:])  # the first rows, with the same seed
    assert figures.unwatched.mean == pytest.approx(statistics.fmean(differences[8:]))
    assert figures.unwatched.standard_error == pytest.approx(statistics.stdev(differences[8:]) / 4)
    assert figures.difference.mean == pytest.approx(statistics.fmean(differences))
    only = evaluate(EvaluationSettings(**given, problems=8)).results["sampled"]
    assert (only.watched, only.unwatched) == (8, None)
    elsewhere = evaluate(EvaluationSettings(**given | {"task": "sort"}, problems=2, also=["arithmetic"]))
    assert elsewhere.results["sampled"].watched is None and elsewhere.also["arithmetic"]["sampled"].watched == 2
    base = evaluate(EvaluationSettings(model=BASE, task="arithmetic", samples=2, greedy=False, problems=8))
    assert base.results["sampled"].watched is None
