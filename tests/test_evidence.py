"""What is run as evidence, in which order, and what its tasks hold out; nothing is trained here."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from peft_onelayer.records.jsonl import read_records
from peft_onelayer.tasks import load_task

EVIDENCE = Path(__file__).parents[1] / "examples" / "evidence"


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(EVIDENCE))
    before = set(sys.modules)
    import evidence

    yield evidence
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == EVIDENCE:
            del sys.modules[name]


def row(setting, run, score):
    return {"setting": asdict(setting), "run": asdict(run), "search_mean": score}


def test_blocks_are_named_when_their_rate_is_chosen_and_spread_over_the_depth(evidence):
    setting = evidence.SETTINGS[0]
    first = list(evidence.runs(setting, 30, []))
    assert str(first[0]) == "base" and not any(run.kind == "block" and run.block != 15 for run in first)
    searched = [run for run in first if run.kind == "block"]
    assert [run.rate for run in searched] == list(setting.rates)
    rows = [row(setting, run, {1e-4: 0.5, 3e-4: 0.5}.get(run.rate, 0.2)) for run in searched]
    assert evidence.best_rate(rows[:-1], "block") is None and evidence.best_rate(rows, "block") == 1e-4
    blocks = [run for run in evidence.runs(setting, 30, rows) if run.kind == "block" and run not in searched]
    assert [run.block for run in blocks] == [0, 3, 6, 9, 12, 18, 21, 24, 27, 29]
    assert {run.rate for run in blocks} == {1e-4}
    rows += [row(setting, run, 0.4 - run.rate) for run in first if run.kind == "full"]
    planned = list(dict.fromkeys(evidence.runs(setting, 30, rows)))
    for seed in evidence.SEEDS:
        assert sorted(run.block for run in planned if run.kind == "block" and (run.rate, run.seed) == (1e-4, seed)) == [
            *range(30)
        ]
    assert {run.rate for run in planned if run.kind == "full" and run.seed == 1} == {1e-5, 1e-4}


@pytest.mark.parametrize("name", ["sums", "repeated"])
def test_no_problem_of_the_test_split_is_trained_on(name):
    task = load_task(str(EVIDENCE / f"{name}.py"))
    asked = {split: {r["prompt"].rpartition("\n")[2] for r in task.rows(split, 400, 0)} for split in ("train", "test")}
    assert not asked["train"] & asked["test"] and min(map(len, asked.values())) > 300
    (problem,) = task.rows("test", 1, 0)
    right = f" {problem['answer']}\n"
    assert task.reward(prompts=[problem["prompt"]] * 2, completions=[right, " no"], answer=[problem["answer"]] * 2) == [
        1.0,
        0.0,
    ]


def test_the_rows_in_the_repository_are_of_planned_runs(evidence):
    for setting in evidence.SETTINGS:
        for found in read_records(evidence.RESULTS / f"{setting.name}.jsonl"):
            assert {**found["setting"], "rates": 0, "lora_rates": 0} == {**asdict(setting), "rates": 0, "lora_rates": 0}
            assert len(found["scores"]) == setting.problems
            assert found["mean"] == pytest.approx(sum(found["scores"]) / setting.problems, abs=1e-12)
