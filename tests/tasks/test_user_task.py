import hashlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from peft_onelayer.runs.early import check_source, check_task_name
from peft_onelayer.tasks import limits, load_task
from peft_onelayer.tasks.mixture import mixture
from peft_onelayer.tasks.rows import PASSED, reward_columns
from peft_onelayer.tasks.user import load_dataset_task

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_task"
ROWS = "def rows(split, n, seed): return [{'prompt': 'p', 'answer': 'a'}] * n\n"
REWARD = "def my_reward(prompts, completions, answer, **kwargs): return [len(c) for c in completions]\n"


def write(path, text):
    path.write_text(text)
    return str(path)


def data(tmp_path, rows, name="train.jsonl"):
    return write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows))


def refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_the_example_of_a_file_runs():
    task = load_task(str(EXAMPLE / "reverse.py"))
    train, test = task.rows("train", 99, 0), task.rows("test", 99, 0)
    assert len(train) == 8 and len(test) == 4
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    answers = [row["answer"] for row in test]
    prompts = [row["prompt"] for row in test]
    assert task.reward(prompts=prompts, completions=answers, answer=answers) == [1.0] * 4
    chats = [[{"role": "assistant", "content": "x"}]] * 4
    assert task.reward(prompts=prompts, completions=chats, answer=answers, trainer_state=None) == [0.0] * 4
    assert task.max_completion_tokens == 16 and task.reward.__name__ == "reverse_reward"
    content = (EXAMPLE / "reverse.py").read_bytes()
    assert task.data == {"reverse.py": f"sha256:{hashlib.sha256(content).hexdigest()}"}


def test_the_example_of_a_data_set_runs():
    task = load_dataset_task(str(EXAMPLE / "capitals.jsonl"), f"{EXAMPLE / 'contains.py'}:contains_answer")
    rows = task.rows("train", 99, 0) + task.rows("test", 99, 0)
    assert len({row["prompt"] for row in rows}) == 16 and task.max_completion_tokens == 512
    answers = [row["answer"] for row in rows]
    prompts = [row["prompt"] for row in rows]
    assert task.reward(prompts=prompts, completions=[f" {a}." for a in answers], answer=answers) == [1.0] * 16
    assert task.reward(prompts=prompts, completions=["?"] * 16, answer=answers) == [0.0] * 16
    assert set(task.data) == {"capitals.jsonl", "contains.py"}


PASSING = {"completion_ids": [[1], [2, 3]], "trainer_state": "state", "log_extra": print, "log_metric": print}
LENGTHS = "return [len(ids) for ids in completion_ids]\n"
REWARDS = {
    "completion_ids": f"def my_reward(completion_ids, **kwargs): {LENGTHS}",
    "all that TRL passes": f"""
def my_reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    assert trainer_state == 'state'
    {LENGTHS}""",
    "async": f"""
import asyncio
async def my_reward(completion_ids, **kwargs):
    await asyncio.sleep(0)
    {LENGTHS}""",
    "partial": """
import functools
def score(completion_ids, by, **kwargs): return [len(ids) * by for ids in completion_ids]
my_reward = functools.partial(score, by=1)
""",
    "async partial": f"""
import functools
async def score(ids, completion_ids, **kwargs): {LENGTHS}
my_reward = functools.partial(score, ids=3)
""",
    "an object": f"""
class Rewarded:
    def __call__(self, completion_ids, **kwargs): {LENGTHS}
my_reward = Rewarded()
""",
    "an async object": f"""
class A:
    async def __call__(self, completion_ids, **kwargs): {LENGTHS}
my_reward = A()
""",
    "a function beside a model": f"""
from collections.abc import Callable
class Model:
    def __call__(self, x): return x
reward_model, RewardLike = Model(), Callable[..., float]
def my_reward(completion_ids, **kwargs): {LENGTHS}""",
}


@pytest.mark.parametrize("limit", ["", "REWARD_SECONDS = 20\n"])
@pytest.mark.parametrize("form", REWARDS)
def test_a_reward_may_be_whatever_trl_takes(tmp_path, form, limit):
    if limit and form == "all that TRL passes":
        pytest.skip("not with a limit")
    path = write(
        tmp_path / "task.py", f"def rows(split, n, seed): return [{{'prompt': 'p'}}] * n\n{limit}{REWARDS[form]}"
    )
    check_task_name(path)
    source = data(tmp_path, [{"prompt": "p"}])
    check_source(None, source, f"{path}:my_reward")
    for task in (load_task(path), load_dataset_task(source, f"{path}:my_reward")):
        assert task.rows("train", 1, 0) == [{"prompt": "p"}]
        assert task.reward(prompts=["p"] * 2, completions=["a", "b"], **PASSING) == [1.0, 2.0]
        assert task.reward.__name__ == "my_reward"


def test_what_a_trainer_does_not_pass_is_named_and_what_only_logs_is_made_up(tmp_path):
    """A2POTrainer passes the columns alone, OnlineDPOTrainer and SDPOTrainer no logs."""
    task = load_task(write(tmp_path / "task.py", ROWS + REWARDS["all that TRL passes"]))
    passed = {name: PASSING[name] for name in ("completion_ids", "trainer_state")}
    assert task.reward(prompts=["p"] * 2, completions=["a", "b"], answer=["a"] * 2, **passed) == [1.0, 2.0]
    refused(
        lambda: task.reward(prompts=["p"], completions=["a"], answer=["a"]),
        "task.py:my_reward takes 'completion_ids', which this trainer does not pass; give it a default",
    )


def test_a_mixture_passes_it_on(tmp_path):
    text = REWARDS["all that TRL passes"].replace("    return", "    log_metric('seen', len(prompts))\n    return")
    tasks = [load_task(write(tmp_path / name, ROWS + text)) for name in ("a.py", "b.py")]
    mixed, seen = mixture(tasks), []
    columns = reward_columns(mixed.rows("train", 4, 0))
    passed = {**PASSING, "completion_ids": [[1] * i for i in range(4)], "log_metric": lambda *args: seen.append(args)}
    assert mixed.reward(prompts=["p"] * 4, completions=["a"] * 4, **columns, **passed) == [0.0, 1.0, 2.0, 3.0]
    assert seen == [("seen", 2), ("seen", 2)]


@pytest.mark.parametrize("name", ["trainer_state", "log_extra", "log_metric"])
def test_with_a_limit_a_reward_cannot_take_what_stays_in_the_trainers_process(tmp_path, name):
    text = f"def my_reward(completions, {name}, **kwargs): return [0.0] * len(completions)\nREWARD_SECONDS = 1\n"
    task = load_task(write(tmp_path / "task.py", ROWS + text))
    line = (
        f"takes {name!r}, which no reward with REWARD_SECONDS is given; give it a default, or leave REWARD_SECONDS out"
    )
    refused(lambda: task.rows("train", 1, 0), line)


def test_an_async_reward_that_raises_is_named_with_its_line(tmp_path):
    text = "async def my_reward(completions, **kwargs):\n    return [{}[c] for c in completions]\n"
    task = load_task(write(tmp_path / "task.py", ROWS + text))
    refused(lambda: task.reward(prompts=["p"], completions=["a"]), "task.py:3: my_reward raised KeyError: 'a'; mend it")


def test_no_more_rows_are_taken_than_were_asked_for(tmp_path):
    text = "def rows(split, n, seed): return [{'prompt': f'{split} {i}', 'answer': 'a'} for i in range(40)]\n"
    task = load_task(write(tmp_path / "task.py", text + REWARD))
    assert [row["prompt"] for row in task.rows("test", 4, 0)] == ["test 0", "test 1", "test 2", "test 3"]
    assert len(task.rows("train", 99, 0)) == 40


def test_a_test_row_counts_once_and_the_repeats_are_told_once(tmp_path):
    text = "def rows(split, n, seed): return [{'prompt': f'{split} {i % 3}', 'answer': i // 6} for i in range(n)]\n"
    task = load_task(write(tmp_path / "task.py", text + REWARD))
    with pytest.warns(UserWarning) as told:
        assert [(row["prompt"], row["answer"]) for row in task.rows("test", 8, 0)] == [
            ("test 0", 0), ("test 1", 0), ("test 2", 0), ("test 0", 1), ("test 1", 1),
        ]  # fmt: skip
        task.rows("test", 8, 0)
    (line,) = [str(one.message) for one in told]
    assert line == (
        f"rows('test', 8, 0) of {tmp_path / 'task.py'}: 3 of 8 rows repeat others and are left out; return distinct "
        "ones, fewer where there are no more"
    )
    assert len(task.rows("train", 8, 0)) == 8
    assert task.rows("test", 5, 0) == task.rows("test", 8, 0)[:3]
    plays = load_task(write(tmp_path / "plays.py", ROWS + REWARD + "environment_factory = dict\n"))
    assert len(plays.rows("test", 3, 0)) == 3  # every episode is another


def test_test_problems_that_are_train_problems_are_told(tmp_path, recwarn):
    text = "def rows(split, n, seed): return [{'prompt': str(i), 'answer': split} for i in range(n)]\n"
    path = write(tmp_path / "task.py", text + REWARD)
    task = load_task(path)
    task.rows("test", 4, 0)
    assert not recwarn
    task.rows("train", 3, 0)
    task.rows("train", 4, 0)
    (line,) = [str(one.message) for one in recwarn]
    assert line == (
        f"{path}: 3 of the 4 test prompts are train prompts too, so that their score says little of new ones; keep "
        "them apart"
    )


CASES = """
from dataclasses import dataclass
REWARD_SECONDS = 20
@dataclass
class Case:
    want: int
def rows(split, n, seed): return [{'prompt': f'{split} {i}', 'case': Case(i)} for i in range(n)]
def my_reward(completions, case, **kwargs):
    return [float(c == str(one.want + PLUS)) for c, one in zip(completions, case)]
"""


def test_rows_of_a_limited_reward_may_hold_objects_of_the_files_classes(tmp_path):
    tasks = []
    for plus in (0, 1, 0):
        (tmp_path / str(plus)).mkdir(exist_ok=True)
        tasks.append(load_task(write(tmp_path / str(plus) / "task.v1.py", f"{CASES}PLUS = {plus}\n")))
    cases = [[row["case"] for row in task.rows("train", 2, 0)] for task in tasks]
    for task, plus, case in zip(tasks, (0, 1, 0), cases, strict=True):
        completions = [str(plus), str(plus)]
        assert task.reward(prompts=["p"] * 2, completions=completions, case=case) == [1.0, 0.0]


@pytest.mark.parametrize("value", ["lambda text: 1.0", "(x for x in ())", "type('Local', (), {})()"])
def test_rows_of_a_limited_reward_that_cannot_be_sent_are_refused(tmp_path, value):
    text = f"REWARD_SECONDS = 1\ndef rows(split, n, seed): return [{{'prompt': 'p', 'check': {value}}}]\n"
    text += "def my_reward(completions, check, **kwargs): return [0.0] * len(completions)\n"
    task = load_task(write(tmp_path / "task.py", text))
    with pytest.raises(ValueError, match=r"row 0: the \w+ in column 'check' cannot be ") as raised:
        task.rows("train", 1, 0)
    line = str(raised.value)
    assert "\n" not in line
    if "lambda" in value:
        assert "sent to the process that scores within REWARD_SECONDS, which takes plain data: " in line


def test_what_lies_beside_the_file_is_imported_as_by_a_script(tmp_path):
    """Also where two tasks have helpers of one name, in a function, and in the process of a limited reward."""
    tasks = []
    for score, limit in ((1, ""), (2, ""), (3, "REWARD_SECONDS = 20\n"), (4, "REWARD_SECONDS = 20\n")):
        folder = tmp_path / str(score)
        folder.mkdir()
        (folder / "helper_of_a_test.py").write_text(f"SCORE = {score}\n")
        (folder / f"later_{score}_of_a_test.py").write_text("NOTHING = 0\n")
        (folder / "colorsys.py").write_text("raise ValueError\n")  # hides no library from others
        text = f"{limit}from helper_of_a_test import SCORE\ndef my_reward(completions, **kwargs):\n"
        text += f"    from later_{score}_of_a_test import NOTHING\n    return [SCORE + NOTHING] * len(completions)\n"
        tasks.append(load_task(write(folder / "task.py", ROWS + text)))
    for _ in range(2):
        assert [task.reward(prompts=["p"], completions=["a"]) for task in tasks] == [[1.0], [2.0], [3.0], [4.0]]
    code = (
        "import sys; from peft_onelayer.tasks import load_task; load_task(sys.argv[1]); from colorsys import rgb_to_hsv"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "1" / "task.py"], check=True)


def test_the_page_and_its_files_are_short():
    for file in EXAMPLE.iterdir():
        if file.is_file():
            assert len(file.read_text().splitlines()) < 30
    assert runpy.run_path(str(EXAMPLE / "reverse.py"))["rows"]("test", 1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def rows(:\n", "{file}:1: invalid syntax"),
        ("x = 1\ny = x / 0\n", "{file}:2 cannot be imported: ZeroDivisionError: division by zero"),
        ("import no_such_package\n", "{file}:1 cannot be imported: ModuleNotFoundError: No module named"),
        (REWARD, "{file} has no function rows(split, n, seed)"),
        (ROWS, "exactly one function whose name holds 'reward'; found none"),
        (ROWS + REWARD + REWARD.replace("my", "her"), "found several: her_reward, my_reward"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, text, message):
    path = tmp_path / "task.py"
    path.write_text(text)
    refused(lambda: load_task(str(path)), message.format(file=path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[]", "expected a list of at least one dict, got []"),
        ("['p']", "expected a list of at least one dict"),
        ("[{'question': 'q'}]", "row 0 has no 'prompt' that is text or a list of chat messages: None"),
        ("[{'prompt': ['hello']}]", "row 0 has no 'prompt'"),
        ("[{'prompt': [1, 2]}]", "row 0 has no 'prompt' that is text or a list of chat messages: [1, 2]"),
        (
            "[{'prompt': 'p'}, {'prompt': [{'role': 'user', 'content': 'p'}]}]",
            "the prompt of row 0 is text and that of row 1 chat messages; give all of them one form",
        ),
        (
            "[{'prompt': [{'role': 'user', 'content': 'p'}]}] * 2 + [{'prompt': 'p'}]",
            "the prompt of row 0 is chat messages and that of row 2 text; give all of them one form",
        ),
        ("[{'prompt': 'p', 'answer': 1}, {'prompt': 'p'}]", "row 1 has the columns prompt, row 0 has prompt, answer"),
        ("[{'prompt': 'p', 'answer': open('/dev/null')}]", "row 0: the TextIOWrapper in column 'answer' cannot"),
        ("[{'prompt': 'p', 1: 1}]", "the name of a column must be text, got 1"),
        *[
            (f"[{{'prompt': 'p', {name!r}: 1}}]", f"a column may not be called {name!r}, which the trainer passes")
            for name in PASSED
        ],
        ("[{'prompt': 'p'}]", "takes 'answer', but is given only completion_ids, completions, log_extra, log_metric,"),
    ],
)
def test_rows_that_are_no_rows_are_refused(tmp_path, rows, message):
    path = write(tmp_path / "task.py", f"def rows(split, n, seed): return {rows}\n{REWARD}")
    refused(lambda: load_task(path).rows("train", 2, 0), message)


def test_rows_may_be_chats_and_reach_the_file_with_their_arguments(tmp_path):
    prompt = "[{'role': 'user', 'content': f'{split} {n} {seed}'}]"
    path = write(
        tmp_path / "t.py", f"def rows(split, n, seed): return [{{'prompt': {prompt}, 'answer': 'a'}}]\n{REWARD}"
    )
    task = load_task(path)
    assert task.rows("test", 3, 7)[0]["prompt"] == [{"role": "user", "content": "test 3 7"}]
    refused(lambda: task.rows("dev", 1, 0), "split must be 'train' or 'test', got 'dev'")
    refused(lambda: task.rows("train", 0, 0), "n must be at least 1, got 0")


@pytest.mark.parametrize(
    "result",
    [
        "numpy.array([0.5, 2])",
        "numpy.array([0.5, 2], 'float16')",
        "torch.tensor([0.5, 2.0])",
        "torch.tensor([0.5, 2.0], dtype=torch.bfloat16, requires_grad=True)",
        "[numpy.float32(0.5), numpy.int64(2)]",
        "[torch.tensor(0.5), 2]",
        "(numpy.array(0.5), 2.0)",
    ],
)
@pytest.mark.parametrize("limit", ["", "REWARD_SECONDS = 20\n"])
def test_a_reward_may_return_what_trl_takes(tmp_path, result, limit):
    rows = "def rows(split, n, seed): return [{'prompt': 'p'}]\n"
    result = result if not limit else f"{result}[:1]"
    path = write(
        tmp_path / "t.py",
        f"import numpy\nimport torch\n{limit}{rows}def my_reward(completions, **kwargs):\n    return {result}\n",
    )
    scores = load_task(path).reward(prompts=["p"] * 2, completions=["a", "b"])
    assert scores == ([0.5, 0.5] if limit else [0.5, 2.0]) and [type(score) for score in scores] == [float, float]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("__import__('numpy').zeros((2, 1))", "must return one finite number per completion, got [0.0]"),
        ("__import__('numpy').zeros(3)", "must return a list of 2 numbers, one per completion; got 3"),
        ("__import__('torch').tensor(1.0)", "must return a list of 2 numbers, one per completion; got a float"),
        ("__import__('numpy').array([1, float('nan')])", "must return one finite number per completion, got nan"),
        ("1.0", "must return a list of 2 numbers, one per completion; got a float"),
        (repr("go"), "must return a list of 2 numbers, one per completion; got a str"),
        ("[1.0]", "must return a list of 2 numbers, one per completion; got 1"),
        ("[1.0, 'good']", "must return one finite number per completion, got 'good'"),
        ("[1.0, None]", "must return one finite number per completion, got None"),
        ("[1.0, float('nan')]", "must return one finite number per completion, got nan"),
    ],
)
def test_a_reward_with_a_bad_result_is_named_at_its_first_result(tmp_path, result, message):
    path = write(tmp_path / "task.py", f"{ROWS}def my_reward(prompts, completions, **kwargs): return {result}\n")
    refused(lambda: load_task(path).reward(prompts=["p"] * 2, completions=["x"] * 2, answer=["a"] * 2), message)


def test_the_reward_of_a_data_set_is_checked_when_it_is_loaded(tmp_path):
    source = data(tmp_path, [{"prompt": "p", "answer": "a"}])
    file = write(
        tmp_path / "rewards.py",
        REWARD + "def strict(prompts, completions, answer): ...\ndef other(completions, target, **kwargs): ...\n",
    )
    task = load_dataset_task(source, f"{file}:my_reward")
    assert task.rows("train", 5, 0) == [{"prompt": "p", "answer": "a"}]
    assert task.reward(prompts=["p"], completions=["xyz"], answer=["a"]) == [3.0]
    refused(lambda: load_dataset_task(source, f"{file}:my_rewards"), "no function 'my_rewards'; it has my_reward")
    refused(lambda: load_dataset_task(source, f"{file}:strict"), "rewards.py:strict must take **kwargs")
    refused(
        lambda: load_dataset_task(source, f"{file}:other"), "takes 'target', but is given only answer, completion_ids"
    )
    refused(lambda: load_dataset_task(source, file), "reward must be 'path/to/file.py:function'")
    refused(lambda: load_dataset_task(source, "missing.py:reward"), "no file missing.py")
    no_prompt = data(tmp_path, [{"text": "p"}], "test.jsonl")
    refused(lambda: load_dataset_task(no_prompt, f"{file}:my_reward"), "test.jsonl:1: no column 'prompt'; found text")


HANGS = """
REWARD_SECONDS = 0.3
def my_reward(prompts, completions, answer, **kwargs):
    (text,) = completions
    assert set(kwargs) <= {"completion_ids"} and not isinstance(text, list)
    if text == "hang":
        while True: pass
    if text == "fail":
        raise KeyError("no such key")
    return [eval(text) + (answer[0] == "a") / 2 + len(prompts[0]) / 8]
"""
SENT = {"trainer_state": object(), "log_extra": print}  # what TRL passes and no other process gets


def limited(tmp_path, text=ROWS + HANGS):
    return load_task(write(tmp_path / "task.py", text))


def test_a_reward_with_a_limit_scores_0_past_it_and_counts(tmp_path):
    task, log = limited(tmp_path), []
    completions = ["1", "hang", "10**10**10", "[0] * 10**10", "2", "1e999999999 and 3"]
    columns = {"answer": ["a", "a", "a", "a", "b", "a"], "completion_ids": [[1]] * 6}
    rewards = task.reward(
        prompts=["p"] * 6, completions=completions, **columns, **SENT, log_metric=lambda *args: log.append(args)
    )
    assert rewards == [1.625, 0.0, 0.0, 0.0, 2.125, 3.625]
    assert log == [(limits.OVER_LIMIT, 3.0)] and task.reward.__name__ == "my_reward"


def test_the_reward_of_a_data_set_may_have_a_limit(tmp_path):
    file = write(tmp_path / "rewards.py", HANGS)
    task = load_dataset_task(data(tmp_path, [{"prompt": "p", "answer": "a"}]), f"{file}:my_reward")
    assert task.reward(prompts=["p"] * 2, completions=["1", "hang"], answer=["a"] * 2) == [1.625, 0.0]


def test_a_reward_with_a_limit_that_fails_is_named(tmp_path):
    task = limited(tmp_path)
    call = {"prompts": ["p"], "answer": ["a"]}
    refused(lambda: task.reward(completions=["fail"], **call), "task.py:10: my_reward raised KeyError: 'no such key'; ")
    refused(lambda: task.reward(completions=["float('nan')"], **call), "must return one finite number per completion")
    changed = limited(tmp_path, ROWS + HANGS + "# another\n")
    assert changed.reward(completions=["1"], **call) == [1.625]
    write(tmp_path / "task.py", ROWS + HANGS + "# and another\n")
    assert changed.reward(completions=["1"], **call) == [1.625]  # the file that was loaded


@pytest.mark.parametrize("function", ["my_reward", "rows"])
@pytest.mark.parametrize("folder", ["", "."])
def test_a_function_that_raises_is_one_line_with_the_line_of_the_file(tmp_path, monkeypatch, folder, function):
    monkeypatch.chdir(tmp_path)
    text = "def rows(split, n, seed):\n    return [{'prompt': 'p'}][: 1 // BY]\nBY = 1\n"
    text += "def my_reward(completions, **kwargs):\n    return help_me(completions)\n"
    text += "def help_me(completions):\n    return [{}[c] for c in completions]\n"
    name = write(tmp_path / "task.py", text.replace("BY = 1", "BY = 0") if function == "rows" else text)
    task = load_task("task.py" if folder else name)
    failing = write(tmp_path / "failing.py", "import math\n1 / 0\n")
    refused(
        lambda: load_task("failing.py" if folder else failing), "failing.py:2 cannot be imported: ZeroDivisionError"
    )
    if function == "rows":
        refused(lambda: task.rows("train", 1, 0), "task.py:2: rows raised ZeroDivisionError: ")
    else:
        refused(
            lambda: task.reward(prompts=["p"], completions=["a\nb"]), "task.py:7: my_reward raised KeyError: 'a\\nb'; "
        )


MESSAGES = 'the model has a chat template, so that completions are lists of messages ([{"role": "assistant", "content"'
PLAIN = "--plain gives strings"


@pytest.mark.parametrize("limit", ["", "REWARD_SECONDS = 5\n"])
def test_a_reward_of_strings_that_gets_messages_is_told_so(tmp_path, limit):
    text = f"{ROWS}{limit}def my_reward(completions, **kwargs): return [float(c.strip()) for c in completions]\n"
    path = write(tmp_path / "task.py", text)
    chats = {"prompts": [[{"role": "user", "content": "p"}]], "completions": [[{"role": "assistant", "content": "1"}]]}
    with pytest.raises(ValueError, match="raised AttributeError: 'list' object has no attribute 'strip'; ") as raised:
        load_task(path).reward(answer=["a"], **chats)
    assert MESSAGES in str(raised.value) and PLAIN in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(
        ValueError, match="raised ValueError: could not convert string to float: 'x'; mend it"
    ) as raised:
        load_task(path).reward(prompts=["p"], completions=["x"], answer=["a"])
    assert MESSAGES not in str(raised.value) and PLAIN not in str(raised.value)
    if not limit:  # what plays is given messages whatever the options
        plays = load_task(write(tmp_path / "plays.py", f"{text}environment_factory = dict\n"))
        with pytest.raises(ValueError, match="raised AttributeError") as raised:
            plays.reward(answer=["a"], **chats)
        assert MESSAGES in str(raised.value) and PLAIN not in str(raised.value)


def test_what_finds_or_writes_an_answer_and_raises_is_one_line_with_the_line_of_the_file(tmp_path):
    text = "def extract_answer(text):\n    return text[9]\ndef solution(row):\n    return row['answers']\n"
    task = load_task(write(tmp_path / "task.py", ROWS + REWARD + text))
    refused(
        lambda: task.answer("7"), "task.py:4: extract_answer raised IndexError: string index out of range; mend it, "
    )
    (row,) = task.rows("train", 1, 0)
    refused(lambda: task.shown.solution(row), "task.py:6: solution raised KeyError: 'answers'; mend it (")


@pytest.mark.parametrize("value", ["'16'", "0", "-1", "16.0", "True", "None"])
def test_a_number_of_tokens_that_is_none_is_refused(tmp_path, value):
    path = write(tmp_path / "task.py", f"MAX_COMPLETION_TOKENS = {value}\n{ROWS}{REWARD}")
    refused(lambda: load_task(path), f"{path}: MAX_COMPLETION_TOKENS must be a whole number of at least 1, got {value}")


def test_an_environment_factory_that_cannot_be_called_is_refused(tmp_path):
    path = write(tmp_path / "task.py", f"environment_factory = 'Game'\n{ROWS}{REWARD}")
    refused(lambda: load_task(path), f"environment_factory of {path} must be a function, got 'Game'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HANGS.replace("0.3", "0"), "REWARD_SECONDS must be a number above 0, got 0"),
        (HANGS.replace("0.3", "'1'"), "REWARD_SECONDS must be a number above 0, got '1'"),
        (HANGS.replace("0.3", "float('nan')"), "REWARD_SECONDS must be a number above 0, got nan"),
        (HANGS + "environment_factory = dict\n", "REWARD_SECONDS cannot be kept with an environment_factory"),
    ],
)
def test_a_limit_that_is_none_is_refused(tmp_path, text, message):
    refused(lambda: limited(tmp_path, ROWS + text), message)


@pytest.mark.parametrize("trainer", ["GRPO", pytest.param("RLOO", marks=pytest.mark.more)])
def test_trls_trainer_trains_on_an_async_reward(tmp_path, trainer):
    import demo_model
    import trl
    from datasets import Dataset

    text = "import asyncio\nasync def my_reward(completion_ids, log_metric, **kwargs):\n    await asyncio.sleep(0)\n"
    text += "    log_metric('seen', len(completion_ids))\n    return [len(ids) / 4 for ids in completion_ids]\n"
    task = load_task(write(tmp_path / "task.py", ROWS.replace("'p'", "'A347+085='") + text))
    model, tokenizer = demo_model.load()
    config = getattr(trl, f"{trainer}Config")(
        str(tmp_path), per_device_train_batch_size=2, num_generations=2, max_completion_length=4, max_steps=1,
        logging_steps=1, report_to=[], bf16=False, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    rows = Dataset.from_list(task.rows("train", 2, 0))
    training = getattr(trl, f"{trainer}Trainer")(
        model, task.reward, config, train_dataset=rows, processing_class=tokenizer
    )
    training.train()
    (logged,) = [entry for entry in training.state.log_history if "seen" in entry]
    assert logged["seen"] == 2 and 0 < logged["rewards/my_reward/mean"] <= 1


@pytest.mark.more
def test_the_trainers_log_has_the_count(tmp_path):
    import demo_model
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    text = ROWS.replace("'p'", "'A347+085='") + HANGS.replace('text == "hang"', "len(prompts[0]) == 9")
    task = load_task(write(tmp_path / "task.py", text))
    model, tokenizer = demo_model.load()
    config = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=5, max_steps=2,
        logging_steps=1, report_to=[], bf16=False, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model,
        task.reward,
        config,
        train_dataset=Dataset.from_list(task.rows("train", 4, 0)),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = [entry[limits.OVER_LIMIT] for entry in trainer.state.log_history if limits.OVER_LIMIT in entry]
    assert logged == [4.0, 4.0]
