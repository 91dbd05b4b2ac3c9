import hashlib
import json
import re
import runpy
from pathlib import Path

import pytest

from peft_onelayer.tasks import limits, load_task
from peft_onelayer.tasks.rows import PASSED
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
        ("[{'prompt': 'p'}]", "takes 'answer', but is given only completions, prompts, by name"),
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
    refused(lambda: load_dataset_task(source, f"{file}:other"), "takes 'target', but is given only answer, completions")
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
