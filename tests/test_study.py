"""The study's pages are what its script makes of the results in the repository."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from peft_onelayer.records import jsonl
from peft_onelayer.records.ranking import LayerRanking

STUDY = Path(__file__).parents[1] / "examples" / "study"
RESULTS = STUDY / "results"


@pytest.fixture
def study(monkeypatch):
    """The study's modules by name."""
    monkeypatch.syspath_prepend(str(STUDY))
    before = set(sys.modules)
    import study

    yield {name: sys.modules[name] for name in ("table", "truth")} | {"study": study}
    for name in set(sys.modules) - before:
        if str(STUDY) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_results_and_the_page_are_written_by_the_script(study, tmp_path):
    table, truth = study["table"], study["truth"]
    for name in (truth.FILE, table.RANKINGS):
        shutil.copy(RESULTS / name, tmp_path)
    page = Path(shutil.copy(table.PAGE, tmp_path))
    written = page.read_text(encoding="utf-8")
    page.write_text(written.replace(written.split("<!-- study ")[1], "begins -->\nold\n"), encoding="utf-8")
    table.write_results([*truth.UNDAMAGED, *truth.VIOLATING, *truth.CORRELATED], tmp_path, page)
    assert (tmp_path / "RESULTS.md").read_text("utf-8") == (RESULTS / "RESULTS.md").read_text("utf-8")
    assert page.read_text(encoding="utf-8") == written
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_no_race_of_the_study_spent_more_than_its_budget(study):
    records = jsonl.read_records(RESULTS / study["table"].RANKINGS)
    races = [record for record in records if record["budget"] is not None]
    assert len(races) > 100 and {record["method"] for record in races} == {"auto", "race"}
    assert all(0 < record["record"]["cost"]["share"] <= record["budget"] for record in races)


def test_a_choice_of_several_blocks_counts_by_the_mean_of_its_blocks(study):
    table, truth = study["table"], study["truth"]
    records = jsonl.read_records(RESULTS / table.RANKINGS)
    (found,) = jsonl.find_records(records, case="noise0-arithmetic-grpo", method="auto", budget=0.25, seed=4)
    ranking = LayerRanking.from_dict(found["record"], "")
    assert ranking.pick is None and ranking.order[0] == 0 and ranking.choice == [3, 4, 5, 6, 7]
    (case,) = (case for case in table.load(truth.VIOLATING, RESULTS) if case.cell.base == "noise0")
    assert case.truth.order[0] == 0
    gains = case.truth.scores
    assert case.of_choice(ranking) == (pytest.approx(sum(gains[3:8]) / 5 / gains[0]), 0)  # not the first block's 1
    assert case.of_choice(replace(ranking, pick=0)) == (1, 1)


def test_a_torn_last_line_is_dropped_and_overwritten(study, tmp_path):
    read, append = jsonl.read_records, jsonl.append_record
    path = tmp_path / "new" / "records.jsonl"
    assert read(path) == []
    append(path, {"case": "a"})
    with path.open("a") as file:
        file.write('{"case": "b", "rec')
    assert read(path) == [{"case": "a"}]
    append(path, {"case": "c"})
    assert read(path) == [{"case": "a"}, {"case": "c"}]
    assert path.read_text() == '{"case": "a"}\n{"case": "c"}\n'


def test_what_is_there_is_not_ranked_again(study, tmp_path, monkeypatch):
    ranked = []

    def rank(base, task, method, budget, seed):
        ranked.append((base.name, task, method, budget, seed))
        return {"scores": {}}

    monkeypatch.setattr(study["study"], "_rank", rank)
    cell = study["truth"].Cell("short6", "arithmetic")
    for stage in study["study"].STAGES:
        study["study"].rank(cell, tmp_path, tmp_path, stage)
    assert len(ranked) == 2 * 5 + 1 + 4 + 1 and len(set(ranked)) == len(ranked)
    path = tmp_path / study["table"].RANKINGS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote
    again, ranked[:] = list(ranked), []
    for stage in study["study"].STAGES:
        study["study"].rank(cell, tmp_path, tmp_path, stage)
    assert ranked == again[3:] and len(jsonl.read_records(path)) == len(again)
    key = {k: v for k, v in json.loads(lines[0]).items() if k != "record"}
    assert key == {"case": "short6-arithmetic-grpo", "method": "auto", "budget": 0.25, "seed": 0}
