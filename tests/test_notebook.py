"""The notebook runs from top to bottom in an empty folder."""

import json
from pathlib import Path

import pytest

NOTEBOOK = json.loads((Path(__file__).parents[1] / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))


def code():
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    for number, text in enumerate(code()):
        compile(text, f"cell {number}", "exec")


@pytest.mark.more
def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, text in enumerate(code()):
        exec(compile(text.replace("STEPS = 40", "STEPS = 12"), f"cell {number}", "exec"), names)
    measured = names["run"].record.results.held_out
    assert measured.difference.mean > 3 * measured.difference.standard_error
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert "license: apache-2.0" in (tmp_path / "run" / "README.md").read_text()
