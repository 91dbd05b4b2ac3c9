import json
import random
import re
import threading
from fractions import Fraction

import pytest
from data_sets import FULL, full, own

from peft_onelayer.tasks import load_task
from peft_onelayer.tasks.gsm8k import final_answer, gsm8k_reward

SOLUTION = "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18"


def score(completion, answer=SOLUTION):
    plain, chat = gsm8k_reward(
        prompts=["", ""],
        completions=[completion, [{"role": "assistant", "content": completion}]],
        answer=[answer, answer],
        question=["How much?", "How much?"],
    )
    assert plain == chat
    return plain


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


on_own_and_full = pytest.mark.parametrize("path", [own("gsm8k.jsonl"), full("gsm8k_test.jsonl")])


RIGHT = [
    SOLUTION,
    r"\boxed{18}",
    r"So she makes $\boxed{18}$ dollars.",
    r"\boxed{\$18.00}",
    r"\boxed{18\text{ dollars}}",
    r"\boxed{\text{\$18}}",
    r"\boxed {{18}}",
    r"\boxed{18 \text{ cm}^2}",
    r"\boxed{18^\circ}",
    r"\boxed{18\%}",
    r"\boxed{x = 18}",
    r"\boxed{9 \times 2 = 18}",
    r"\boxed{\frac{36}{2}}",
    r"First \boxed{9}, then twice that: \boxed{18}",
    r"\[ \boxed{18} \]",
    r"\[ 18 \]",
    r"\fbox{18}",
    "#### 18",
    "####18",
    "#### $18.00\n",
    "It is #### 9 first.\n#### 18 dollars",
    r"#### \boxed{18}",
    "<answer>18</answer>",
    r"<answer>3</answer> no: <answer>\boxed{18}</answer>",
    "18",
    "18.",
    "18!",
    "+18",
    "18.0",
    "$18.00",
    "US$18",
    r"\$18",
    "$18$",
    r"\(18\)",
    "**18**",
    "18 dollars",
    "18%",
    "36/2",
    "$18/day",
    "She makes $18 every day.",
    "9 eggs at $2 each. So she makes **$18** every day.",
    "16 - 3 - 4 = 9\n9 * 2 = 18\n\n18 dollars",
    "The answer is 18.",
    "the answer is **18**",
    "The answer is 9 * 2 = 18.",
    "The answer is $18 per day, because 9 * 2 = 18.",
    "The answer is 18 (9 eggs at $2).",
    "**Answer:** $18",
    "**Final Answer:**\n\n18",
    r"The final answer is: $\boxed{18}$. I hope it is correct.",
    "The answer is 9. No, the answer is 18.",
    r"\boxed{18.0000001}",
    r"\boxed{17.9999999}",
    "18.0000000000000000001",
    "The answer is 18, not 17.",
    "No, she makes 18 dollars.",
    "The number of eggs that are not sold is 18.",
    "Since she does not eat them, she makes 18 dollars.",
    "18 eggs are not broken.",
    "He got 18 wrong.",
    "She needs 18 more dollars.",
    "She needs at least 18 dollars.",
    "He gave wrong answers: 18.",
    r"It is not 17. \boxed{18}",
    "9 is not it.\n#### 18",
    "9 * 2 => 18\n#### => 18",
    r"$9 \times 2 \Rightarrow \boxed{18}$",
    r"\boxed{\approx 18}",
    r"\boxed{\mathbf{18}}",
    "<answer><b>18</b></answer>",
    "#### <18>",
    "<Answer>18</Answer>",
    "9 * 2 = 18",
    "9 * 2 = 18.",
    r"\[ 9 \times 2 = 18 \]",
    "The answer is:\n\\[\n18\n\\]",
    "She sells 9 eggs at $2 each:\n\n$$\n9 \\times 2 = 18\n$$",
    "16 - 7 = 9.\nSo she makes 9 * 2 = $18 every day.",
    "Therefore, 9 * 2 = 18.",
    "The product of 9 and 2 is **18**.",
    "The product of 9 and 2 is 18 dollars.",
    "She starts with 16.\n\nResult: 18",
    "She starts with 16.\nThe final result is: $18$",
    "x + 2 = 20\nx = 18",
    "So, x = 18.",
    "```\n18\n```",
    "To find the answer, we need to:\n\n1. Take 7 from 16.\n2. Double it.\n\nShe makes $18.",
    "I put the final answer in \\boxed{}. She makes $18.",
    "She cannot make 17, so the answer is 18.",
    "It is not possible to sell 16, so the answer is 18.",
    r"20 minus 2 equals \boxed{18}.",
    r"So 30 minus 12 gives \boxed{18}",
    r"John does not have enough and needs \boxed{18} more dollars.",
    r"The number of eggs she does not eat equals \boxed{18}.",
    r"Neither of them ate; each has \boxed{18}",
    r"Negative temperatures occurred on \boxed{18} days",
    r"\boxed{18} is not a small number",
    r"\boxed{18}, since the wrong bill was 17",
    "She never sold more. #### 18",
    "She does not sell <answer>18</answer>",
    "#### 18 ####",
    "#### 18 ####\nI hope that it is correct.",
    "####\n18",
    "So it is \\boxed{18}\n####",
    "18 m²",
    r"\boxed{18 \text{ cm}²}",
    r"\boxed{18 \text{ cm}^2}",
    "18km",
    "18th",
    "18pm",
    r"\boxed{18k}",
    r"\boxed{18}!",
    "The answer is 18!",
]
WRONG = [
    "",
    " \n",
    "17",
    "-18",
    "−18",  # noqa: RUF001
    "18.5",
    "180",
    "1.8",
    "18/2",
    "1 18",
    "18 or 19",
    "$18 and 50 cents",
    r"\boxed{18, 19}",
    r"\boxed{}",
    r"\boxed{18",  # cut off
    r"\boxed",
    r"\boxed{18} is wrong, it is \boxed{17}",
    "#### 17\nearlier she had 18.",
    "#### ",
    "<answer>17</answer> 18",
    "The answer is 17, not 18.",
    "The answer is",
    "The answer is unknown",
    "She has 18 eggs. She sells some",
    "She has 18 eggs. She sells 9 of them.",
    "She makes 9 * 2 = 18",  # cut off, or an intermediate step
    "16 - 3 - 4 = 9\n9 * 2 = ",
    "3 + 15",
    r"\boxed{3 + 15}",
    r"\boxed{18^1}",
    r"\boxed{\infty}",
    r"\boxed{1/0}",
    "nan",
    "18.000001",
    "17.999999",
    "１８",  # noqa: RUF001
    "The answer is not 18.",
    "The answer is not equal to 18.",
    "The answer is definitely not $18.",
    "The answer is never 18.",
    "The answer isn't 18.",
    "The answer isn’t 18.",  # noqa: RUF001
    "The answer cannot be 18.",
    "The answer can't be 18!",
    "The answer is neither 9 nor 18.",
    "The answer is wrong: not 18.",
    "The answer is minus 18.",
    "The answer is negative 18.",
    "The answer is anything other than 18.",
    "The answer is less than 18.",
    "The answer is more than 18.",
    "The answer is not more than 18.",
    "The answer is greater than or equal to 18.",
    "The answer is > 18.",
    "The answer is != 18.",
    "The answer is half of 18.",
    "The answer is twice 18.",
    "The answer is the square root of 18.",
    "The answer is 18 squared.",
    "The answer is 18, which is wrong.",
    "The answer is 18 is false.",
    "The wrong answer is 18.",
    "An incorrect answer is 18.",
    "I don't think the answer is 18.",
    "I do not believe that the answer is 18.",
    "It is not true that the answer is 18.",
    "It is wrong to say that the answer is 18.",
    "Answer: not 18",
    "**Final Answer:** not 18",
    "not 18.",
    "It is not 18.",
    "She does not make 18 dollars.",
    "She doesn't make 18 dollars.",
    "So it cannot be 18!",
    "18 is not the answer.",
    "18 is wrong.",
    "18 isn't right.",
    "18 dollars is not correct.",
    r"\boxed{not 18}",
    r"\boxed{\text{not }18}",
    r"\boxed{\neq 18}",
    r"\boxed{\ne 18}",
    r"\boxed{\not= 18}",
    r"\boxed{x \neq 18}",
    r"\boxed{x != 18}",
    r"\boxed{x >= 18}",
    r"\boxed{x \geq 18}",
    r"\boxed{> 18}",
    r"\boxed{< 18}",
    r"\boxed{18 <}",
    r"\boxed{\pm 18}",
    r"\boxed{±18}",
    r"\boxed{\sqrt{18}}",
    r"\boxed{√18}",
    r"\boxed{18\pi}",
    r"\boxed{\log 18}",
    r"\boxed{\lfloor 18 \rfloor}",
    r"\boxed{minus 18}",
    r"\boxed{x = 17 \text{ or } x = 18}",
    r"\boxed{x = 17, y = 18}",
    r"The answer is not \boxed{18}.",
    r"It isn't \boxed{18}.",
    r"\boxed{18} is wrong.",
    r"\boxed{18} is not the answer.",
    "It is not #### 18",
    "#### not 18",
    "#### != 18",
    "<answer>not 18</answer>",
    "<answer>!= 18</answer>",
    "<answer>18</answer> is not the answer",
    "To find the answer, we need to:\n\n18. Count the eggs.",
    "x = 17, x = 18",
    "It is 17, or it is 18.",
    "First, 9 * 2 = 18.",
    "Then 9 * 2 = 18.",
    "1. 9 * 2 = 18.",
    "She has 3 eggs. 9 * 2 = 18",  # a step
    "9 * 2 = 18 or 19.",
    "9 * 2 = 18,",
    "The product of 9 and 2 is not 18.",
    "The product of 9 and 2 isn't 18.",
    "The product of 9 and 2 is more than 18.",
    "The product of 9 and 2 is either 17 or 18.",
    "The product of 9 and 2 is 17, and that of 9 and 3 is 18.",
    "I do not think that the product of 9 and 2 is 18.",
    "The answer is 17 or 18.",
    r"\boxed{18²}",
    r"\boxed{18 ²}",
    r"\boxed{(18)²}",
    r"\boxed{{18}³}",
    r"\boxed{18ⁿ}",
    "#### 18²",
    "The answer is 18³.",
    "18₁₂",
    r"\boxed{18π}",
    r"\boxed{18 π}",
    r"\boxed{18/π}",
    "The answer is 18π.",
    r"\boxed{18!}",
    r"\boxed{(18)!}",
    r"\boxed{18x}",
    r"\boxed{18\,\text{and } 2y}",
    "The answer is 18n.",
    r"It is not equal to \boxed{18}.",
    r"It cannot be $\boxed{18}$.",
    r"It is neither 17 nor \boxed{18}.",
    r"It is minus \boxed{18}.",
    r"It is negative $\boxed{18}$.",
    r"\boxed{18} is not correct.",
    r"\boxed{18} isn't right",
    r"\boxed{18} (wrong)",
    r"\boxed{18} is clearly wrong.",
    r"\boxed{18} cannot be right.",
    "<answer>18</answer> is incorrect.",
    "#### 17 ####",
    "The answer is not ½.",
]


@pytest.mark.parametrize("completion", RIGHT)
def test_a_right_final_answer_in_the_formats_seen_in_the_wild(completion):
    assert score(completion) == 1.0


@pytest.mark.parametrize("completion", WRONG)
def test_anything_else_gets_nothing(completion):
    assert score(completion) == 0.0


@pytest.mark.parametrize(
    ("answer", "completion", "reward"),
    [
        ("#### 1,234", "1234", 1.0),
        ("#### 1234", "1,234", 1.0),
        ("#### 1234", "1 234", 1.0),
        ("#### 1234", r"\boxed{1{,}234}", 1.0),
        ("#### 1234", r"\boxed{1\,234.00}", 1.0),
        ("#### 2,125,000", r"\$2{,}125{,}000", 1.0),
        ("#### 1234", "1,23,4", 0.0),
        ("#### 1234", "1, 234", 0.0),
        ("1/2", ".5", 1.0),
        ("0.5", "1/2", 1.0),
        ("0.5", r"\boxed{\dfrac{1}{2}}", 1.0),
        ("0.5", r"\boxed{\frac12}", 1.0),
        (r"\frac{1}{2}", "0.50", 1.0),
        ("1/3", "0.333333", 1.0),
        ("1/3", "0.33", 0.0),
        ("7/2", "3 1/2", 1.0),
        ("7/2", r"\boxed{3½}", 1.0),
        ("7/2", "3 ½", 1.0),
        ("7/2", "The answer is 3½ metres.", 1.0),
        ("#### 3", r"\boxed{3½}", 0.0),
        ("25/2", "#### 12½", 1.0),
        ("-7/2", r"\boxed{-3½}", 1.0),
        ("1/2", r"\boxed{½}", 1.0),
        ("1/2", "½ of the eggs", 1.0),
        ("1/2", "The answer is not ½.", 0.0),
        ("1/7", "⅐", 1.0),
        ("4001/4", "1,000¼", 1.0),
        ("#### 0", r"\boxed{⅟}", 0.0),
        ("7/2", r"\boxed{3\tfrac{1}{2}}", 1.0),
        ("-7/2", r"-3\frac{1}{2}", 1.0),
        ("#### 50", "50%", 1.0),
        ("0.5", "50%", 0.0),  # a percent sign is a unit
        ("#### -5", "−5", 1.0),  # noqa: RUF001
        ("#### -5", "-$5.00", 1.0),
        ("#### -5", "$-5", 1.0),
        ("#### -5", r"\boxed{- 5}", 1.0),
        ("#### -5", "5", 0.0),
        ("#### 123456789", "123456788", 0.0),
        (18, "18", 1.0),
    ],
)
def test_numbers_are_equal_whatever_their_form(answer, completion, reward):
    assert score(completion, answer) == reward


HOSTILE = {
    "tower of powers": r"\boxed{9^{9^{9^{9}}}}",
    "python powers": "9**9**9**9",
    "factorials": r"\boxed{999999999!!!}",
    "quotients": r"\boxed{" + "9/" * 40 + "9}",
    "brackets": r"\boxed{" + "(" * 5_000 + "18" + "}",
    "open braces": "{" * 100_000,
    "nested fractions": r"\frac{" * 20_000,
    "nested boxes": r"\boxed{" * 20_000,
    "open tags": "<answer>" * 20_000,
    "phrases": "answer: " * 20_000,
    "digits": "9" * 100_000,
    "groups": "1,111" * 20_000,
    "spaced digits": "1 " * 50_000,
    "minus signs": "-" * 50_000,
    "stars": "*" * 50_000,
    "words": "w " * 50_000,
    "null bytes": "\0" * 1_000_000,
    "lone surrogates": "\ud800" * 1_000_000,
    "a million digits": "#### " + "9" * 1_000_000,
    "a million boxes": r"\boxed{18 " * 100_000,
    "a million tags": "<answer></answer>" * 60_000,
    "a million phrases": "the answer is not " * 60_000,
    "a million spaces": "The answer is" + " " * 1_000_000 + "not 18.",
    "a million full stops": "." * 1_000_000,
    "denials": "The answer is " + "not " * 200_000 + "18.",
    "relations": r"\boxed{" + "<" * 500_000 + "18}",
    "an exponent": r"\boxed{1e999999999}",
    "a power of ten": "10**(10**10)",
}


@pytest.mark.parametrize("completion", HOSTILE.values(), ids=HOSTILE)
def test_hostile_completions_get_nothing_and_end(completion):
    rewards = []
    # Not in the main thread, where no signal could stop it: the reward needs no limit.
    thread = threading.Thread(target=lambda: rewards.append(score(completion)), daemon=True)
    thread.start()
    thread.join(timeout=60)  # each takes milliseconds; without care the first ones take hours
    assert rewards == [0.0]


def test_a_solution_without_a_number_is_refused():
    with pytest.raises(ValueError, match="the answer 'no number' holds no final number"):
        gsm8k_reward([""], ["18"], answer=["no number"])


def wrong_numbers(number):
    """Numbers that are not `number`, as close to it as a wrong answer gets."""
    digits = f"{abs(number)}"
    yield from (number + 1, number - 1, number * 10 + (number == 0), number + Fraction(1, 2))
    if number:
        yield from (-number, number * Fraction(1, 3), number * Fraction(99, 100), number * 100)
    for i in range(len(digits) - 1):
        swapped = int(digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :])
        if swapped != abs(number):
            yield swapped


def written(number):
    """`number` in the formats of answers."""
    fraction = Fraction(number)
    plain = str(fraction.numerator) if fraction.denominator == 1 else f"{fraction.numerator}/{fraction.denominator}"
    yield from (rf"\boxed{{{plain}}}", f"#### {plain}", f"The answer is {plain}.", f"{plain} dollars", f"**{plain}**")
    if fraction.denominator == 1:
        yield from (f"${plain}.00", f"{fraction.numerator:,}", rf"\boxed{{\${fraction.numerator:,}.00}}", f"{plain}%")
        yield rf"$\boxed{{{fraction.numerator:,}\text{{ dollars}}}}$".replace(",", "{,}")
        yield rf"\frac{{{2 * fraction.numerator}}}{{2}}" if number >= 0 else f"-{-2 * fraction.numerator}/2"
    else:
        yield rf"\boxed{{{'-' * (fraction < 0)}\frac{{{abs(fraction.numerator)}}}{{{fraction.denominator}}}}}"


@on_own_and_full
def test_every_gold_answer_is_right_and_its_perturbations_wrong(path):
    rows = read(path)
    completions, answers, expected = [], [], []
    for row in rows:
        number = int(row["answer"].rpartition("#### ")[2].replace(",", ""))
        right = [row["answer"], f"Let me think: 1 + 1 = 2.\n{row['answer']}", *written(number)]
        wrong = [text for other in wrong_numbers(number) for text in list(written(other))[:2]]
        assert len(right) >= 13 and len(wrong) >= 8  # 0 has the fewest
        completions += right + wrong
        answers += [row["answer"]] * (len(right) + len(wrong))
        expected += [1.0] * len(right) + [0.0] * len(wrong)
    rewards = gsm8k_reward([""] * len(answers), completions, answer=answers)
    missed = [c for c, reward, right in zip(completions, rewards, expected, strict=True) if reward != right]
    assert not missed and len(rows) == (1319 if path.parent == FULL else 10)


@pytest.mark.parametrize("path", [full("gsm8k_train.jsonl")])
def test_every_gold_answer_of_the_train_split_is_right(path):
    answers = [row["answer"] for row in read(path)]
    assert gsm8k_reward([""] * len(answers), answers, answer=answers) == [1.0] * 7473


@on_own_and_full
def test_a_solution_cut_off_is_hardly_ever_right(path):
    """Cut anywhere before its final answer, one solution in thousands ends in a sentence that already states it."""
    rng = random.Random(0)
    rows = read(path)
    rows *= 6595 // len(rows)
    cut = [row["answer"][: rng.randrange(row["answer"].index("\n####"))] for row in rows]
    assert sum(gsm8k_reward([""] * len(rows), cut, answer=[row["answer"] for row in rows])) < 0.002 * len(rows)


def check_task(task, train, test):
    (row,) = task.rows("test", 1, seed=0)
    assert row.keys() == {"prompt", "question", "answer"}
    assert row["prompt"].startswith(row["question"]) and r"\boxed{}" in row["prompt"]
    assert len(task.rows("train", 10**5, 0)) == train and len(task.rows("test", 10**5, 0)) == test
    assert task.reward(prompts=[row["prompt"]], completions=[row["answer"]], answer=[row["answer"]]) == [1.0]
    assert set(task.data) == {"gsm8k_train.jsonl", "gsm8k_test.jsonl"}


@pytest.mark.parametrize("path", [own("gsm8k.jsonl")])
def test_the_task_reads_a_folder(path, tmp_path):
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(lines[:7]), encoding="utf-8")
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(lines[7:]), encoding="utf-8")
    check_task(load_task(f"gsm8k:{tmp_path}"), train=7, test=3)


@pytest.mark.parametrize("path", [full("gsm8k_test.jsonl")])
def test_the_task_reads_the_data_sets_files(path):
    check_task(load_task(f"gsm8k:{path.parent}"), train=7473, test=1319)


def test_an_answer_without_a_number_is_found_when_the_data_is_loaded(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "How many?", "answer": "#### 3"}\n{"question": "How?", "answer": "by hand"}\n')
    with pytest.raises(ValueError, match=re.escape("the answer 'by hand' holds no final number")):
        load_task(f"gsm8k:{path}")


def test_the_final_answer_is_an_exact_number():
    assert final_answer("#### 1,234.50") == Fraction("1234.5")
    assert final_answer("-3 1/2") == Fraction(-7, 2)
    assert final_answer("no idea") is None
