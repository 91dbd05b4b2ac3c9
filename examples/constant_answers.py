"""Measures what every data set of reasoning_gym pays for an answer that does not look at the question, or repeats it.

    python examples/constant_answers.py                    all of them: rewrites the table of docs/tasks.md (20 minutes)
    python examples/constant_answers.py chain_sum acre     prints what these pay

A policy that finds such an answer has learnt nothing, and its reward is the baseline that training starts from. For
each data set the same 40 rows of the train split are answered by

- about 60 constants: numbers, words, brackets, NaN, and the right answers of 24 other rows;
- about 30 ways to repeat a part of the question: a line, a paragraph, what stands behind a colon, its numbers.

What is reported is the best of each, so that it is a little more than the same answer would earn on other rows.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from peft_onelayer.tasks import load_task
from peft_onelayer.tasks.reasoning_gym import from_text

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
START, END = "<!-- constant_answers.py: -->", "<!-- :constant_answers.py -->"
ROWS, OTHERS = 40, 24
SHOWN = 0.3

MOVES = "".join(f"{piece}{way}{steps}" for piece in "ABCDEFGHIJKL" for way in "+-" for steps in (1, 2, 4))
WORDS = [
    *("", "0", "1", "2", "3", "4", "5", "6", "8", "10", "12", "24", "100", "-1", "0.5", "0.0", "1/2", "True", "False"),
    *("Yes", "No", "None", "A", "B", "x", "C", "0*x + C", "?", "nan", "NaN", "inf", "-inf", "1e999", "6*4*1*1"),
    *("[]", "{}", "[[]]", "[{}]", '""', "[NaN]", "[0, 0, 0]", "0 0 0", "up", "(P ∧ Q)", MOVES * 20, "LURD" * 50),
    *(str([["nan"] * 4]), str(["nan"] * 4), str(["nan"] * 5), str([[0] * 10] * 10)),
]


def lines(question: str) -> list[str]:
    return [line for line in question.splitlines() if line.strip()]


def paragraphs(question: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", question) if part.strip()]


def nth(parts: Callable[[str], list[str]], n: int) -> Callable[[str], str]:
    def part(question: str) -> str:
        found = parts(question)
        return found[n] if -len(found) <= n < len(found) else ""

    return part


def numbers(question: str) -> list[str]:
    return re.findall(r"-?[0-9]+(?:\.[0-9]+)?", question)


ECHOES: dict[str, Callable[[str], str]] = {
    "the question": lambda question: question,
    **{f"its line {n}": nth(lines, n) for n in (*range(-8, 0), *range(6))},
    **{f"its paragraph {n}": nth(paragraphs, n) for n in (-3, -2, -1, 0, 1)},
    "what follows its last colon": lambda question: question.rpartition(":")[2],
    "what follows its first colon": lambda question: nth(lines, 0)(question.partition(":")[2]),
    "what it quotes first": nth(lambda question: re.findall(r"[\"'`](.+?)[\"'`]", question), 0),
    "what it quotes last": nth(lambda question: re.findall(r"[\"'`](.+?)[\"'`]", question), -1),
    "its last word": lambda question: re.findall(r"\w+", question)[-1],
    "its first number": nth(numbers, 0),
    "its last number": nth(numbers, -1),
    "its largest number": lambda question: max(numbers(question) or [""], key=lambda n: float(n or 0)),
    "its numbers": lambda question: ", ".join(numbers(question)),
}


def right_answer(row: dict[str, Any]) -> str:
    """Return the row's answer, or the example that its entry has in place of one."""
    if row["answer"] is not None:
        return str(row["answer"])
    metadata = from_text(row["entry"])["metadata"]
    keys = ("example_answer", "possible_answer", "example_correct_answer")
    example = next((metadata[key] for key in keys if key in metadata), "")
    return example if isinstance(example, str) else json.dumps(example)


def constants(others: Sequence[str]) -> dict[str, str]:
    """Return the constants to try, by how they are shown; the commonest right answer first."""
    common = [answer for answer, _ in Counter(others).most_common()]
    together = [" ".join(sorted(set(others)))] if len(set(others)) <= 8 else []
    return {answer: answer for answer in [*common, *together, *WORDS]}


def measure(name: str) -> tuple[float, str, float, str]:
    """Return what the best constant earns on a data set, that constant, what the best echo earns, and that echo."""
    task = load_task(f"reasoning_gym:{name}")
    rows = task.rows("train", ROWS, 0)
    known = {row["question"] for row in rows}
    others = [right_answer(row) for row in task.rows("train", OTHERS, 1) if row["question"] not in known]
    fixed = constants(others)
    answers = [
        *([text] * len(rows) for text in fixed),
        *([echo(row["question"]) for row in rows] for echo in ECHOES.values()),
    ]
    flat = [answer for each in answers for answer in each]
    columns = {key: [row[key] for row in rows] * len(answers) for key in ("dataset", "entry")}
    rewards = task.reward([""] * len(flat), [f"<answer>{answer}</answer>" for answer in flat], **columns)
    means = [fmean(rewards[i : i + len(rows)]) for i in range(0, len(flat), len(rows))]
    constant = max(range(len(fixed)), key=means.__getitem__)
    echo = max(range(len(fixed), len(means)), key=means.__getitem__)
    return means[constant], list(fixed)[constant], means[echo], list(ECHOES)[echo - len(fixed)]


def line(name: str, measured: tuple[float, str, float, str]) -> str:
    """Return the table's line of a data set."""
    mean, constant, echoed, echo = measured
    text = " ".join(constant.split()).replace("`", "'").replace("|", "\\|")
    text = text if len(text) <= 30 else f"{text[:27]}..."
    shown = f"`{text}`" if text else "nothing"
    return f"| `{name}` | {mean:.2f} | {shown} | {echoed:.2f} | {echo} |"


def page(lines: Sequence[str]) -> str:
    """Return docs/tasks.md with the table made of `lines`."""
    head = ["| data set | constant | which | echo | of what |", "|---|---|---|---|---|"]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n{chr(10).join([*head, *lines])}\n{END}{after}"


def main(names: Sequence[str]) -> None:
    from reasoning_gym.factory import DATASETS

    shown = []
    for name in names or sorted(set(DATASETS) - {"composite"}):  # which has no defaults
        measured = measure(name)
        print(line(name, measured), flush=True)
        if max(measured[0], measured[2]) > SHOWN:
            shown.append(line(name, measured))
    if not names:
        PAGE.write_text(page(shown), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
