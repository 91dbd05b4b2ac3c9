"""The tables of strategies, votes and two tasks in the documents are what the rows say; nothing is trained."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "strategies"


@pytest.mark.parametrize(
    ("script", "page"), [("strategies", "choosing-a-block"), ("voters", "sharing"), ("two_tasks", "sharing")]
)
def test_the_table_in_the_documents_is_what_the_rows_say(monkeypatch, script, page):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    module = importlib.import_module(script)
    table = module.table()
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert table in text, f"docs/{page}.md: put in what python examples/strategies/{script}.py prints"
