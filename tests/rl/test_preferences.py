"""Offline data: TRL's formats from a file, and rows made from graded rollouts."""

import gzip
import json
import re

import demo_model
import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from models import build
from peft_onelayer.rl import preferences
from peft_onelayer.rl.preferences import FORMATS, OfflineData, compare_rollouts, load_preferences, pairs_from_rollouts
from peft_onelayer.rollouts.sampling import Rollout
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task, load_task

CHAT = [{"role": "user", "content": "2+2?"}]
SAYS_4, SAYS_5 = ([{"role": "assistant", "content": text}] for text in "45")
GOOD = {
    "preference": [
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"prompt": CHAT, "chosen": SAYS_4, "rejected": SAYS_5},
        {"chosen": "2+2=4", "rejected": "2+2=5"},
        {"chosen": CHAT + SAYS_4, "rejected": CHAT + SAYS_5},
    ],
    "unpaired": [
        {"prompt": "2+2=", "completion": "4", "label": True},
        {"prompt": CHAT, "completion": SAYS_5, "label": False},
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
    ],
    "demonstration": [
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": CHAT, "completion": SAYS_4},
        {"messages": CHAT + SAYS_4},
        {"text": "2+2=4"},
    ],
    "triple": [{"prompt": "2+2=", "reference": "four", "chosen": "4", "rejected": "5"}],
    "context": [
        {"prompt": "2+2=", "privileged_context": "it is even"},
        {"prompt": CHAT, "privileged_context": "it is even"},
    ],
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind, rows in GOOD.items() for row in rows])
def test_each_format_is_read(tmp_path, kind, row):
    """Every row, also where the file's name holds the word test."""
    loaded = load_preferences(write(tmp_path / "test.jsonl", row, row), kind)
    assert loaded.rows == [row, row] and loaded.counts == {"rows": 2}
    assert list(loaded.data) == ["test.jsonl"] and re.fullmatch("sha256:[0-9a-f]{64}", loaded.data["test.jsonl"])


def test_each_format_has_an_example():
    assert {kind: {tuple(sorted(row)) for row in rows} for kind, rows in GOOD.items()} == {
        kind: {tuple(sorted(columns)) for columns in formats if kind != "unpaired" or "prompt" in columns}
        for kind, formats in FORMATS.items()
    }


def test_a_compressed_file_is_read(tmp_path):
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.write(json.dumps(GOOD["preference"][0]) + "\n")
    assert load_preferences(str(tmp_path / "pairs.jsonl.gz"), "preference").rows == GOOD["preference"][:1]


def test_the_labels_of_a_csv_file_are_true_and_false(tmp_path):
    path = tmp_path / "k.csv"
    path.write_text("prompt,completion,label\na,b,true\nc,d,False\ne,f,TRUE\n")
    assert [row["label"] for row in load_preferences(str(path), "unpaired").rows] == [True, False, True]
    path.write_text("prompt,completion,label\na,b,true\nc,d,1\n")
    with pytest.raises(ValueError, match=r"k\.csv, row 2: label is '1', expected true or false$"):
        load_preferences(str(path), "unpaired")


def test_other_columns_are_left_out(tmp_path):
    """TRL would take "messages" for the data, and drops nothing by itself; "tools" it reads."""
    row = GOOD["preference"][1]
    source = write(tmp_path / "pairs.jsonl", {**row, "messages": CHAT, "score": 1, "tools": "[]"})
    assert load_preferences(source, "preference").rows == [{**row, "tools": "[]"}]


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        (
            "preference",
            [{"prompt": "2+2=", "chosen": "4"}],
            "no column rejected: preference data has the columns prompt, chosen, rejected or the columns chosen, "
            "rejected; found prompt, chosen",
        ),
        (
            "unpaired",
            [{"prompt": "2+2=", "answer": "4"}],
            "no column completion, label: unpaired data has the columns ",
        ),
        ("demonstration", [{"question": "2+2="}], "no column prompt, completion: demonstration data has the columns "),
        ("triple", [GOOD["preference"][0]], "no column reference: triple data has the columns prompt, reference, "),
        ("unpaired", [{**GOOD["unpaired"][0], "label": 1}], "row 1: label is 1, expected true or false"),
        ("demonstration", [{"text": "2"}, {"text": 2}], "row 2: text is 2, expected text or a list of messages with "),
        ("demonstration", [{"messages": []}], "row 1: messages is [], expected text or a list of messages with "),
        ("demonstration", [{"messages": [{"from": "user"}]}], "row 1: messages is [{'from': 'user'}], expected text "),
        (
            "preference",
            [{"prompt": "2+2=", "chosen": SAYS_4, "rejected": SAYS_5}],
            "row 1: prompt is text, chosen is messages, rejected is messages; expected text in all of them, or ",
        ),
        ("demonstration", [{"text": "a"}, {"text": "b", "more": 1}], ":2: has the columns text, more, but "),
        ("demonstration", [], " is empty"),
    ],
)
def test_a_wrong_file_is_named_with_what_was_expected(tmp_path, kind, rows, message):
    source = write(tmp_path / "data.jsonl", *rows)
    with pytest.raises(ValueError, match=re.escape(source) + ".*" + re.escape(message)) as error:
        load_preferences(source, kind)
    assert "\n" not in str(error.value)


def test_of_a_hub_data_set_the_train_split_is_read(monkeypatch):
    """How it is loaded is `tasks.files`'; here by a name, a configuration and a revision."""
    splits = {"train": [{**GOOD["preference"][0], "score": 1}], "test": GOOD["preference"][2:3]}
    asked = []
    monkeypatch.setattr(preferences, "read_hub", lambda *named: asked.append(named) or (splits, {"org/name": "c0"}))
    loaded = load_preferences("org/name:main@v2", "preference")
    assert asked == [("org/name:main@v2", "org/name", "main", "v2", ())]
    assert loaded == OfflineData(GOOD["preference"][:1], {"org/name": "c0"}, {"rows": 1})
    del splits["train"]
    with pytest.raises(ValueError, match=r"^data set org/name has no 'train' rows"):
        load_preferences("org/name", "preference")


@pytest.mark.parametrize("source", ["no-such-file.jsonl", "folder/no-such-file.jsonl", "three/parts/name", "."])
def test_what_is_not_there_is_refused(source):
    with pytest.raises(
        ValueError, match="^no file " + re.escape(source) + "; expected a .jsonl, .csv or .parquet file, or a Hub"
    ):
        load_preferences(source, "preference")


def rollout(completion: str, reward: float, prompt: str = "p", ended: bool = True) -> Rollout:
    return Rollout(prompt, completion, reward, 1, ended, [], [], [])


GROUPS = [
    [rollout("a", 0.0), rollout("b", 1.0), rollout("c", 1.0), rollout("d", 0.0)],
    [rollout("cut", 1.0, "q", ended=False), rollout("e", 0.5, "q"), rollout("f", 0.25, "q")],
    [rollout("g", 0.0, "r"), rollout("h", 0.0, "r")],
    [rollout("cut", 0.0, "s", ended=False)],
]  # the mean over a to h is 2.75 / 8
COUNTS = {"prompts": 4, "completions": 10, "cut": 2}


def test_a_pair_is_the_first_best_and_the_first_worst():
    assert compare_rollouts(GROUPS, "preference") == (
        [{"prompt": "p", "chosen": "b", "rejected": "a"}, {"prompt": "q", "chosen": "e", "rejected": "f"}],
        {"rows": 2, **COUNTS, "dropped": 2},
    )


def test_labels_compare_with_the_mean_of_all_and_go_in_rounds():
    rows, counts = compare_rollouts(GROUPS, "unpaired")
    assert [(row["prompt"], row["completion"], row["label"]) for row in rows] == [
        *(("p", "a", False), ("q", "e", True), ("r", "g", False)),
        *(("p", "b", True), ("q", "f", False), ("r", "h", False)),
        *(("p", "c", True), ("p", "d", False)),
    ]
    assert counts == {"rows": 8, **COUNTS, "dropped": 1}


def test_a_demonstration_is_the_first_best_above_the_mean():
    rows, counts = compare_rollouts(GROUPS, "demonstration")
    assert rows == [{"prompt": "p", "completion": "b"}, {"prompt": "q", "completion": "e"}]
    assert counts == {"rows": 2, **COUNTS, "dropped": 2}
    assert compare_rollouts(GROUPS, "context")[0] == [
        {"prompt": row["prompt"], "privileged_context": row["completion"]} for row in rows
    ]


@pytest.mark.parametrize("kind", ["preference", "unpaired", "demonstration", "context"])
@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[rollout("a", 1.0, ended=False)] * 3], "all 3 completions were cut before they ended, and none is left; "),
        ([[rollout("a", 0.1)] * 3] * 2, "6 completions of 2 prompts give nothing to compare: .*mean 0.1.; take more "),
    ],
)
def test_nothing_to_compare_is_an_error(kind, groups, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        compare_rollouts(groups, kind)


def test_prompts_that_differ_only_from_each_other_give_no_pair():
    groups = [[rollout("a", 1.0)] * 2, [rollout("b", 0.0, "q")] * 2]
    with pytest.raises(ValueError, match=r"^4 completions of 2 prompts give nothing to compare"):
        compare_rollouts(groups, "preference")
    assert compare_rollouts(groups, "demonstration")[0] == [{"prompt": "p", "completion": "a"}]


@pytest.fixture(scope="module")
def base():
    return demo_model.load()


@pytest.fixture(scope="module")
def problems():
    return load_task("arithmetic").rows("train", 48, 0)


def grade(prompt: str, completion: str) -> bool:
    """By arithmetic, not by the task: A347+085= is 0432."""
    a, b = map(int, re.fullmatch(r"A(\d+)\+(\d+)=", prompt).groups())
    return completion == f"{a + b:04d}"


def test_pairs_of_the_demo_model_are_right_and_wrong(base, problems):
    task = load_task("arithmetic")
    made = pairs_from_rollouts(*base, task, problems, "preference", Sampling(samples=4))
    assert 5 < len(made.rows) == made.counts["rows"] == 48 - made.counts["dropped"]
    assert made.counts["completions"] == 4 * made.counts["prompts"] == 4 * 48
    assert all(grade(row["prompt"], row["chosen"]) for row in made.rows)
    assert not any(grade(row["prompt"], row["rejected"]) for row in made.rows)
    assert made == pairs_from_rollouts(*base, task, problems, "preference", Sampling(samples=4))
    assert made != pairs_from_rollouts(*base, task, problems, "preference", Sampling(samples=4, seed=1))
    unpaired = pairs_from_rollouts(*base, task, problems, "unpaired", Sampling(samples=4)).rows
    assert len(unpaired) == 4 * 48 - made.counts["cut"]
    assert [row["label"] for row in unpaired] == [grade(row["prompt"], row["completion"]) for row in unpaired]
    shown = pairs_from_rollouts(*base, task, problems, "demonstration", Sampling(samples=4)).rows
    assert len(shown) >= len(made.rows) and all(grade(**row) for row in shown)


def test_trl_reads_the_tokens_that_were_sampled(base, problems, tmp_path):
    """With one end-of-sequence token behind each, the one that the model wrote."""
    model, tokenizer = base
    made = pairs_from_rollouts(model, tokenizer, load_task("arithmetic"), problems, "preference", Sampling(samples=4))
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(made.rows),
        processing_class=tokenizer,
    )
    for row, read in zip(made.rows, trainer.train_dataset, strict=True):
        assert read["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert read["chosen_ids"] == [*tokenizer(row["chosen"])["input_ids"], tokenizer.eos_token_id]
        assert tokenizer.eos_token_id not in read["chosen_ids"][:-1]


def test_a_completion_that_did_not_end_is_left_out(base, problems):
    """At 3 tokens no sum of four digits and a full stop has ended."""
    with pytest.raises(ValueError, match=r"^all .* completions were cut"):
        pairs_from_rollouts(
            *base, load_task("arithmetic"), problems[:4], "preference", Sampling(samples=4, max_completion_tokens=3)
        )


def test_chat_prompts_give_messages(tokenizer):
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("one", "two", "three", "four")]

    def odd(message) -> float:
        return float(len(message["content"].split()) % 2)  # the tokens are decoded with spaces between them

    def length_reward(prompts, completions, **_):
        return [odd(completion[0]) for completion in completions]

    task = Task("chat", lambda *_: rows, length_reward, 64)
    made = pairs_from_rollouts(build(), tokenizer, task, rows, "preference", Sampling(samples=8))
    for row in made.rows:
        assert row["prompt"] in [given["prompt"] for given in rows]
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]
        assert odd(row["chosen"][0]) > odd(row["rejected"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "triple"}, "triple data cannot be made from rollouts; give a data set with the columns prompt, ref"),
        ({"samples": 1}, "rows are made by comparing completions, which takes at least 2 samples, got 1"),
        ({"environment_factory": dict}, "task arithmetic plays through an environment, and offline data has no turns"),
    ],
)
def test_what_gives_no_rows_is_refused(base, problems, change, message):
    task = load_task("arithmetic")
    task = Task(task.name, task.rows, task.reward, 5, change.get("environment_factory"))
    with pytest.raises(ValueError, match=f"^{message}"):
        pairs_from_rollouts(
            *base, task, problems, change.get("kind", "preference"), Sampling(samples=change.get("samples", 4))
        )
