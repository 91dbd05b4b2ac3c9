"""The study's pages are what its script makes of the results in the repository."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "examples" / "study"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    import table

    yield table
    for name in ("bases", "diagnostics", "table", "truth"):
        sys.modules.pop(name, None)


def test_results_and_readme_are_written_by_the_script(table, tmp_path):
    results = tmp_path / "examples" / "study" / "results"
    shutil.copytree(STUDY / "results", results)
    (results / "RESULTS.md").unlink()
    shutil.copy(ROOT / "README.md", tmp_path)
    truth = sys.modules["truth"]
    table.write_results([*truth.UNDAMAGED, *truth.VIOLATING, *truth.CORRELATED], results, tmp_path / "README.md")
    assert (results / "RESULTS.md").read_text() == (STUDY / "results" / "RESULTS.md").read_text()
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert (results / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_no_race_of_the_study_spent_more_than_its_budget(table):
    seen = 0
    for path in (STUDY / "results" / "rankings").rglob("*-*-*.json"):
        method, budget, _ = path.stem.split("-")
        share = table.json.loads(path.read_text())["cost"]["share"]
        assert method in ("auto", "race") and 0 < share <= float(budget)
        seen += 1
    assert seen > 20
