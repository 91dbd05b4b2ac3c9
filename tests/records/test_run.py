"""run.json and eval.json as types: round trips, old files, and errors that name the field."""

import json
from dataclasses import replace

import pytest
from run_records import MODEL, RECORD, TASK

from peft_onelayer.records.evaluation import EvaluationRecord, Figures, Measured, MeasuredAdapter
from peft_onelayer.records.run import RunRecord, RunResults

FINISHED = replace(RECORD, status="finished", why="it is the middle", results=RunResults(3, [0.1, 0.2, float("inf")]))
EVALUATION = EvaluationRecord(
    command=None,
    model=MODEL,
    adapter=MeasuredAdapter("out", "SINGLE_LAYER", [5], "0" * 64),
    task=TASK,
    split="test",
    n=2,
    samples=4,
    temperature=1.0,
    max_completion_tokens=5,
    seed=0,
    results={"sampled": Measured(2, 4, Figures(0.5, None), Figures(0.75, 0.1, 40, 1.5), Figures.of(0.25, 0.2))},
)
# What `onelayer demo` wrote beside its adapter before records were types.
OLD_DEMO_RUN = {
    "format": "onelayer-run-1",
    "command": "onelayer demo --seed 0",
    "settings": {
        "model": {"name": "m", "revision": None, "sha256": {}, "dtype": "float32", "num_layers": 12, "parameters": 1},
        "algorithm": "grpo",
        "trainer": "trl.GRPOTrainer",
        "task": {"name": "arithmetic", "data": {}, "chat": False},
        "seed": 0,
        "config": {"learning_rate": 0.003},
    },
    "machine": {"versions": {}},
    "layers": [7],
    "why": "block 7 gains",
    "results": {"steps": 150, "rewards": [0.1], "verdict": "RL on block 7 helped"},
    "status": "finished",
}


@pytest.mark.parametrize("record", [RECORD, FINISHED, EVALUATION], ids=["unfinished", "finished", "evaluation"])
def test_json_round_trip(record):
    text = record.to_json()
    assert type(record).from_json(text) == record
    assert json.loads(text)["format"] == record.FORMAT
    # parts that are not there are left out, as before
    assert "resumed_from" not in json.loads(text) and "scores" not in json.loads(text)


def test_old_records_load():
    run = RunRecord.from_dict(OLD_DEMO_RUN, "run.json")
    assert run.settings.layer is None and run.results.tokens_generated == 0
    assert run.results.verdict == "RL on block 7 helped" and run.settings.source.name == "arithmetic"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["settings", "seed"], "x", "run.json: settings.seed is x, expected an integer"),
        (["settings", "model", "num_layers"], None, "run.json: settings.model.num_layers is None, expected an integer"),
        (["settings", "task"], "arithmetic", "run.json: settings.task is arithmetic, expected an object or null"),
        (["settings", "task", "data", "a"], 1, "run.json: settings.task.data.a is 1, expected text"),
        (["layers"], [5, "6"], "run.json: layers[1] is 6, expected an integer"),
        (["status"], "done", 'run.json: status is done, expected "unfinished" or "finished"'),
        (["results"], [], "run.json: results is list, expected an object"),
        (["format"], "theirs", 'run.json is no record of a training run: its "format" is theirs'),
    ],
)
def test_the_wrong_field_is_named(path, value, message):
    fields = json.loads(json.dumps(OLD_DEMO_RUN))
    at = fields
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    with pytest.raises(ValueError) as error:
        RunRecord.from_json(json.dumps(fields), "run.json")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_missing_and_an_unknown_field_are_named():
    fields = json.loads(json.dumps(OLD_DEMO_RUN))
    del fields["settings"]["algorithm"]
    with pytest.raises(ValueError, match=r"^run\.json: settings\.algorithm is missing, expected text$"):
        RunRecord.from_dict(fields, "run.json")
    with pytest.raises(ValueError, match=r"^eval\.json: extra is not known; expected command, model"):
        EvaluationRecord.from_dict({**EVALUATION.to_dict(), "extra": 1}, "eval.json")
