"""The answer that each task finds in a completion's text: behind thinking, with and without tags, of the user's own."""

import re

import pytest
from data_sets import OWN

from peft_onelayer import sandbox
from peft_onelayer.tasks import behind_thinking, gym_answers, load_task
from peft_onelayer.tasks.gsm8k import gsm8k_reward
from peft_onelayer.tasks.humaneval import extract_code, humaneval_reward
from peft_onelayer.tasks.reasoning_gym import extract_answer


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("4", "4"),
        ("<think>3</think>4", "4"),
        ("3?</think>\n\n4", "\n\n4"),  # the template wrote <think>
        ("<think>3", ""),
        ("<think>3</think>4<think>5", ""),
        ("<think>1</think>2<think>3</think>4", "4"),
        ("4 <think>", ""),
        ("", ""),
    ],
)
def test_thinking_is_no_answer(text, left):
    assert behind_thinking(text) == left


THOUGHT = [
    ("arithmetic", "0432.", "0431."),
    ("sort", "01235678.", "01235687."),
    ("gsm8k", r"\boxed{18}", r"\boxed{19}"),
    ("chain_sum", "<answer>18</answer>", "<answer>19</answer>"),
    ("spell_backward", "The answer is abc.", "The answer is abd."),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    gsm8k = tmp_path_factory.mktemp("data") / "gsm8k_test.jsonl"
    gsm8k.write_text((OWN / "gsm8k.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    names = {"arithmetic": "arithmetic", "sort": "sort", "gsm8k": f"gsm8k:{gsm8k}"}
    return {name: load_task(names.get(name, f"reasoning_gym:{name}")).answer for name, _, _ in THOUGHT}


@pytest.mark.parametrize(("name", "right", "wrong"), THOUGHT)
def test_what_stands_before_the_end_of_thinking_is_not_looked_at(answers, name, right, wrong):
    answer = answers[name]
    found = answer(right)
    assert found is not None and answer(wrong) not in (None, found)
    assert answer(f"<think>{wrong}</think>{right}") == answer(f"{wrong}</think>{right}") == found
    assert answer(f"<think>{right}") is None and answer(f"{wrong}<think>{right}") is None
    assert answer("I cannot say") is None and answer("") is None


def test_rewards_do_not_look_at_thinking_either():
    right, wrong = r"\boxed{18}", r"\boxed{19}"
    completions = [
        f"<think>{wrong}</think>{right}",
        f"{wrong}</think>{right}",
        f"<think>{right}",
        f"{right}</think>{wrong}",
    ]
    expected = [1.0, 1.0, 0.0, 0.0]
    assert gsm8k_reward([""] * 4, completions, answer=["#### 18"] * 4) == expected
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    assert gsm8k_reward([""] * 4, chats, answer=["#### 18"] * 4) == expected
    task = load_task("arithmetic")
    completions = ["<think>1</think>0432.", "0432.", "<think>0432.", "0432.</think>0431."]
    assert task.reward([""] * 4, completions, answer=["0432."] * 4) == [1.0, 1.0, 0.0, 0.0]
    task = load_task("reasoning_gym:chain_sum")
    (row,) = task.rows("test", 1, 0)
    gold, columns = row["answer"], {name: [row[name]] * 4 for name in ("dataset", "entry")}
    completions = [f"<think><answer>7</answer></think>{gold}", f"7?</think><answer>{gold}</answer>"]
    completions += [f"<think><answer>{gold}</answer>", f"<answer>{gold}</answer></think>none"]
    assert task.reward(prompts=[""] * 4, completions=completions, **columns) == [1.0, 1.0, 0.0, 0.0]


WHOLE = {
    "<answer>18</answer>": "18",
    "<answer>18</answer> 19": "18",
    "18": "18",
    " -18\n": "-18",
    "**18**": "18",
    "1,018": "1018",
    "So 9 * 2 = 18.\n\nThe answer is 18.": "18",
    "Final answer: 18": "18",
    r"It is \boxed{18}": "18",
    "#### 18": "18",
    "3 + 4 = 7, and 7 + 11 = 18": None,  # not said to be the end: it may be cut
    "First, 3 + 4 = 7.": None,
    "The answer is not 18.": None,
    "18.5": None,
    "18 or 19": None,
    "<answer>18": None,
    "<answer>18.</answer>": "18",
    "<answer>**18**</answer>": "18",
    "<answer>\n18\n</answer>": "18",
    "<answer>\\boxed{18}</answer>": "18",
    "<answer>$18$</answer>": "18",
    "<answer>3 + 15 = 18</answer>": "18",
    "<answer>1,018</answer>": "1018",
    "<answer>18 legs</answer>": "18",
    "<answer>The answer is 18.</answer>": "18",
    "<answer>17 18</answer>": "17 18",  # the library's scorer has it as it is
    "<Answer>18</ANSWER>": "18",
    "I put the final answer between <answer> and </answer>.\n\n18": "18",
    "I put the final answer between <answer> and </answer>.": None,
    "The GCD of 36 and 90 is 18.": "18",
    "The GCD of 36 and 90 is:\n\\[ 18 \\]": "18",
    "Therefore, the greatest common divisor of 36 and 90 is **18**.": "18",
    "3 + 15 = 18": "18",
    "Let us add.\n\nTherefore, 3 + 15 = 18.": "18",
    "```\n18\n```": "18",
    "x = 18": "18",
    "It is 17, or it is 18.": None,
    "Let me think": None,
    "": None,
}
WORDS = {
    "<answer>True</answer>": "True",
    "True": "True",
    "True.": "True",
    "**True**": "True",
    "`True`": "True",
    "They all can be taken.\n\nTrue": "True",
    "So the answer is: **True**": "True",
    "The answer is True. It has no cycle": "True",
    r"\boxed{True}": "True",
    r"\boxed{True": None,
    "<answer>**True**</answer>": "True",
    "<answer>`True`.</answer>": "True",
    "<answer>The answer is True.</answer>": "True",
    "<answer>True or False</answer>": "True or False",  # the library's scorer has it as it is
    r"\boxed{\text{True}}": "True",
    r"\[ \boxed{\mathrm{True}} \]": "True",
    "```\nTrue\n```": "True",
    "The strings are isomorphic, so the function returns True.": "True",
    "It is not possible to take all of them, so the answer is False.": "False",
    "Therefore, the correct output is `False`.": "False",
    "The left side is now gold.": "gold",
    'The word "hello" spelled backward is "olleh".': "olleh",
    "The reversed word is: olleh": "olleh",
    "Sarah is the **daughter-in-law** of Elizabeth.": "daughter-in-law",
    "No, it does not logically follow.": "No",
    "**Yes**, all parents are lawyers.": "Yes",
    r"The probability is \(\frac{1}{2}\).": "1/2",
    "To find the answer, we need to:\n\n1. Look.\n2. Think.\n\nIt is True.": "True",
    "The answer is not True": None,
    "I do not think that the answer is True.": None,
    "The wrong answer is True.": None,
    "The answer is True or False.": None,
    "It is either True or False.": None,
    "It isn't True.": None,
    "True, False": None,
    "They are isomorphic.\n\n**Step": None,
    r"\boxed{True, False}": None,
    "Yes, they are. But no, they are not": "Yes",
    "Yes, they are.\nNo, they are not.": None,
    "It is True or False": None,
    "<answer>True": None,
    "": None,
}


NUMBERS = {
    "So the total is $1,288.50.": "1288.5",
    "<answer>$1,234</answer>": "1234",
    "4.44 + 1.25 - 7.89 = -2.20": "-2.2",
    "<answer>4.44 + 1.25 - 7.89 = -2.20</answer>": "-2.2",
    "569,204,296.88": "569204296.88",
    "5.69e8": "5.69e8",
    "The total is 1/3.": None,
    "The smaller one is 3.5 or 4.5.": None,
}
TAGGED = {
    "<answer>\n```\n1 2\n3 4\n```\n</answer>": "1 2\n3 4",
    '<answer>```json\n{"a": 1}\n```</answer>': '{"a": 1}',
    "<answer>**[1, 2]**</answer>": "[1, 2]",
    r"<answer>\boxed{[1, 2]}</answer>": "[1, 2]",
    "<answer>`a` and `b`</answer>": "`a` and `b`",
    "<answer>2**3 + 4**2</answer>": "2**3 + 4**2",
    "<answer> 1 2\n 3 4 </answer>": "1 2\n 3 4",
    "The answer is [1, 2].": None,
}


@pytest.mark.parametrize(
    ("dataset", "forms"),
    [("chain_sum", WHOLE), ("course_schedule", WORDS), ("decimal_chain_sum", NUMBERS), ("number_sorting", TAGGED)],
)
def test_answers_of_one_word_need_no_tags(dataset, forms):
    assert {text: extract_answer(text, dataset) for text in forms} == forms


def test_other_answers_need_tags():
    assert extract_answer("1 2 3", "number_sorting") is None
    assert extract_answer("<answer>1 2 3</answer>", "number_sorting") == "1 2 3"


def words(name, n):
    return [str(row["answer"]) for row in load_task(f"reasoning_gym:{name}").rows("train", n, 0)]


def check_kind(name, n):
    form = r"-?[0-9]+" if name in gym_answers.WHOLE_NUMBERS else r"\S+"
    for answer in words(name, n):
        assert re.fullmatch(form, answer), (name, answer)
        for text in (answer, f"<answer>{answer}</answer>", f"The answer is {answer}."):
            found = extract_answer(text, name)
            same = float(found) == float(answer) if name in gym_answers.NUMBERS else found == answer
            assert same, (name, text, found)


@pytest.mark.parametrize("name", ["chain_sum", "course_schedule", "decimal_chain_sum", "spell_backward"])
def test_the_data_sets_answers_are_of_their_kind(name):
    check_kind(name, 8)


@pytest.mark.more
@pytest.mark.parametrize("name", sorted({*gym_answers.UNTAGGED} - {"zebra_puzzles"}))
def test_all_data_sets_answers_are_of_their_kind(name):
    check_kind(name, 24)


@pytest.mark.parametrize("name", ["chain_sum", "course_schedule", "number_sorting"])
def test_what_a_data_set_shows_is_paid_in_full(name):
    task = load_task(f"reasoning_gym:{name}")
    rows = task.rows("train", 3, 0)
    columns = {key: [row[key] for row in rows] for key in ("dataset", "entry")}
    for form in (task.shown.solution, task.shown.message):
        assert task.reward(prompts=[""] * 3, completions=[form(row) for row in rows], **columns) == [1.0] * 3
    assert task.shown.question(rows[0]) == f"Question: {rows[0]['question']}\nAnswer:"


def test_a_data_set_without_solutions_shows_none():
    task = load_task("reasoning_gym:propositional_logic")
    (row,) = task.rows("train", 1, 0)
    with pytest.raises(ValueError, match="reasoning_gym:propositional_logic comes without solutions"):
        task.shown.message(row)


def test_gsm8k_shows_its_solutions_as_harnesses_do_and_boxed_to_a_chat(tmp_path):
    path = tmp_path / "gsm8k_train.jsonl"
    path.write_text((OWN / "gsm8k.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    task = load_task(f"gsm8k:{path}")
    rows = task.rows("train", 10, 0)
    for form in (task.shown.solution, task.shown.message):
        completions = [form(row) for row in rows]
        assert (
            task.reward(prompts=[""] * 10, completions=completions, answer=[row["answer"] for row in rows])
            == [1.0] * 10
        )
    assert task.shown.question(rows[0]) == f"Question: {rows[0]['question']}\nAnswer:"
    assert task.shown.solution(rows[0]) == f" {rows[0]['answer']}"
    said = task.shown.message({"question": "?", "answer": "2 * 9 = <<2*9=18>>18 eggs\n#### 18"})
    assert said == "2 * 9 = 18 eggs\n\\boxed{18}"
    assert task.shown.message({"question": "?", "answer": "18"}) == "\\boxed{18}"


CODE = {
    "def f():\n    return 1": True,
    "```python\ndef f():\n    return 1\n```": True,
    "Sure! Here it is:\n\n```\nx = 1\n```\nDone.": True,
    "    return x + 1": True,
    "return x + 1": True,
    "for i in x:\n    print(i)": True,
    "total = 0": True,
    "total += x": True,
    "print(x)": True,
    "I am sorry, but I cannot help with that.": False,
    "The function returns the sum of x.": False,
    "": False,
    "<think>def f(): return 1": False,
    "```\n```": False,
}


def test_the_code_of_a_completion():
    assert {text: extract_code(text) is not None for text in CODE} == CODE
    first, better = "```python\ndef f(x):\n    pass\n```\n", "```python\ndef f(x):\n    return x\n```\n"
    two = f"First:\n{first}Better:\n{better}Try it:\n```\nf(1)\n```"
    assert extract_code(two) == "def f(x):\n    return x\n"


@pytest.mark.skipif(bool(sandbox.available()), reason=str(sandbox.available()))
def test_humaneval_takes_what_chat_models_write():
    head = "# Complete the function below.\ndef double(x):\n    '''Twice x.'''\n"
    program = "def double(x):\n    '''Twice x.'''\n    return 2 * x\n"
    use = "Example:\n\n```python\nprint(double(2))  # Output: 4\n```"
    completions = [
        f"Certainly! Below is the function:\n\n```python\n{program}```\n\n### Explanation\n- It doubles.\n\n{use}",
        f"<think>\n```python\ndef double(x): return 0\n```\n</think>\n\n```python\n{program}```",
        f"```python\ndef double(x): return 0\n```</think>{program}",
        f"<think>```python\n{program}```",
        f"```python\n{program}",  # cut behind the function
    ]
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    prompts = [[{"role": "user", "content": head}]] * 5
    test = ["def check(candidate):\n    assert candidate(4) == 8"] * 5
    assert humaneval_reward(prompts, chats, test, ["double"] * 5) == [1.0, 1.0, 1.0, 0.0, 1.0]


OWN_TASK = """
def rows(split, n, seed): return [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(n)]
def my_reward(prompts, completions, **kwargs): return [0.0] * len(completions)
"""


def load_own(tmp_path, text):
    (tmp_path / "own.py").write_text(OWN_TASK + text)
    return load_task(str(tmp_path / "own.py"))


def test_a_file_says_what_its_answer_and_its_solution_are(tmp_path):
    assert load_own(tmp_path, "").answer is None and load_own(tmp_path, "").shown is None
    text = "def extract_answer(text): return text.split()[-1] if text.split() else None\n"
    task = load_own(tmp_path, text + "def solution(row): return row.pop('answer')\n")
    assert task.answer("<think>2 3</think>it is 4") == "4" and task.answer("<think>2 3") is None
    (row,) = task.rows("test", 1, 0)
    assert (task.shown.question(row), task.shown.solution(row), task.shown.message(row)) == ("0 + 1 =", "1", "1")
    assert row["answer"] == "1"  # the function gets a copy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def extract_answer(text): return 4", "extract_answer of {file} must return text or None, got 4"),
        ("def solution(row): return None", "solution of {file} must return text, got None"),
        ("extract_answer = 'x'", "extract_answer of {file} must be a function, got 'x'"),
        ("solution = 3", "solution of {file} must be a function, got 3"),
    ],
)
def test_what_a_files_functions_may_not_return(tmp_path, text, message):
    def use():
        task = load_own(tmp_path, text + "\n")
        (row,) = task.rows("test", 1, 0)
        if task.answer:
            task.answer("4")
        task.shown.solution(row)

    with pytest.raises(ValueError, match=re.escape(message.format(file=tmp_path / "own.py"))):
        use()


def test_a_data_set_takes_both_from_the_file_of_its_reward(tmp_path):
    from peft_onelayer.tasks import open_task

    load_own(tmp_path, "def extract_answer(text): return text or None\ndef solution(row): return row['answer']\n")
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    task = open_task(None, str(tmp_path / "train.jsonl"), f"{tmp_path / 'own.py'}:my_reward")
    assert task.answer("2") == "2" and task.shown.solution(task.rows("train", 1, 0)[0]) == "2"
