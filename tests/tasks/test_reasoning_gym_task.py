import json
import re

import pytest
import reasoning_gym as library
from datasets import Dataset
from reasoning_gym.factory import DATASETS

from peft_onelayer.tasks import load_task
from peft_onelayer.tasks import reasoning_gym as task_module
from peft_onelayer.tasks.reasoning_gym import from_text, reasoning_gym_reward, to_text

SAMPLE = (
    "chain_sum", "basic_arithmetic", "leg_counting", "spell_backward", "simple_equations", "number_sorting",
    "list_functions", "rearc", "boxnet", "knights_knaves", "prime_factorization", "spiral_matrix",
    "simple_integration", "polynomial_multiplication", "mini_sudoku", "graph_color", "calendar_arithmetic",
)  # fmt: skip
SLOW = ("futoshiki", "intermediate_integration", "knight_swap", "puzzle24", "sokoban", "zebra_puzzles", "countdown")
ALL = sorted(set(DATASETS) - {"composite"})  # composite has no defaults


def check_scores(name, n):
    task = load_task(f"reasoning_gym:{name}")
    rows = Dataset.from_list(task.rows("train", n, seed=0)).to_list()  # as the trainer has them
    scorer = library.create_dataset(name, size=1, seed=0)
    for row in rows:
        entry = from_text(row["entry"])
        assert (entry["question"], entry["answer"]) == (row["question"], row["answer"])
        for answer in (row["answer"], "wrong", "42", "", None):
            completion = "no tags" if answer is None else f"so: <answer>{answer}</answer>"
            try:
                expected = float(scorer.score_answer(None if answer is None else answer.strip(), entry))
            except Exception:
                expected = 0.0
            columns = {key: [row[key]] for key in ("question", "answer", "dataset", "entry")}
            assert task.reward(prompts=[row["prompt"]], completions=[completion], **columns) == [expected]
            if answer == row["answer"] and answer is not None:
                assert expected >= 0.99 or answer != answer.strip()


@pytest.mark.parametrize("name", SAMPLE)
def test_the_reward_is_the_librarys_own(name):
    check_scores(name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_reward_is_the_librarys_own_on_every_data_set(name):
    check_scores(name, 1 if name in SLOW else 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ALL) - set(SLOW)))
def test_entries_survive_as_text_and_repeat(name):
    def entries():
        source = task_module._entries(name, "seed")
        return [next(source) for _ in range(6)]

    first = entries()
    assert entries() == first == [from_text(to_text(entry)) for entry in first]


def test_an_entry_as_text_keeps_what_json_would_not():
    entry = {"metadata": {1: (2, [3.5, None, True]), "a": {"dict": []}, (1, 2): "pair"}}
    assert from_text(to_text(entry)) == entry
    assert json.loads(to_text(entry))


@pytest.mark.parametrize("name", ["chain_sum", "tower_of_hanoi", "list_functions"])
def test_the_splits_never_overlap_whatever_the_seeds(name):
    task = load_task(f"reasoning_gym:{name}")
    train = {row["question"] for seed in range(3) for row in task.rows("train", 60, seed)}
    test = [row["question"] for row in task.rows("test", 15, seed=1)]
    assert len(set(test)) == len(test) and not train & set(test)
    assert task.rows("train", 20, 5) == task.rows("train", 20, 5) == task.rows("train", 40, 5)[:20]
    assert task.rows("train", 20, 5) != task.rows("train", 20, 6)


def test_a_small_space_of_questions_gives_what_there_is(monkeypatch):
    task = load_task("reasoning_gym:tower_of_hanoi")
    train, test = task.rows("train", 10**4, 0), task.rows("test", 10**4, 0)
    assert 0 < len(test) < len(train) < 1000
    monkeypatch.setattr(task_module, "is_held_out", lambda question: False)
    with pytest.raises(ValueError, match=r"has only \d+ questions, and none of them is in the test split"):
        task.rows("test", 1, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reasoning_gym", "needs the name of one of"),
        ("reasoning_gym:chain_sums", "has no data set 'chain_sums'; did you mean one of chain_sum"),
        ("reasoning_gym:composite", "reasoning_gym:composite cannot be made from its defaults"),
    ],
)
def test_what_is_no_data_set_is_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_task(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [*task_module.EVALUATED, *task_module.FORMULAS])
def test_no_answer_runs_as_python(name, tmp_path):
    """The library would: without the task's guard each of these makes the file."""
    row = load_task(f"reasoning_gym:{name}").rows("train", 1, seed=0)[0]
    target = tmp_path / "made"
    for code in (f"__import__('pathlib').Path('{target}').touch()", f"[open('{target}', 'w')]", "9**9**9**9"):
        for_none = reasoning_gym_reward([""], ["no tags"], [name], [row["entry"]])
        assert reasoning_gym_reward([""], [f"<answer>{code}</answer>"], [name], [row["entry"]]) == for_none
    assert not target.exists()


def test_the_last_answer_of_a_chat_counts():
    row = load_task("reasoning_gym:chain_sum").rows("test", 1, seed=0)[0]
    chat = [{"role": "assistant", "content": f"<answer>no</answer> hm <answer> {row['answer']} </answer>."}]
    assert reasoning_gym_reward([""], [chat], ["chain_sum"], [row["entry"]], trainer_state=None) == [1.0]
