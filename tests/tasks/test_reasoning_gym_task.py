import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import reasoning_gym as library
from datasets import Dataset
from reasoning_gym.factory import DATASETS

from peft_onelayer.tasks import gym_answers, limits, load_task
from peft_onelayer.tasks import reasoning_gym as task_module
from peft_onelayer.tasks.reasoning_gym import from_text, reasoning_gym_reward, to_text

SAMPLE = (
    "chain_sum", "basic_arithmetic", "leg_counting", "spell_backward", "simple_equations", "number_sorting",
    "list_functions", "rearc", "boxnet", "knights_knaves", "prime_factorization", "spiral_matrix",
    "simple_integration", "polynomial_multiplication", "mini_sudoku", "graph_color", "calendar_arithmetic",
)  # fmt: skip
SLOW = ("futoshiki", "intermediate_integration", "knight_swap", "puzzle24", "sokoban", "zebra_puzzles", "countdown")
ALL = sorted(set(DATASETS) - {"composite"})  # composite has no defaults


# Where the library's scorer pays for what is no answer, and the task does not: what is tried here is then worth 0.
REFUSED = {"countdown", "fraction_simplification", "game_of_life_halting", "polynomial_equations", "puzzle24"}


def check_scores(name, n):
    task = load_task(f"reasoning_gym:{name}")
    rows = Dataset.from_list(task.rows("train", n, seed=0)).to_list()  # as the trainer has them
    scorer = library.create_dataset(name, size=1, seed=0)
    for row in rows:
        entry = from_text(row["entry"])
        assert (entry["question"], entry["answer"]) == (row["question"], row["answer"])
        answers = (row["answer"], "wrong", "42", "", None)
        completions = ["no tags" if answer is None else f"so: <answer>{answer}</answer>" for answer in answers]
        columns = {key: [row[key]] * len(answers) for key in ("question", "answer", "dataset", "entry")}
        rewards = task.reward(prompts=[row["prompt"]] * len(answers), completions=completions, **columns)
        for answer, reward in zip(answers, rewards, strict=True):
            try:
                expected = float(scorer.score_answer(None if answer is None else answer.strip(), entry))
            except Exception:
                expected = 0.0
            assert reward == expected or (reward == 0 and name in REFUSED and answer != row["answer"])
            if answer == row["answer"] and answer is not None:
                assert reward >= 0.99 or answer != answer.strip()


class Programs(list):
    """As codeio: entries that are made by programs, which write where they are and print."""

    def __getitem__(self, index):
        folder = Path("test_dir").resolve()
        folder.mkdir()
        print("Error executing code")
        path = folder if index % 2 else "nowhere"
        return {"question": f"What is in {path}, for {index}?", "answer": str(index), "metadata": {}}


def test_programs_of_a_data_set_leave_nothing_behind_and_no_problem_depends_on_the_place(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(library, "create_dataset", lambda name, size, seed: Programs())
    drawn = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        drawn.append(task_module._rows("codeio", "train", 20, seed=0))
        assert list((tmp_path / name).iterdir()) == []
    assert drawn[0] == drawn[1] and len(drawn[0]) == 20
    assert all("nowhere" in row["question"] for row in drawn[0])
    assert capfd.readouterr().out == ""


def score(row, *answers, log=None):
    columns = {key: [row[key]] * len(answers) for key in ("dataset", "entry")}
    completions = [f"<answer>{answer}</answer>" for answer in answers]
    log_metric = None if log is None else lambda name, value: log.append((name, value))
    return reasoning_gym_reward([""] * len(answers), completions, **columns, log_metric=log_metric)


def first(name, seed=0):
    return load_task(f"reasoning_gym:{name}").rows("train", 1, seed)[0]


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
    entry = {"metadata": {1: (2, [3.5, None, True]), "a": {"dict": []}, (1, 2): "pair", "half": Fraction(1, 2)}}
    assert from_text(to_text(entry)) == entry
    assert json.loads(to_text(entry))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("chain_sum", marks=pytest.mark.more),
        pytest.param("tower_of_hanoi", marks=pytest.mark.more),
        "list_functions",
    ],
)
def test_the_splits_never_overlap_whatever_the_seeds(name):
    task = load_task(f"reasoning_gym:{name}")
    train = {row["question"] for seed in range(3) for row in task.rows("train", 60, seed)}
    test = [row["question"] for row in task.rows("test", 15, seed=1)]
    assert len(set(test)) == len(test) and not train & set(test)
    assert task.rows("train", 20, 5) == task.rows("train", 20, 5) == task.rows("train", 40, 5)[:20]
    assert task.rows("train", 20, 5) != task.rows("train", 20, 6)


@pytest.mark.more
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


@pytest.mark.parametrize("name", [*gym_answers.EVALUATED, *gym_answers.FORMULAS])
def test_no_answer_runs_as_python(name, tmp_path):
    """The library would: without the task's guard each of these makes the file."""
    row = load_task(f"reasoning_gym:{name}").rows("train", 1, seed=0)[0]
    target = tmp_path / "made"
    codes = (f"__import__('pathlib').Path('{target}').touch()", f"[open('{target}', 'w')]", "9**9**9**9")
    assert score(row, *codes) == [0.0] * 3
    assert not target.exists()


def test_the_last_answer_of_a_chat_counts():
    row = load_task("reasoning_gym:chain_sum").rows("test", 1, seed=0)[0]
    chat = [{"role": "assistant", "content": f"<answer>no</answer> hm <answer> {row['answer']} </answer>."}]
    assert reasoning_gym_reward([""], [chat], ["chain_sum"], [row["entry"]], trainer_state=None) == [1.0]


# Answers that the library's own scorer never ends on, or takes seconds for.
ENDLESS = {
    "coin_flip": ["1e30000000", "1e999999999", "1/1e999999999", "-1E+999999999", "1e30000000/3"],
    "polynomial_multiplication": ["1e999999999", "x**99999999999", "(x+1)**999999", "9**9**9**9", "10**(10**10)"],
    "simple_integration": ["1e999999999", "factorial(10**10)", "9" * 20_001, "sin(x)**9*cos(x)**9*exp(x)**9"],
    "intermediate_integration": [
        "1e999999999",
        "exp(sin(x)**3*cos(x)**5)*log(x)**3*sqrt(x)",
        "(x**3*sin(2*x) + 3*x**2*cos(2*x)/2 - 3*x*sin(2*x)/2 - 3*cos(2*x)/4)*exp(-x)/5 + C",
        "sin(x)*cos(x)*tan(x)*exp(x)*log(x)*sinh(x)*cosh(x)",
    ],
    "rush_hour": ["F+99999999999", "A-1234567890123", "F+1 F+99999999999"],
    "puzzle24": ["1e999999999", "9**9**9**9", "(" * 300, "(" * 299 + "1"],
    "countdown": ["1e999999999", "9**9**9**9", "-" * 300, "1/0"],
    "sokoban": ["R" * 10**6],
    "sudoku": ["1" * 10**6, "1 2 3 4 5 6 7 8 9\n" * 50_000],
    "mini_sudoku": ["1" * 10**6],
    "kakurasu": ["1 " * 500_000],
    "survo": ["1 " * 500_000],
    "arc_agi": ["1 " * 500_000],
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_answer_that_keeps_the_librarys_scorer_busy_scores_0(name):
    log = []
    assert score(first(name), *ENDLESS[name], log=log) == [0.0] * len(ENDLESS[name])
    assert log == [(limits.OVER_LIMIT, 0.0)]  # decided without the limit


@pytest.mark.more
def test_what_passes_the_limit_scores_0_is_counted_and_leaves_the_others_as_they_are():
    row = first("simple_integration")
    log = []
    busy = "exp(999999999*log(9))"  # sympy makes a power of whole numbers of it
    assert score(row, row["answer"], busy, row["answer"], "x", log=log) == [1.0, 0.0, 1.0, 0.0]
    assert log == [(limits.OVER_LIMIT, 1.0)]


def test_data_sets_may_be_mixed_in_a_batch():
    rows = [first("chain_sum"), first("leg_counting"), first("chain_sum", 1), first("leg_counting", 1)]
    completions = [f"<answer>{row['answer']}</answer>" for row in rows[:3]] + ["none"]
    columns = {key: [row[key] for row in rows] for key in ("dataset", "entry")}
    assert reasoning_gym_reward([""] * 4, completions, **columns) == [1.0, 1.0, 1.0, 0.0]


def for_nothing(name, row):
    """Answers that the library's scorer pays for in full, and nothing in the row says that they are right."""
    entry = from_text(row["entry"])
    metadata = entry["metadata"]
    match name:
        case "coin_flip":
            return ["0", "0.", row["answer"][:3]]
        case "complex_arithmetic":
            return ["nan", "NaN", "nani", "(nan)", "n an", "nan+2i", "2+nani", "-nan"]
        case "countdown":
            numbers = metadata["numbers"]
            gold = row["answer"]
            fewer = "+".join(map(str, numbers[:-1]))
            return [str(metadata["target"]), f"{gold}+0", f"({gold})//1", f"{gold}*1", f"1.0*({gold})", fewer]
        case "puzzle24":
            return [
                answer
                for answer in (
                    "6*4*1*1",
                    "4*6*1*1",
                    "8*3*1*1",
                    "3*8*1*1",
                    "24",
                    "10+10+3+1",
                    "9+9+5+1",
                    "49/2*1*1",
                    "5*5-1*1",
                )
                if sorted(re.findall("[0-9]+", answer)) != sorted(map(str, metadata["numbers"]))
            ]
        case "gsm_symbolic" | "fraction_simplification":
            right = row["answer"]
            return [f"not {right}", f"{right} or 7", f"{right} is wrong", f"{right}**9**9", f"{right} 12 13 14"]
        case "game_of_life_halting":
            return ["anything", "?", "0", str(row["answer"] != "True"), "True False", "not " + row["answer"]]
        case "number_sorting":
            n = len(metadata["original_numbers"])
            return [
                json.dumps(["nan"] * n),
                json.dumps([float("nan")] * n),
                json.dumps(["NaN"] * n),
                "[" + "nan," * n + "]",
            ]
        case "simple_integration" | "intermediate_integration":
            integrand, x = metadata["integrand"], metadata["variable"]
            return [f"Integral({integrand}, {x})", f"Integral({integrand}, {x}) + C", f"Integral({integrand},({x}))"]
        case "propositional_logic":
            return [
                premise.join(brackets)
                for premise in metadata["premises"]
                if premise != metadata["example_answer"]
                for brackets in (("", ""), ("(", ")"), (" ( ", " ) "))
            ]
    raise AssertionError(name)


CURED = ["coin_flip", "complex_arithmetic", "countdown", "puzzle24", "game_of_life_halting", "number_sorting"]
CURED += ["simple_integration", "propositional_logic", "gsm_symbolic", "fraction_simplification"]


@pytest.mark.parametrize("name", CURED)
def test_nothing_is_paid_for_nonsense(name):
    tried = 0
    for row in load_task(f"reasoning_gym:{name}").rows("train", 4, seed=0):
        answers = for_nothing(name, row)
        rewards = score(row, *answers, row["answer"] or from_text(row["entry"])["metadata"]["example_answer"])
        assert max(rewards[:-1], default=0) < 0.3 and rewards[-1] >= 0.99, (answers, rewards)
        tried += len(answers)
    assert tried >= 6


def test_where_there_is_no_such_day_only_that_is_right():
    """The library gives e^5 and more for other numbers."""
    entry = {"question": "", "answer": "-1", "metadata": {"task": "recurring_event_day"}}
    row = {"dataset": "calendar_arithmetic", "entry": to_text(entry)}
    assert score(row, "-1", "0", "1", "100", "-2", "1000000") == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("", 1.0), ('""', 1.0), ("none", 0.0), ("no real solution", 0.0), ("nan", 0.0), ("1.5", 0.0)],
)
def test_where_there_is_no_solution_only_the_empty_answer_is_right(answer, reward):
    entry = {"question": "", "answer": "", "metadata": {}}
    assert score({"dataset": "polynomial_equations", "entry": to_text(entry)}, answer) == [reward]
    assert reasoning_gym_reward([""], ["no tags"], ["polynomial_equations"], [to_text(entry)]) == [0.0]


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("42*x**3", 1.0),
        ("(42*x**3)", 1.0),
        ("42 * x ** 3", 1.0),
        ("(14*x**2)*(3*x)", 0.0),
        ("14*x**2*3*x", 0.0),
        ("6*7*x**3", 0.0),
        ("42*x*x**2", 0.0),
        ("21*x**3 + 21*x**3", 0.0),
    ],
)
def test_a_product_has_to_be_multiplied_out(answer, reward):
    entry = {"question": "", "answer": "42*x**3", "metadata": {}}
    assert score({"dataset": "polynomial_multiplication", "entry": to_text(entry)}, answer) == [reward]


def test_no_row_has_a_question_for_its_answer():
    rows = load_task("reasoning_gym:intermediate_integration").rows("train", 20, seed=1)
    assert not [row["answer"] for row in rows if "Integral" in row["answer"]]


def test_puzzle24_takes_the_given_numbers_only():
    entry = {"question": "", "answer": "", "metadata": {"numbers": [1, 1, 4, 6]}}
    answers = {"6*4*1*1": 1.0, "(6 - 1 + 1)*4": 1.0, "6*4": 0.0, "6*4*1": 0.0, "8*3*1*1": 0.0, "6*4+1": 0.0}
    answers |= {"24": 0.0, "6*4*1*1.5": 0.0, "6**1*4*1": 0.0, "6*4*1//1": 0.0, "(6+0)*4*1*1": 0.0, "6*4*11": 0.0}
    assert score({"dataset": "puzzle24", "entry": to_text(entry)}, *answers) == list(answers.values())


@pytest.mark.parametrize(
    "text",
    [
        *("<answer>3</answer> or <answer> 4 </answer>", "<answer>4", "4", "</answer><answer>", "<answer></answer>", ""),
        *("<answer> <answer>4</answer></answer>", "<answer>\n\n4\n\n</answer>", "<answer>4</answer><answer>5"),
    ],
)
def test_the_answer_is_found_as_the_library_finds_it(text):
    assert task_module.extract_answer(text) == library.utils.extract_answer(text)


@pytest.mark.more
def test_finding_the_answer_takes_time_in_proportion_to_the_text():
    """The library's way takes hours for these."""
    row = first("chain_sum")
    for text in ("<answer>" * 200_000, "<answer>" + " " * 10**6, "<answer></answer>" * 100_000, "</answer>" * 200_000):
        assert reasoning_gym_reward([""], [text], ["chain_sum"], [row["entry"]]) == [0.0]
