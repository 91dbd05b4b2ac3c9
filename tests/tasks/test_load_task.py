import re
import sys

import pytest

from peft_onelayer.tasks import TASKS, load_task


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arithmetics", "task 'arithmetics' is not known; did you mean 'arithmetic'?"),
        ("gsm-8k", "did you mean 'gsm8k'?"),
        ("", f"task '' is not known; expected a Python file or one of {', '.join(TASKS)}"),
        ("arithmetic:foo", "task 'arithmetic' takes no argument, got 'foo'"),
        ("sort:foo", "task 'sort' takes no argument, got 'foo'"),
        ("missing.py", "no file missing.py"),
        ("gsm8k:missing.jsonl", "no file or folder missing.jsonl"),
    ],
)
def test_what_is_no_task_is_refused_in_one_line(name, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_task(name)
    assert "\n" not in str(raised.value)


def test_the_name_of_a_file_without_its_end_names_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.py").write_text("")
    with pytest.raises(ValueError, match=re.escape("task 'sums' is not known; did you mean 'sums.py'? ")):
        load_task("sums")


@pytest.mark.parametrize(("name", "library"), [("reasoning_gym:chain_sum", "reasoning_gym")])
def test_a_missing_extra_is_one_line(monkeypatch, name, library):
    task = name.partition(":")[0]
    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"peft_onelayer.tasks.{task}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    message = f"task '{task}' needs {library}: pip install 'peft-onelayer[tasks]'"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task(name)


def test_a_path_to_a_python_file_is_a_task(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def rows(split, n, seed): return [{'prompt': f'{split} {i}'} for i in range(n)]\n"
        "def my_reward(prompts, completions, **kwargs): return [1] * len(completions)\n"
    )
    task = load_task(str(path))
    assert task.name == str(path) and task.rows("test", 2, 0) == [{"prompt": "test 0"}, {"prompt": "test 1"}]
    assert task.reward(prompts=["test"], completions=["x"]) == [1.0]
