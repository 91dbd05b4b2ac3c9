import itertools
import re
from collections import Counter

import pytest

from peft_onelayer.tasks import sort
from peft_onelayer.tasks.sort import rows, sort_reward


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_is_eight_digits_and_the_same_digits_in_order(split):
    for row in rows(split, 500, seed=3):
        assert re.fullmatch(r"S\d{8}=", row["prompt"]) and re.fullmatch(r"\d{8}\.", row["answer"])
        digits = row["answer"][:-1]
        assert Counter(digits) == Counter(row["prompt"][1:-1])
        assert all(x <= y for x, y in itertools.pairwise(digits))
        assert len(row["answer"]) == sort.MAX_COMPLETION_TOKENS


def test_rows_depend_on_split_number_and_seed_only():
    for split in ("train", "test"):
        assert rows(split, 50, seed=1) == rows(split, 50, seed=1)
        assert rows(split, 50, seed=1) != rows(split, 50, seed=2)


def test_the_first_rows_stay_what_they_are():
    """The demo model's card and every saved ranking refer to these problems."""
    assert [row["prompt"] for row in rows("test", 2, seed=0)] == ["S49654575=", "S21242998="]
    assert [row["prompt"] for row in rows("train", 2, seed=0)] == ["S47058030=", "S97956779="]


def test_train_and_test_never_overlap():
    test = {row["prompt"] for row in rows("test", 200_000, seed=0)}
    assert len(test) == 200_000  # distinct
    train = {row["prompt"] for row in rows("train", 200_000, seed=0)}
    assert not train & test  # 400 would coincide by chance if both were drawn from all problems


def test_held_out_strings_look_like_all_strings():
    held_out = rows("test", 50_000, seed=0)
    for position in range(1, 9):
        digits = Counter(row["prompt"][position] for row in held_out)
        assert len(digits) == 10 and all(4700 < n < 5300 for n in digits.values())  # 5000 +- 67
    all_different = sum(len(set(row["answer"])) == 9 for row in held_out) / 50_000
    assert all_different == pytest.approx(10 * 9 * 8 * 7 * 6 * 5 * 4 * 3 / 10**8, abs=0.003)


@pytest.mark.parametrize(
    ("split", "n", "message"),
    [
        ("dev", 1, "split must be 'train' or 'test', got 'dev'"),
        ("train", 0, "n must be at least 1, got 0"),
        ("test", 12_500_001, "the test split has 12500000 problems, got n=12500001"),
    ],
)
def test_what_cannot_be_drawn_is_refused(split, n, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rows(split, n, seed=0)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("01235678.", 1.0),
        ("01235678", 1.0),  # the tokenizer dropped the end-of-sequence token
        ("01235678.1", 1.0),  # what follows the end is no part of the answer
        ("01235687.", 0.0),
        ("87653210.", 0.0),  # descending
        ("1235678.", 0.0),
        ("012356780", 0.0),
        (" 01235678.", 0.0),
        (".01235678", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_is_exact_match(completion, reward):
    chat = [{"role": "assistant", "content": completion}]
    assert sort_reward(["S51836270="], [completion], ["01235678."]) == [reward]
    assert sort_reward(prompts=["S51836270="], completions=[chat], answer=["01235678."]) == [reward]
