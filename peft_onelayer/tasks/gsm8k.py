r"""Grade-school word problems, GSM8K (arXiv 2110.14168): the Hub's openai/gsm8k or a local copy of its JSONL files.

    {"prompt": "Janet's ducks lay 16 eggs per day. ... How much in dollars does she make every day ...?\n\n"
               "Reason step by step, and put the final answer in \\boxed{}.",
     "question": "Janet's ducks lay 16 eggs per day. ...",
     "answer": "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 ...\n#### 18"}

A final answer is one number: an integer, a decimal, a fraction or a mixed number, with or without currency, unit,
percent sign (50% is 50), thousands separators and markup. Two numbers, an expression left to be evaluated such as
3 + 15, 9^9, 5², 5! in a box, 5π, 5x or \sqrt{324}, and a number that is denied or bounded ("not 18", "18 is wrong",
"more than 18", "x > 18") are no final answer. What is denied is read off the words around the number, around a box, a
tag or #### only off those that touch it ("not \boxed{18}", "\boxed{18} is wrong"); no reader of words is perfect, so
leave the box to the number.

Numbers are compared exactly, as fractions. The time that an answer takes grows with its length and nothing else, so
that the reward needs no limit, and any thread may call it.

Neither the reasoning nor the unit is graded: "18 thousand" is 18.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from peft_onelayer.tasks import Shown, Task, answer_text, behind_thinking
from peft_onelayer.tasks.files import load_problems

HUB = "openai/gsm8k:main"
MAX_COMPLETION_TOKENS = 512
INSTRUCTION = "Reason step by step, and put the final answer in \\boxed{}."

ANSWER_PHRASE = re.compile(r"\banswer\b[^\n.:=]{0,80}?(?:\bis\b|[:=])[\s:*_]*", re.IGNORECASE)
_PHRASE_END = re.compile(r"[.!;](?=\s|$)|, | \(|\n| because\b| since\b")

_LIST_ITEM = re.compile(r"[0-9]{1,3}[.)][ \t]+\S")

_LONGEST = 400  # characters of a final answer with its sentence
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")
_STARTS_AS_NUMBER = re.compile(r"\W*(?:US\$\W*)?(?:[0-9]|[dtc]?frac\b)")
_COMPLETE = re.compile(r"(?:[.!]|\\\]|\$|\\\)|\*\*)[*_`]*$")  # a full stop, closed mathematics, closed bold
# "x = ", "Result: ", "The final result is "
LABEL = re.compile(
    r"\W*(?:(?:the|final|correct|total|so|thus|therefore|hence)\W+)*(?:result|solution|output|total|sum|value|[a-z])\b"
    r"[^\w=:]*(?:[=:]|\bis\b)",
    re.IGNORECASE,
)
# What leads to the number of a sentence that holds others: "The sum of 3 and 4 is 7.", "So 3 + 4 = 7."
_LEADS = re.compile(
    r"\b(?:is|are|was|were|be|equals?|equal\s+to)\b(?:\s+(?:exactly|just|only|equal\s+to|a\s+total\s+of))?:?|[=:]"
)
_EQUATION = re.compile(r"(?:\\[A-Za-z]+|[-+*/^().0-9\s$={}×÷]|,(?=[0-9])|\b[A-Za-z]\b)*$")  # noqa: RUF001
_STEP = re.compile(
    r"\W*(?:first(?:ly)?|second(?:ly)?|third(?:ly)?|next|then|now|step|start|initially|let|if|suppose|for|after|since"
    r"|because|assume)\b|\W*[0-9]+[.)]\s",
    re.IGNORECASE,
)
_CONCLUDES = re.compile(
    r"\W*(?:so|thus|hence|therefore|finally|overall|altogether|in\s+(?:total|all|conclusion|summary)|as\s+a\s+result"
    r"|this\s+(?:means|gives)|we\s+(?:get|have))\b",
    re.IGNORECASE,
)
_DISPLAYED = re.compile(r"\\\[((?:[^\\]|\\[^\[\]]){0,400})\\\]|\$\$([^$]{0,400})\$\$")
_FENCE_LINE = re.compile(r"^[ \t]*```\w*[ \t]*$\n?", re.MULTILINE)

_NOT = r"(?:\b(?:not|never|cannot|neither|nor)\b|n['’]t\b)"  # noqa: RUF001
_FALSE = r"\b(?:wrong|false|incorrect|untrue|impossible)\b"
# In a box of its own nothing but the number is expected.
_DENIAL = re.compile(rf"{_NOT}|{_FALSE}|\b(?:except|minus|negative)\b", re.IGNORECASE)
# "not \boxed{18}", "cannot be equal to \boxed{18}", "minus \boxed{18}", but "does not need more: \boxed{18}"
_DENIED_MARK = re.compile(
    rf"(?:{_NOT}|\b(?:minus|negative)\b)(?:\s+(?:be|equals?|to|exactly|just|actually|really|definitely))*[\s$*_(\\\[]*$",
    re.IGNORECASE,
)
# "not 18", "does not make 18"; "I do not think that it is 18"; "the wrong answer is 18";
# but "those who do not pay are 18"
_DENIED_BEFORE = re.compile(
    rf"(?:{_NOT}|{_FALSE}|\b(?:minus|negative)\b)(?!.*(?:\b(?:is|are|was|were)\b|[=:,]))"
    rf"|{_NOT}\s+(?:think|believe|say|claim|agree|accept|mean|sure|true|correct|right|certain|possible|the case)\b"
    rf"|{_FALSE}\s+(?:that|to|(?:final\s+)?(?:answer|result|solution))\b",
    re.IGNORECASE,
)
_NOT_IT = (
    rf"{_NOT}\s+(?:(?:the|a|my|be|final|correct|right|true)\s+)*"
    r"(?:answer|correct|right|true|it|result|solution|case|what|so)\b"
)
# "\boxed{18} is not the answer", "\boxed{18} is wrong", but "\boxed{18} is not much", "he got \boxed{18} wrong"
_MARK_DENIED = re.compile(
    rf"[^\w.!?]*(?:\w{{0,6}}\s?{_NOT_IT}|(?:(?:is|was|seems|looks|be)\W+(?:[a-z]+\s+)?|\(\s*){_FALSE})", re.IGNORECASE
)
# "18 is not the answer", "18 dollars is wrong", but "18 eggs are not broken", "he got 18 wrong"
_DENIED_BEHIND = re.compile(
    rf"^\W*(?:is|was|are|were|would|can|could|does|do)?\s?{_NOT}(?!\s*[0-9])"
    rf"|{_NOT_IT}"
    rf"|(?:\b(?:is|are|was|be|seems|looks|'s)|^)\W+(?:[A-Za-z]+\s+)?{_FALSE}",
    re.IGNORECASE,
)
# "It is not possible to sell 17, so the answer is 18"
_SO = re.compile(r"(?<!not )\b(?:so|thus|hence|therefore)\b", re.IGNORECASE)
# What makes another number of the one that follows, or only bounds it.
_OTHER_NUMBER = re.compile(
    r"\b(?:(?:more|less|fewer|greater|larger|smaller|higher|lower|bigger|other|rather|different)\s+(?:than|from)"
    r"(?:\s+or\s+equal\s+to)?|over|under|above|below"
    r"|(?:half|twice|double|triple|thrice|squared?|cubed?|root|sqrt|log|ln|third|quarter|tenth)(?:\s+of)?)[^\w]*[0-9]"
    r"|[0-9][^\w]*(?:squared|cubed|factorial)\b",
    re.IGNORECASE,
)
_RELATION = re.compile(r"[<>≠≤≥≮≯]|!=|\\(?:n?leq?|n?geq?|neq?|not|lt|gt|ll|gg)(?![A-Za-z])")
_ARROW = re.compile(r"[-=]+>|</?[A-Za-z][^<>]*>")  # and tags
_SEVERAL = re.compile(r"\b(?:or|and)\b|[,;]\s")
# LaTeX that writes a number or its unit, and does not change it as \sqrt and \pi do.
_TYPESETTING = re.compile(
    r"text\w*|math(?:rm|bf|it|sf|tt|bb)|boldsymbol|bm|bf|rm|it|tt|emph|underline|f?boxed|[fmh]box|operatorname|left|right"
    r"|[bB]ig[lr]?|displaystyle|[lL]arge|huge|normalsize|small|q?quad|hspace|circ|degrees?|dollar|pounds|euro|cents"
    r"|approx|therefore|implies|[rR]ightarrow|to|l?dots|newline|par|noindent"
)

_VULGAR = {ord(one): " " + unicodedata.normalize("NFKC", one).replace("\u2044", "/") for one in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"}
# What stands behind a digit, brackets or spaces between them, and may be a power or belong to the number: 5², 5₂.
_BEHIND_DIGIT = re.compile(r"[0-9][)\]}\s]*([^\W\d_])")
_TIMES = re.compile(r"[0-9][nxyz](?![A-Za-z])|π")
_FACTORIAL = re.compile(r"[0-9)\]}]\s*!")
# The last #### with something behind it: the one that closes a line, as that of a heading may, marks nothing.
_HASHES = re.compile(r"^[^\S\n]*+####++\s*+(?=[^\s#])|(?<!#)####++[^\S\n]*+(?=[^\s#])", re.MULTILINE)

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
    reasoning never count, nor does what stands before </think>, so that a completion cut off before its final answer
    gets 0. Numbers are equal when they differ by less than a millionth: 18.0000001 is 18, and .333333 is 1/3.

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
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        number = final_answer(answer_text(completion))
        rewards.append(float(number is not None and abs(number - _gold(str(expected))) < Fraction(1, 10**6)))
    return rewards


def final_answer(text: str) -> Fraction | None:
    r"""Return the final answer of a completion or a solution, None where there is none.

    >>> final_answer(r"The answer is -3\frac{1}{2} metres."), final_answer(r"So it is \boxed{1{,}234}, not 12.")
    (Fraction(-7, 2), Fraction(1234, 1))
    >>> final_answer("The answer is not 18."), final_answer(r"\boxed{18 or 19}"), final_answer(r"\boxed{\sqrt{324}}")
    (None, None, None)
    """
    text = marked_alike(text.translate(_VULGAR))
    boxed = text.rfind("\\boxed")
    tag_end = text.rfind("</answer>")
    tag = text.rfind("<answer>", 0, max(tag_end, 0))
    hashes = list(_HASHES.finditer(text))
    last = max(boxed, tag, hashes[-1].start() if hashes else -1)
    if last < 0:
        return _in_words(on_few_lines(text))
    if last == boxed:
        opening = len(text) - len(text[boxed + len("\\boxed") :].lstrip())
        marked = in_braces(text[opening:])
        end = opening + len(marked) + 2
        if _FACTORIAL.search(marked.replace("\\!", "")):
            return None
    elif last == tag:
        marked, end = text[tag + len("<answer>") : tag_end], tag_end + len("</answer>")
    else:
        marked = text[hashes[-1].end() :].partition("\n")[0]
        end = len(text)
    if len(marked) > _LONGEST or _DENIAL.search(marked):
        return None
    before = text[max(last - _LONGEST, 0) : last].rpartition("\n")[2]
    if _DENIED_MARK.search(before) or _MARK_DENIED.match(text[end : end + _LONGEST].partition("\n")[0]):
        return None
    return _one_number(_result(marked))


def marked_alike(text: str) -> str:
    r"""Return the text with boxes and tags written in one way, and without those that only repeat what a prompt asks.

    >>> marked_alike(r"The answer comes between <answer> and </answer>: <Answer>7</ANSWER>, or \fbox{7} for \boxed{}.")
    'The answer comes between  : <answer>7</answer>, or \\boxed{7} for .'
    """
    text = re.sub(r"<(/?)answer>", r"<\1answer>", text, flags=re.IGNORECASE | re.ASCII)
    text = text.replace("\\fbox", "\\boxed").replace("\\boxed{}", "")
    return text.replace("<answer> and </answer>", " ").replace("`<answer>` and `</answer>`", " ")


def on_few_lines(text: str) -> str:
    r"""Return the text with displayed mathematics on one line, and without the fences of what stands in a block.

    >>> on_few_lines("It is\n\\[\n7\n\\]\n```\n7\n```")
    'It is\n\\[ 7 \\]\n7'
    """
    text = _DISPLAYED.sub(lambda match: " ".join(match[0].split()), text)
    return _FENCE_LINE.sub("", text).strip()


def phrase_end(text: str) -> int | None:
    """Return where the text goes on behind its last "answer is" or "answer:", None where it has none.

    A list that "to find the answer, we have to:" begins is no answer.
    """
    for match in reversed(list(ANSWER_PHRASE.finditer(text))):
        if "\n" not in match[0] or not _LIST_ITEM.match(text, match.end()):
            return match.end()
    return None


def last_sentence(text: str) -> str:
    """Return the last sentence of a text that ends without white space, or its last line if that is no sentence."""
    return _SENTENCE_END.split(text[-2 * _LONGEST :])[-1]


def is_denied(text: str, start: int, clause: str) -> bool:
    """Whether the words around the clause at `start` deny what it states."""
    return _denies(text[max(start - _LONGEST, 0) : start], text[start + len(clause) :])


def clause_at(text: str, start: int) -> str:
    """Return what stands at `start` up to where its clause ends."""
    return _PHRASE_END.split(text[start : start + _LONGEST + 1], maxsplit=1)[0]


def _in_words(text: str) -> Fraction | None:
    """The final answer of a text without a box, a tag or ####."""
    start, sentence = phrase_end(text), last_sentence(text)
    if start is not None:
        clause = clause_at(text, start)
        number = None if _number_is_denied(text, start, clause) else _one_number(_result(clause))
        if (
            number is not None
            or _number_is_denied(text, start, clause)
            or len(text) - len(sentence) < start + len(clause)
        ):
            return number
    if not (_COMPLETE.search(sentence) or _STARTS_AS_NUMBER.match(sentence) or LABEL.match(sentence)):
        return None
    if _number_is_denied(text, len(text) - len(sentence), sentence):
        return None
    number = _one_number(sentence)
    return _concluded(sentence, alone=sentence == text) if number is None else number


def _concluded(sentence: str, *, alone: bool) -> Fraction | None:
    """The number at the end of a last sentence that holds others too, None where it may be one of several or a step."""
    leads = list(_LEADS.finditer(sentence[: _LONGEST + 1]))
    if not leads or sentence.endswith((",", ";", ":")) or _STEP.match(sentence):
        return None
    before, stated = sentence[: leads[-1].start()], sentence[leads[-1].end() :]
    if leads[-1][0] == "=":
        displayed = sentence.endswith(("\\]", "$$"))
        if not (alone or displayed or _CONCLUDES.match(sentence) or LABEL.match(sentence)):
            return None
        before = _EQUATION.sub("", before)
    elsewhere = any(_STARTS_AS_NUMBER.match(before, lead.end()) for lead in _LEADS.finditer(before))
    if elsewhere or re.search(r"\b(?:either|or)\b", sentence) or not _STARTS_AS_NUMBER.match(stated):
        return None
    return _one_number(stated)


def _number_is_denied(text: str, start: int, clause: str) -> bool:
    """Whether the sentence around the clause at `start`, or the clause itself, denies the clause's first number."""
    number = re.search(r"[0-9][0-9.,/ ]*", clause)
    if number is None or len(clause) > _LONGEST:
        return False  # there is none
    before = text[max(start - _LONGEST, 0) : start] + clause[: number.start()]
    return _denies(before, text[start + number.end() : start + number.end() + _LONGEST])


def _denies(before: str, behind: str) -> bool:
    """Whether a number is denied by what stands before it in its sentence or behind it."""
    before = _SO.split(_SENTENCE_END.split(before)[-1])[-1]
    behind = _SENTENCE_END.split(behind[:_LONGEST])[0]
    return bool(_DENIED_BEFORE.search(before) or _DENIED_BEHIND.search(behind))


def _result(text: str) -> str:
    """Return what stands behind the last "=" of one equation; all of the text where it is none, or holds several."""
    text = _ARROW.sub(" ", text)
    before, equals, result = text.rpartition("=")
    return text if not equals or _RELATION.search(text) or _SEVERAL.search(before) else result


def in_braces(text: str) -> str:
    """Return what stands between the brace that opens `text` and the one that closes it, "" where it is not closed."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:position]
    return ""


def _one_number(text: str) -> Fraction | None:
    """Return the number that `text` states, None where it states none, several, or anything else."""
    if len(text) > _LONGEST:
        return None
    text = re.sub(r"<([^<>]*)>", r" \1 ", _ARROW.sub(" ", text)).replace("{,}", ",").replace("\\!", "")
    text = _FRACTION.sub(lambda match: " {}/{}".format(*filter(None, match.groups())), text)
    if _RELATION.search(text) or _OTHER_NUMBER.search(text) or _TIMES.search(text):
        return None
    if any(match[1].isnumeric() or match[1] == "ⁿ" for match in _BEHIND_DIGIT.finditer(text)):
        return None
    if not all(_TYPESETTING.fullmatch(command) for command in re.findall(r"\\([A-Za-z]+)", text)):
        return None
    text = re.sub(r"\^\s*\{?\\circ\}?|(?<=[A-Za-z])\}?\s*\^\s*\{?[0-9]\}?", " ", text)  # degrees, and m^2
    text = re.sub(r"\\[$%]", "", text)
    text = re.sub(r"\\(?:[A-Za-z]+|.)", " ", text).translate(_CHARACTERS)
    text = re.sub(r"\*+(?![0-9])|(?<![0-9])\*+", " ", text)  # bold; but 9**9 stays as it is
    text = re.sub(r"[^\W\d_]+", " w ", text)
    text = " ".join(_THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text.strip()).split())
    match = _ONE_NUMBER.fullmatch(text)
    if match is None:
        return None
    number = Fraction(match["decimal"] or match["top"])
    if match["bottom"]:
        if not (bottom := Fraction(match["bottom"])):
            return None
        number = Fraction(match["whole"] or 0) + number / bottom
    return -number if match["sign"] == "-" else number


@lru_cache(maxsize=16_384)
def _gold(answer: str) -> Fraction:
    number = final_answer(answer)
    if number is None:
        raise ValueError(f"the answer {answer[-60:]!r} holds no final number; expected '#### 18', or just '18'")
    return number


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

    return Task(
        f"gsm8k:{argument}" if argument else "gsm8k",
        rows,
        gsm8k_reward,
        MAX_COMPLETION_TOKENS,
        data=problems.data,
        answer=extract_answer,
        train_size=problems.train_size,
        # plain: as EleutherAI's lm-evaluation-harness shows them
        shown=Shown(
            question=lambda row: f"Question: {row['question']}\nAnswer:",
            solution=lambda row: f" {row['answer']}",
            message=_message,
            end="\nQuestion:",
        ),
    )


def extract_answer(text: str) -> str | None:
    r"""Return the final answer of a completion as a whole number or a fraction, None where there is none.

    >>> extract_answer("<think>17?</think>It is \\boxed{18.50}"), extract_answer("<think>It is 18.")
    ('37/2', None)
    """
    number = final_answer(behind_thinking(text))
    return None if number is None else str(number)


def _message(row: Mapping[str, Any]) -> str:
    """The data set's solution without the marks of its calculator, the final answer in a box as the prompt asks."""
    reasoning, _, number = re.sub(r"<<[^<>]*>>", "", str(row["answer"])).rpartition("####")
    return f"{reasoning.strip()}\n\\boxed{{{number.strip()}}}".strip()
