"""MBPP: programs in any form against their tests; which rows can be graded."""

import json
import re

import pytest
from data_sets import OWN

from peft_onelayer import sandbox
from peft_onelayer.tasks import load_task
from peft_onelayer.tasks.mbpp import called_functions, mbpp_reward

pytestmark = pytest.mark.skipif(bool(sandbox.available()), reason=str(sandbox.available()))

TESTS = ["assert twice(4) == 8", 'assert twice("a") == "aa"']
PROGRAM = "def twice(x):\n    return x + x\n"

RIGHT = {
    "plain": PROGRAM,
    "fence": f"```python\n{PROGRAM}```",
    "prose around": f"Here's how:\n\n```python\n{PROGRAM}```\n\nIt adds `x` to itself:\n```\ntwice(4)\n```",
    "the paper's mark": f"{PROGRAM}[DONE]\n\nYou are an expert Python programmer\n[BEGIN]\ndef twice(x): return 0",
    "thinking": f"<think>```python\ndef twice(x): return 0\n```</think>\n```python\n{PROGRAM}```",
    "its own tests": f"{PROGRAM}\n\nassert twice(4) == 8\nprint(twice(4))\n",
    "windows": PROGRAM.replace("\n", "\r\n"),
    "helper": "def add(a, b):\n    return a + b\n\ndef twice(x):\n    return add(x, x)",
}
WRONG = {
    "wrong": "def twice(x):\n    return 2 ** x\n",
    "another name": "def double(x):\n    return x + x\n",
    "prose": "You can add x to itself.",
    "thought only": f"<think>```python\n{PROGRAM}```",
    "exit": "def twice(x):\n    import os; os._exit(0)\n",
    "equal to all": "class E:\n    def __eq__(self, other): return True\ndef twice(x): return E()\n",
    "nothing": "",
}


def test_programs_pass_in_any_form_and_others_do_not():
    forms = {**RIGHT, **WRONG}
    rewards = mbpp_reward([""] * len(forms), list(forms.values()), [TESTS] * len(forms))
    assert dict(zip(forms, rewards, strict=True)) == dict.fromkeys(RIGHT, 1.0) | dict.fromkeys(WRONG, 0.0)


def test_completions_may_be_chats_and_setup_code_runs_before_the_tests():
    chats = [
        [{"role": "assistant", "content": text}] for text in ("def half(x): return x / 2", "def half(x): return 1")
    ]
    columns = {"test_list": [["assert math.isclose(half(3), 1.5)"]] * 2, "test_setup_code": ["import math"] * 2}
    assert mbpp_reward([[]] * 2, chats, **columns, log_metric=lambda name, value: None) == [1.0, 0.0]
    del columns["test_setup_code"]
    imports = {"test_imports": [["import math"]] * 2}
    assert mbpp_reward([[]] * 2, chats, **columns, **imports) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"test_list": ["assert set(f((1,))) == set((1,))", "assert g(f(2)) == 1"]}, {"f", "g"}),
        ({"test_list": ["assert math.isclose(f(1), 1)"], "test_setup_code": "import math"}, {"f"}),
        ({"test_list": ["assert sum(10, 15) == 6"], "code": "def sum(a, b):\n    return 6"}, {"sum"}),
        ({"test_list": ["x = h(1)\nassert sorted(x) == k(x)"], "test_setup_code": "def k(y): return y"}, {"h"}),
    ],
)
def test_the_functions_that_tests_call(row, names):
    assert set(called_functions(row)) == names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The ten rows of our own: seven to train on, three to test on."""
    folder = tmp_path_factory.mktemp("mbpp")
    lines = (OWN / "mbpp.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:7]), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(lines[7:]), encoding="utf-8")
    return folder


@pytest.mark.more
def test_all_solutions_of_a_folder_pass_as_they_are_shown_and_no_other_rows(folder):
    task = load_task(f"mbpp:{folder}")
    assert task.name == f"mbpp:{folder}" and set(task.data) == {"train.jsonl", "test.jsonl"} and task.train_size == 7
    rows = task.rows("train", 99, 0) + task.rows("test", 99, 0)
    assert sorted(row["task_id"] for row in rows) == list(range(1, 11))
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    for form in (task.shown.solution, task.shown.message):
        assert task.reward(prompts=[""] * 10, completions=[form(row) for row in rows], **columns) == [1.0] * 10
    others = [task.shown.message(row) for row in rows[1:] + rows[:1]]
    assert task.reward(prompts=[""] * 10, completions=others, **columns) == [0.0] * 10
    assert all(task.answer(task.shown.message(row)) == task.shown.message(row)[10:-3] for row in rows)


def test_a_prompt_holds_the_tests_and_a_base_model_is_asked_as_in_the_paper(folder):
    task = load_task(f"mbpp:{folder}")
    row = next(row for row in task.rows("train", 9, 0) if row["task_id"] == 3)
    text = "Write a function to find the area of a rectangle of given sides. Your code should pass these tests:\n\n"
    tests = "assert area(3, 4) == 12\nassert area(0, 9) == 0\nassert area(5, 5)==25 \n"
    assert row["prompt"] == f"{text}{tests}\nAnswer with Python code only."
    head = "You are an expert Python programmer, and here is your task: "
    assert task.shown.question(row) == f"{head}{text}{tests}[BEGIN]\n"
    assert task.shown.solution(row) == "def area(a, b):\n\treturn a * b\n[DONE]"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"mbpp:{path}"


GOOD = {"text": "Double.", "code": PROGRAM, "task_id": 1, "test_list": TESTS}


def test_the_sanitized_columns_are_read_too(tmp_path):
    row = {"prompt": "Double.", "code": PROGRAM, "task_id": 1, "test_imports": [], "test_list": TESTS}
    task = load_task(write(tmp_path / "test.jsonl", row))
    assert task.is_over("def f(): pass\n[DONE]\nYou are") and not task.is_over("def f(): pass\n")
    (given,) = task.rows("test", 1, 0)
    assert given["prompt"].startswith("Double. Your code should pass these tests:\n\nassert twice(4)")
    assert task.shown.question(given).startswith(
        "You are an expert Python programmer, and here is your task: Double. Y"
    )


def test_rows_that_cannot_be_graded_are_left_out_with_a_warning(tmp_path):
    of_class = {"code": "class Pair:\n    pass\ndef f(p): return 1", "test_list": ["assert f(Pair()) == 1"]}
    failing = {"code": "def twice(x): return 1", "test_list": ["assert twice(1) == 2"]}
    rows = [
        GOOD,
        {**GOOD, "task_id": 2, "text": "Twice."},
        {**GOOD, "task_id": 3, **of_class},
        {**GOOD, "task_id": 4, **failing},
    ]
    with pytest.warns(UserWarning) as told:
        task = load_task(write(tmp_path / "test.jsonl", *rows))
    assert sorted(row["task_id"] for row in task.rows("test", 9, 0)) == [1, 2]
    messages = sorted(str(one.message) for one in told)
    assert "left out 1 of 3 problems tried, such as problem 4, whose own code does not pass" in messages[0]
    assert "left out 1 problems whose tests need a class of the program, such as problem 3" in messages[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_list": ["assert twice("]}, "the tests of MBPP's problem 1 are not Python"),
        ({"test_list": []}, "test_list must be a list of assertions, got []"),
        ({"test_list": "assert twice(4) == 8"}, "test_list must be a list of assertions, got 'assert"),
        ({"test_list": ["assert 1 == 1"]}, "problem 1 call no function that a program could define"),
        ({"text": None}, "problem 1 has no text in a column 'text' or 'prompt'"),
        ({"code": "def twice(x): return 1"}, "1 of 1 problems tried cannot be graded, such as problem 1"),
    ],
)
def test_bad_data_is_refused_when_loaded(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_task(write(tmp_path / "test.jsonl", {**GOOD, **changes}))
    assert "\n" not in str(raised.value)


def test_a_row_without_code_is_graded_and_cannot_be_shown(tmp_path):
    row = {name: value for name, value in GOOD.items() if name != "code"}
    task = load_task(write(tmp_path / "train.jsonl", row))
    (given,) = task.rows("train", 1, 0)
    assert task.reward([""], [PROGRAM], test_list=[given["test_list"]]) == [1.0]
    with pytest.raises(ValueError, match="problem 1 has no column code that could be shown; leave out --shots"):
        task.shown.solution(given)


def test_without_a_sandbox_loading_is_refused(folder, monkeypatch):
    monkeypatch.setattr(sandbox, "available", lambda: "no sandbox can be made here")
    with pytest.raises(sandbox.SandboxError, match=r"no sandbox can be made here.*--unsafe"):
        load_task(f"mbpp:{folder}")
