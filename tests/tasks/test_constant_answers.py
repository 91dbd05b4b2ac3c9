"""The table of docs/tasks.md is what examples/constant_answers.py measures."""

import importlib.util
import re
from pathlib import Path

import pytest

from peft_onelayer.tasks.reasoning_gym import to_text

FILE = Path(__file__).resolve().parents[2] / "examples" / "constant_answers.py"
spec = importlib.util.spec_from_file_location("constant_answers", FILE)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

TABLE = {
    re.match(r"\| `(\w+)`", line)[1]: line
    for line in script.PAGE.read_text(encoding="utf-8").partition(script.START)[2].partition(script.END)[0].splitlines()
    if line.startswith("| `")
}
QUICK = ("circuit_logic", "course_schedule", "chain_sum")  # the last one is not in the table


def check(name):
    measured = script.measure(name)
    shown = max(measured[0], measured[2]) > script.SHOWN
    assert TABLE.get(name) == (script.line(name, measured) if shown else None)


@pytest.mark.parametrize("name", QUICK)
def test_the_tables_line_is_the_scripts(name):
    check(name)


@pytest.mark.slow
def test_the_table_is_the_scripts():
    from reasoning_gym.factory import DATASETS

    for name in sorted(set(DATASETS) - {"composite", *QUICK}):
        check(name)


def test_the_page_is_made_anew_from_the_lines_that_it_shows():
    assert script.page(list(TABLE.values())) == script.PAGE.read_text(encoding="utf-8")
    assert len(TABLE) >= 10 and list(TABLE) == sorted(TABLE) and set(QUICK[:2]) <= set(TABLE) and QUICK[2] not in TABLE


def test_what_is_repeated_of_a_question():
    question = "Sort 3, -12.5 and 'x'.\n\nThe list:\n7 8\n"
    echoed = {name: echo(question) for name, echo in script.ECHOES.items()}
    assert echoed["its line -1"] == "7 8" and echoed["its paragraph -1"].strip() == "The list:\n7 8"
    assert echoed["its numbers"] == "3, -12.5, 7, 8" and echoed["its largest number"] == "8"
    assert echoed["what it quotes first"] == "x" and echoed["its line 5"] == "" and echoed["its last word"] == "8"
    entry = {"metadata": {"possible_answer": {"0": 1}}}
    assert script.right_answer({"answer": None, "entry": to_text(entry)}) == '{"0": 1}'
    fixed = script.constants(["b", "a", "b"])
    assert list(fixed)[:3] == ["b", "a", "a b"] == list(fixed.values())[:3]
