import re
from collections import Counter

import pytest

from peft_onelayer.tasks import arithmetic
from peft_onelayer.tasks.arithmetic import arithmetic_reward, rows


@pytest.fixture(scope="module")
def held_out():
    """The whole test split."""
    return rows("test", 125_000, seed=0)


def terms(row):
    a, b = re.fullmatch(r"A(\d{3})\+(\d{3})=", row["prompt"]).groups()
    return int(a), int(b)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_is_a_sum_and_its_answer(split):
    for row in rows(split, 500, seed=3):
        a, b = terms(row)
        assert row == {"prompt": f"A{a:03d}+{b:03d}=", "answer": f"{a + b:04d}."}
        assert len(row["answer"]) == arithmetic.MAX_COMPLETION_TOKENS


def test_rows_depend_on_split_number_and_seed_only():
    for split in ("train", "test"):
        assert rows(split, 50, seed=1) == rows(split, 50, seed=1)
        assert rows(split, 50, seed=1) != rows(split, 50, seed=2)


def test_the_first_rows_stay_what_they_are():
    """The demo model's card and every saved ranking refer to these problems."""
    assert [row["prompt"] for row in rows("test", 3, seed=0)] == ["A098+200=", "A129+127=", "A616+696="]
    assert [row["prompt"] for row in rows("train", 3, seed=0)] == ["A999+619=", "A923+111=", "A129+929="]


def test_train_and_test_never_overlap(held_out):
    test = {row["prompt"] for row in held_out}
    assert len(test) == 125_000  # distinct
    train = {row["prompt"] for row in rows("train", 300_000, seed=0)}
    assert len(train) > 240_000 and not train & test


def test_every_seed_draws_from_the_same_held_out_problems(held_out):
    assert {row["prompt"] for row in rows("test", 20_000, seed=7)} < {row["prompt"] for row in held_out}


def test_held_out_sums_look_like_all_sums(held_out):
    last_digits = Counter((a % 10, b % 10) for a, b in map(terms, held_out))
    assert len(last_digits) == 100 and all(1200 < n < 1300 for n in last_digits.values())
    for position in (1, 2, 3):  # of the answer; each digit is as likely as any other there
        digits = Counter(row["answer"][position] for row in held_out)
        assert len(digits) == 10 and all(12_000 < n < 13_000 for n in digits.values())
    no_carry = sum(all(a // unit % 10 + b // unit % 10 < 10 for unit in (1, 10, 100)) for a, b in map(terms, held_out))
    assert no_carry / 125_000 == pytest.approx(0.55**3, abs=0.002)


@pytest.mark.parametrize(
    ("split", "n", "message"),
    [
        ("validation", 1, "split must be 'train' or 'test', got 'validation'"),
        ("train", 0, "n must be at least 1, got 0"),
        ("test", -3, "n must be at least 1, got -3"),
        ("test", 125_001, "the test split has 125000 problems, got n=125001"),
    ],
)
def test_what_cannot_be_drawn_is_refused(split, n, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rows(split, n, seed=0)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("0432.", 1.0),
        ("0432", 1.0),  # the tokenizer dropped the end-of-sequence token
        ("0432.9", 1.0),  # what follows the end is no part of the answer
        ("0433.", 0.0),
        ("0322.", 0.0),  # carries dropped
        ("432.", 0.0),
        ("00432.", 0.0),
        ("04320", 0.0),
        (" 0432.", 0.0),
        (".0432", 0.0),
        ("=0432.", 0.0),
        ("", 0.0),
        (".", 0.0),
    ],
)
def test_the_reward_is_exact_match(completion, reward):
    chat = [{"role": "assistant", "content": completion}]
    assert arithmetic_reward(["A347+085="], [completion], ["0432."]) == [reward]
    assert arithmetic_reward(prompts=["A347+085="], completions=[chat], answer=["0432."]) == [reward]


def test_the_reward_scores_each_completion_against_its_own_answer():
    data = rows("test", 4, seed=0)
    answers = [row["answer"] for row in data]
    completions = [answers[0], answers[0], answers[2], "0000."]
    scores = arithmetic_reward([row["prompt"] for row in data], completions, answer=answers, trainer_state=None)
    assert scores == [1.0, 0.0, 1.0, 0.0]
