r"""Grade-school word problems, GSM8K (arXiv 2110.14168): the Hub's openai/gsm8k or a local copy of its JSONL files.

    {"prompt": "Janet's ducks lay 16 eggs per day. ... How much in dollars does she make every day ...?\n\n"
               "Reason step by step, and put the final answer in \\boxed{}.",
     "question": "Janet's ducks lay 16 eggs per day. ...",
     "answer": "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 ...\n#### 18"}

A final answer is one number: an integer, a decimal, a fraction or a mixed number, with or without currency, unit,
percent sign (50% is 50), thousands separators and markup. Two numbers, or an expression left to be evaluated such as
3 + 15 or 9^9, are no final answer. math-verify compares the numbers and is never given anything else: nested powers,
quotients or brackets keep it busy for minutes, and its own time limit (signal.alarm) works in the main thread only.
Hence the reward needs no time limit, and any thread may call it.

Neither the reasoning nor the unit is graded: "18 thousand" is 18.
"""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from peft_onelayer.tasks import Task, completion_text
from peft_onelayer.tasks.files import load_problems

HUB = "openai/gsm8k:main"
MAX_COMPLETION_TOKENS = 512
INSTRUCTION = "Reason step by step, and put the final answer in \\boxed{}."

# Without its time limits math-verify warns that these are then the caller's business; see above.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_ANSWER_PHRASE = re.compile(r"\banswer\b[^\n.:=]{0,80}?(?:\bis\b|[:=])[\s:*_]*", re.IGNORECASE)
_PHRASE_END = re.compile(r"[.!;](?=\s|$)|, | \(|\n| because\b| since\b")

_LONGEST = 400  # characters of a final answer with its sentence
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")
_STARTS_AS_NUMBER = re.compile(r"\W*(?:US\$\W*)?(?:[0-9]|[dtc]?frac\b)")

_CHARACTERS = str.maketrans(
    dict.fromkeys("−–—‐‑﹣－", "-")  # noqa: RUF001
    | dict.fromkeys("\u00a0\u2009\u202f~()[]{}<>|#_`\"'", " ")
    | dict.fromkeys("$€£¥₹¢%", "")
    | {"，": ",", "⁄": "/"}  # noqa: RUF001
)
_DIGITS = "[0-9]{1,40}"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]{{0,40}})?|\.{_DIGITS})"
_FRACTION = re.compile(rf"\\[dtc]?frac\s*(?:([0-9])([0-9])|\{{\s*({_DECIMAL})\s*\}}\s*\{{\s*({_DECIMAL})\s*\}})")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:[, ][0-9]{3})+(?![0-9])")
_AROUND = "[w,;:!?. -]*"  # words, each of them replaced by a w, and punctuation
_ONE_NUMBER = re.compile(
    rf"{_AROUND}?(?P<sign>[-+]?) ?(?:(?:(?P<whole>{_DIGITS}) )?(?P<top>{_DECIMAL}) ?/ ?(?P<bottom>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL}))/?{_AROUND}"
)


def gsm8k_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **kwargs: Any
) -> list[float]:
    r"""Reward 1.0 for a completion whose final answer equals the data set's and 0.0 for any other, in TRL's signature.

    The final answer is the number in the last of `\boxed{...}`, `<answer>...</answer>` and `#### ...`; without any of
    these, the one that follows the last "answer is" or "answer:"; without that, the single number of the last sentence,
    when that sentence is complete ("So she makes $18.") or begins with the number ("18 dollars"). Other numbers of the
    reasoning never count, so that a completion cut off before its final answer gets 0. Numbers are equal when they
    agree to 6 decimals (`math_verify.verify`).

    Args:
        prompts: not used.
        completions: strings or chat lists.
        answer: the data set's column: a solution that ends in "#### 18", or just the number.
        kwargs: the other columns and what the trainer adds; not used.

    Raises:
        ValueError: for an `answer` that holds no number.

    >>> completions = [r"16 - 7 = 9, times 2 is \boxed{\$18.00}", "9 * 2 = 18\n#### 18", "18 dollars", "9 * 2 = 18,"]
    >>> gsm8k_reward([""] * 4, completions, answer=["She makes 9 * 2 = $<<9*2=18>>18.\n#### 18"] * 4)
    [1.0, 1.0, 1.0, 0.0]
    """
    return [
        float(_equal(_gold(str(expected)), final_answer(completion_text(completion))))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def final_answer(text: str) -> str | None:
    r"""Return the final answer of a completion or a solution as LaTeX, None where there is none.

    >>> final_answer(r"The answer is -3\frac{1}{2} metres."), final_answer(r"So it is \boxed{1{,}234}, not 12.")
    ('-(3+\\frac{1}{2})', '1234')
    """
    text = text.replace("\\fbox", "\\boxed")
    boxed = text.rfind("\\boxed")
    tag_end = text.rfind("</answer>")
    tag = text.rfind("<answer>", 0, max(tag_end, 0))
    hashes = text.rfind("####")
    last = max(boxed, tag, hashes)
    if last < 0:
        phrases = list(_ANSWER_PHRASE.finditer(text))
        if phrases:
            return _one_number(_PHRASE_END.split(text[phrases[-1].end() :], maxsplit=1)[0].rpartition("=")[2])
        sentence = _SENTENCE_END.split(text.strip())[-1]
        return _one_number(sentence) if sentence.endswith((".", "!")) or _STARTS_AS_NUMBER.match(sentence) else None
    if last == boxed:
        marked = _in_braces(text[boxed + len("\\boxed") :].lstrip())
    elif last == tag:
        marked = text[tag + len("<answer>") : tag_end]
    else:
        marked = text[hashes:].lstrip("#").lstrip().partition("\n")[0]
    return _one_number(marked.rpartition("=")[2])


def _in_braces(text: str) -> str:
    """Return what stands between the brace that opens `text` and the one that closes it, "" where it is not closed."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:position]
    return ""


def _one_number(text: str) -> str | None:
    """Return the number that `text` states as LaTeX, None where it states none, several, or anything else."""
    if len(text) > _LONGEST:
        return None
    text = text.replace("{,}", ",").replace("\\!", "")
    text = _FRACTION.sub(lambda match: " {}/{}".format(*filter(None, match.groups())), text)
    text = re.sub(r"\^\s*\{?\\circ\}?|(?<=[A-Za-z])\}?\s*\^\s*\{?[0-9]\}?", " ", text)  # degrees, and m^2
    text = re.sub(r"\\[$%]", "", text)
    text = re.sub(r"\\(?:[A-Za-z]+|.)", " ", text).translate(_CHARACTERS)
    text = re.sub(r"\*+(?![0-9])|(?<![0-9])\*+", " ", text)  # bold; but 9**9 stays as it is
    text = re.sub(r"[^\W\d_]+", " w ", text)
    text = " ".join(_THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text.strip()).split())
    match = _ONE_NUMBER.fullmatch(text)
    if match is None:
        return None
    sign = match["sign"].replace("+", "")
    if match["decimal"]:
        return sign + match["decimal"].removesuffix(".")
    fraction = rf"\frac{{{match['top']}}}{{{match['bottom']}}}"
    return sign + (f"({match['whole']}+{fraction})" if match["whole"] else fraction)


@lru_cache(maxsize=16_384)
def _gold(answer: str) -> str:
    number = final_answer(answer)
    if number is None:
        raise ValueError(f"the answer {answer[-60:]!r} holds no final number; expected '#### 18', or just '18'")
    return number


@lru_cache(maxsize=16_384)
def _equal(gold: str, number: str | None) -> bool:
    if number is None:
        return False
    config = [LatexExtractionConfig()]
    expressions = [parse(f"${one}$", config, parsing_timeout=None) for one in (gold, number)]
    return verify(*expressions, timeout_seconds=None)


def load(argument: str = "") -> Task:
    """Return the task on `argument`: a local JSONL file or folder, a Hub data set, or "" for openai/gsm8k.

    Raises:
        ValueError: for data that is not there, without the columns question and answer, or without a number as answer.
    """
    problems = load_problems(argument or HUB, columns=("question", "answer"))
    for row in (row for split in problems.splits.values() for row in split):
        _gold(str(row["answer"]))

    def rows(split: str, n: int, seed: int) -> list[dict[str, Any]]:
        return [
            {"prompt": f"{row['question']}\n\n{INSTRUCTION}", "question": row["question"], "answer": row["answer"]}
            for row in problems.rows(split, n, seed)
        ]

    name = f"gsm8k:{argument}" if argument else "gsm8k"
    return Task(name, rows, gsm8k_reward, MAX_COMPLETION_TOKENS, data=problems.data, train_size=problems.train_size)
