"""run.json and eval.json as types: round trips, what earlier versions wrote, and errors that name file and field."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from run_records import MODEL, RECORD, TASK

from peft_onelayer.records.evaluation import EvaluationRecord, MeasuredAdapter
from peft_onelayer.records.figures import Figures, Measured
from peft_onelayer.records.run import RunRecord, RunResults

OLD = Path(__file__).with_name("old")
KINDS = {"run.json": RunRecord, "eval.json": EvaluationRecord}
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


@pytest.mark.parametrize("record", [RECORD, FINISHED, EVALUATION], ids=["unfinished", "finished", "evaluation"])
def test_json_round_trip(record):
    text = record.to_json()
    assert type(record).from_json(text) == record
    assert json.loads(text)["format"] == record.FORMAT
    # parts that are not there are left out
    assert "resumed_from" not in json.loads(text) and "scores" not in json.loads(text)


@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("by", ["demo", "train"])
def test_what_earlier_versions_wrote_is_read_and_comes_back(by, file):
    path = OLD / by / file
    written = json.loads(path.read_text(encoding="utf-8"))
    record = KINDS[file].from_file(path)
    again = record.to_dict()
    assert KINDS[file].from_json(record.to_json()) == record
    if (by, file) == ("demo", "run.json"):  # the demo recorded less of a run
        assert again["settings"].pop("full") is False
        assert record.results == RunResults(20, written["results"]["rewards"], verdict=written["results"]["verdict"])
        again["results"] = {name: again["results"][name] for name in written["results"]}
    without_null = {**written, "settings": _without_null(written["settings"])} if file == "run.json" else written
    again = {**again, "settings": _without_null(again["settings"])} if file == "run.json" else again
    assert again == without_null


def _without_null(settings):
    return {name: value for name, value in settings.items() if value is not None}


def test_what_is_left_out_of_a_file_is_none_and_the_other_way_round():
    record = RunRecord.from_file(OLD / "demo" / "run.json")
    assert (record.settings.layer, record.settings.dataset, record.resumed_from) == (None, None, None)
    assert not {"layer", "dataset", "top_entropy"} & record.to_dict()["settings"].keys()
    assert "resumed_from" not in record.to_dict()
    assert Figures.of(0.5, float("nan")) == Figures(0.5, None)


def changed(file, by="train", **paths):
    """The text of an old file in which the fields at dotted paths ("settings__seed") have other values."""
    record = json.loads((OLD / by / file).read_text(encoding="utf-8"))
    for path, value in paths.items():
        *parents, last = path.split("__")
        target = record
        for parent in parents:
            target = target[parent]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("run.json", {"format": "theirs"}, 'x is no record of a training run: its "format" is theirs, expected "onel'),
        ("run.json", {"settings__seed": "x"}, "x: settings.seed is x, expected an integer"),
        ("run.json", {"settings__seed": True}, "x: settings.seed is True, expected an integer"),
        ("run.json", {"settings__model": ...}, "x: settings.model is missing, expected an object"),
        ("run.json", {"settings__model__sha256": {"config.json": 3}}, "x: settings.model.sha256.config.json is 3, exp"),
        ("run.json", {"settings__sed": 1}, "x: settings.sed is not known; expected model, algorithm"),
        ("run.json", {"settings__task": None}, "x: settings.task and settings.dataset are null, expected one of them"),
        ("run.json", {"settings__layer": 1.5}, "x: settings.layer is 1.5, expected an integer or text or a list of an"),
        ("run.json", {"layers": [5, "6"]}, "x: layers[1] is 6, expected an integer"),
        ("run.json", {"settings__task": "sort"}, "x: settings.task is sort, expected an object or null"),
        ("run.json", {"results": []}, "x: results is list, expected an object or null"),
        ("eval.json", {"extra": 1}, "x: extra is not known; expected command, model"),
        ("run.json", {"status": "done"}, 'x: status is done, expected "unfinished" or "finished"'),
        ("run.json", {"results__rewards": None}, "x: results.rewards is None, expected a list of a number"),
        ("eval.json", {"results__greedy__base__mean": "good"}, "x: results.greedy.base.mean is good, expected a numb"),
        ("eval.json", {"results": {}}, 'x: results holds nothing, expected "sampled", "greedy" or both'),
        ("eval.json", {"results__beam": ...}, None),
        ("eval.json", {"adapter": None}, "x: results.sampled.adapter is there without an adapter"),
        ("eval.json", {"results__greedy__difference": ...}, "x: results.greedy.difference is missing"),
        ("eval.json", {"task": "arithmetic"}, "x: task is arithmetic, expected an object"),
    ],
)
def test_the_wrong_field_is_named(file, change, message):
    if message is None:
        record = json.loads(changed(file))
        record["results"]["beam"] = record["results"].pop("greedy")
        text, message = json.dumps(record), 'x: results holds sampled, beam, expected "sampled", "greedy" or both'
    else:
        text = changed(file, **change)
    with pytest.raises(ValueError) as error:
        KINDS[file].from_json(text, "x")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "run.json"
    for content, message in (
        (b"{", "is not JSON"),
        (b"[]", "holds no fields"),
        (b"\xff", "cannot be read"),
        (b" " * (2**25 + 1), "has 33,554,433 bytes, more than any record"),
        (None, "cannot be read"),
    ):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"run.json {message}"):
            RunRecord.from_file(path)
