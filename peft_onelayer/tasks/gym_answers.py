r"""Which answers reasoning_gym's scorers may see: what cannot run as Python, and what they do not pay for nothing.

The library evaluates some answers as Python (`EVALUATED`) or with sympy (`FORMULAS`), which evaluates Python too. The
first may only be literals (`reasoning_gym.py` sees to it), the second only formulas.

Some scorers of reasoning_gym 0.1.25 pay in full for what is no right answer. Those are refused here:

    coin_flip                  "0", "0.3": the beginning of a probability
    complex_arithmetic         "nan"
    countdown, puzzle24        other numbers than the given ones, //, a value that is only near
    fraction_simplification    a fraction that is denied, or one of several; gsm_symbolic likewise
    game_of_life_halting       any text
    integration                the integral of the question, not carried out
    number_sorting             "nan" in place of every number
    polynomial_equations       any text, where there is no solution
    polynomial_multiplication  the product of the question, where sympy multiplies it out by itself
    propositional_logic        a premise once more
    rush_hour                  moves of any length, each step of which takes time
"""

import ast
import decimal
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from peft_onelayer.tasks.gsm8k import (
    LABEL,
    clause_at,
    final_answer,
    in_braces,
    is_denied,
    last_sentence,
    on_few_lines,
    phrase_end,
)

EVALUATED = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
INTEGRALS = ("intermediate_integration", "simple_integration")
ARITHMETIC = ("countdown", "puzzle24")
FORMULAS = (*INTEGRALS, "polynomial_multiplication", *ARITHMETIC)

# Data sets whose answers are whole numbers, other numbers, or single words: they need no tags.
WHOLE_NUMBERS = (
    "aiw", "basic_arithmetic", "binary_alternation", "chain_sum", "circuit_logic", "count_bits", "count_primes", "gcd",
    "largest_island", "lcm", "leg_counting", "letter_counting", "maze", "number_sequence", "products",
    "rectangle_count", "rotten_oranges", "self_reference", "simple_equations", "simple_geometry",
)  # fmt: skip
NUMBERS = ("decimal_arithmetic", "decimal_chain_sum", "gsm_symbolic", "number_format")
WORDS = (
    "acre", "base_conversion", "bf", "bitwise_arithmetic", "calendar_arithmetic", "color_cube_rotation",
    "course_schedule", "dice", "family_relationships", "figlet_font", "game_of_life_halting", "isomorphic_strings",
    "mahjong_puzzle", "needle_haystack", "palindrome_generation", "power_function", "ransom_note", "spell_backward",
    "string_insertion", "string_manipulation", "syllogism", "tsumego", "zebra_puzzles",
)  # fmt: skip
UNTAGGED = (*WHOLE_NUMBERS, *NUMBERS, *WORDS)

LONGEST = 20_000  # characters of an answer; the library's own have up to 5,000

_ARITHMETIC = re.compile(r"(?:[0-9+\-() ]|(?<!\*)\*(?!\*)|(?<!/)/(?!/)){1,300}")
_FUNCTIONS = "sin|cos|tan|exp|log|ln|sqrt|asin|acos|atan|sinh|cosh|tanh|pi"
_POWER = (
    r"(?:(?<=[A-Za-z])\*\*(?:-?[0-9]{1,2}|\(-?[0-9]{1,2}(?:/[0-9])?\))"
    r"|(?<=\))\*\*(?:-?[0-9]|\(-?[0-9](?:/[0-9])?\)))(?![0-9])"
)
_FORMULA = re.compile(
    rf"(?:[0-9+\-/(), ]|(?<=[0-9])\.(?=[0-9])|(?<!\*)\*(?!\*)|{_POWER}"
    # A letter behind a digit would make 1e999999999.
    rf"|(?<![A-Za-z0-9])(?:{_FUNCTIONS}|[A-Za-z])(?![A-Za-z])){{1,600}}"
)
_NUMBER = r"[-+]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][-+]?[0-9]{1,3})?"
_COMPLEX = re.compile(r"[-+0-9.eEiIjJ() \t]{1,200}")  # without the letters of "nan" and "inf"
_NUMBERS = re.compile(rf"\s*(?:{_NUMBER}\s*(?:,\s*{_NUMBER}\s*)*|\"\"|'')?\s*")
_SORTED = re.compile(r"[-+0-9.eE,\[\]\"'\s]*")
_PROBABILITY = re.compile(rf"\s*({_NUMBER})\s*(?:/\s*([0-9]{{1,40}}))?\s*")
_LONG_MOVE = re.compile(r"[+-][0-9]{2}")  # the board has six squares a side
_MONOMIAL = re.compile(
    r"[-+]?(?:[0-9]{1,40}|(?:[0-9]{1,40}\*)?[A-Za-z](?:\^[0-9]{1,2})?(?:\*[A-Za-z](?:\^[0-9]{1,2})?)*)"
)


_FRAMES = (("**", "**"), ("`", "`"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_BOLD = re.compile(r"\*\*([^*\s]{1,400})\*\*")
_COMMAND = re.compile(r"\\(?:text\w*|math\w\w|mbox|boldsymbol)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{([0-9]{1,40})\}\s*\{([0-9]{1,40})\}")
_STATES = re.compile(r"(?:\b(?:is|are|be|returns?|becomes|outputs)\b(?:\s+(?:now|thus|therefore|simply)\b)?:?|[=:])\s")
_CLAUSE = re.compile(r"[,;]\s|\b(?:so|thus|hence|therefore)\b", re.IGNORECASE)
_SAYS_YES_OR_NO = re.compile(r"[\s*_]*(Yes|No)\b[*_]*[,.:;](?:\s|$)")


def read(name: str, text: str, *, tagged: bool) -> str | None:
    r"""Return the answer of the data set `name` in what stands in tags, or else in the whole completion.

    Where the data set's answers are numbers or single words it is that number or word without what is around it. What
    stands in tags and is neither goes to the library's scorer as it is, as do the answers of all other data sets.
    Without tags those have none.

    >>> read("chain_sum", "**1,018** legs", tagged=True), read("number_sorting", "```\n1 2\n```", tagged=True)
    ('1018', '1 2')
    """
    if name in UNTAGGED:
        kind = whole_number if name in WHOLE_NUMBERS else number if name in NUMBERS else word
        found = kind(f"<answer>{text}</answer>") if tagged and kind is not word else kind(text)
        if found is not None or not tagged:
            return found
    return _unframed(text) if tagged else None


def whole_number(text: str) -> str | None:
    """Return the final answer of a completion if it is a whole number, None otherwise.

    >>> whole_number("3 + 4 makes 7, so the answer is 7."), whole_number("The answer is not 7."), whole_number("1/2")
    ('7', None, None)
    """
    found = final_answer(text)
    return str(found.numerator) if found is not None and found.denominator == 1 else None


def number(text: str) -> str | None:
    """Return the final answer of a completion as a decimal number, None where it is none.

    >>> number("So the total is $1,234.50."), number("<answer>-3</answer>"), number("The answer is 1/3.")
    ('1234.5', '-3', None)
    """
    found = final_answer(text)
    if found is None:
        alone = _one_word(text.rpartition("\n")[2])  # such as 5.7e8
        return alone if alone is not None and re.fullmatch(_NUMBER, alone) else None
    if 10**80 % found.denominator:
        return None
    with decimal.localcontext(prec=160):
        return f"{decimal.Decimal(found.numerator) / found.denominator:f}"


def word(text: str) -> str | None:
    r"""Return the final answer of a completion if it is one word, None otherwise.

    It is the word in the last box, behind the last "answer is", alone in the last line, or at the end of the last
    sentence, as in "So the color is gold."; or the Yes or No with which the completion or its last sentence begins.

    >>> word("So the answer is **True**."), word("Each divides.\n\\boxed{\\text{No}}"), word("It may be true or false.")
    ('True', 'No', None)
    >>> word("So the word is \"olleh\"."), word("No, it does not follow."), word("It is True or False.")
    ('olleh', 'No', None)
    """
    text = on_few_lines(text)
    boxed, start, sentence = text.rfind("\\boxed"), phrase_end(text), last_sentence(text)
    if boxed >= 0:
        return _one_word(in_braces(text[boxed + len("\\boxed") :].lstrip()))
    if start is not None:
        clause = clause_at(text, start)
        found = None if is_denied(text, start, clause) else _one_word(clause)
        if found is not None or is_denied(text, start, clause) or len(text) - len(sentence) < start + len(clause):
            return found
    line = text.rpartition("\n")[2]
    if line.count("**") % 2 == 0 and (found := _one_word(line)) is not None:  # else it was cut in bold face
        return found
    if said := {match[1] for part in (text, sentence) if (match := _SAYS_YES_OR_NO.match(part))}:
        return said.pop() if len(said) == 1 else None
    return _stated(text, sentence)


def _stated(text: str, sentence: str) -> str | None:
    """The word that the last sentence ends in, or its only one in bold face."""
    clause = _CLAUSE.split(sentence)[-1]
    leads = list(_STATES.finditer(clause))
    if len(leads) == 1 and not re.search(r"\b(?:either|or)\b", sentence):
        stated = clause[leads[0].end() :]
        if is_denied(text, len(text) - len(stated), stated):
            return None
        ended = stated.endswith((".", "!", "*", "`", "$", '"')) or leads[0][0][:-1].endswith((":", "="))
        found = _one_word(stated) if ended or LABEL.match(sentence) else None
        if found is not None:
            return found
    bold = list(_BOLD.finditer(sentence))
    if len(bold) != 1 or not sentence.endswith((".", "!")):
        return None
    return None if is_denied(text, len(text) - len(sentence) + bold[0].start(), bold[0][0]) else _one_word(bold[0][1])


def _one_word(text: str) -> str | None:
    if len(text) > 800:
        return None
    found = _FRACTION.sub(r"\1/\2", text)
    while found != (bare := _COMMAND.sub(r"\1", _unframed(found).strip("*_`$\"'").rstrip(".!").strip())):
        found = bare
    return found if re.fullmatch(r"\S{1,400}", found) else None


def _unframed(text: str) -> str:
    """Return an answer without the fence, the box, the bold face or the mathematics that is around all of it."""
    text = text.strip()
    if text.startswith("```") and text.endswith("\n```") and text.count("```") == 2:
        return text.partition("\n")[2].removesuffix("```").rstrip().strip("\n")
    boxed = in_braces(text.removeprefix("\\boxed"))
    if text == f"\\boxed{{{boxed}}}":
        text = boxed.strip()
    for opening, closing in _FRAMES:
        inner = text.removeprefix(opening).removesuffix(closing)
        if text == f"{opening}{inner}{closing}" and not (opening in inner or closing in inner):
            text = inner.strip()
    return text


def is_answer(name: str, answer: str, entry: dict[str, Any]) -> bool:
    """Tell whether the library's scorer of the data set `name` may have `answer`; what it may not have scores 0.

    Args:
        name: of the data set.
        answer: as extracted from the completion.
        entry: the library's own.
    """
    if len(answer) > LONGEST:
        return False
    check = _CHECKS.get(name)
    return check is None or check(answer, entry)


def arithmetic(text: str) -> tuple[Fraction, list[int]] | None:
    """Return the value of sums, differences, products and quotients of whole numbers, and these numbers.

    >>> arithmetic("6*4*1*1/2")
    (Fraction(12, 1), [6, 4, 1, 1, 2])
    >>> arithmetic("9**9"), arithmetic("1/0")
    (None, None)
    """
    if _ARITHMETIC.fullmatch(text) is None:
        return None
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                numbers.append(number)
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return value(operand)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return value(left) / value(right)
        raise ValueError(f"neither a whole number nor a sum, difference, product or quotient: {ast.dump(node)}")

    try:
        return value(ast.parse(text.strip(), mode="eval").body), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _countdown(answer: str, entry: dict[str, Any]) -> bool:
    """Whatever is no near miss: the library takes a value within a hundred-thousandth of the target for the target."""
    if (found := arithmetic(answer)) is None:
        return False
    target = entry["metadata"]["target"]
    return found[0] == target or abs(found[0] - target) >= Fraction(1, 10)


def _puzzle24(answer: str, entry: dict[str, Any]) -> bool:
    found = arithmetic(answer)
    return found is not None and found[0] == 24 and Counter(found[1]) == Counter(entry["metadata"]["numbers"])


def _coin_flip(answer: str, entry: dict[str, Any]) -> bool:
    match = _PROBABILITY.fullmatch(answer.replace(",", ""))
    if match is None or (match[2] and not int(match[2])):
        return False
    return abs(float(match[1]) / int(match[2] or 1) - float(Fraction(entry["answer"]))) <= 1e-4


def _is_formula(answer: str, entry: dict[str, Any]) -> bool:
    return _FORMULA.fullmatch(answer) is not None and answer.count(")**") <= 6


def _is_antiderivative(answer: str, entry: dict[str, Any]) -> bool:
    """Whether the derivative is the integrand at two points: sympy takes minutes to find out that it nowhere is."""
    import sympy

    if not _is_formula(answer, entry):
        return False
    x = sympy.Symbol(entry["metadata"]["variable"])
    names = {x.name: x, "C": sympy.Symbol("C")}
    try:
        wanted = sympy.parse_expr(entry["metadata"]["integrand"], local_dict=names)
        derivative = sympy.diff(sympy.parse_expr(answer, local_dict=names), x)
        for point in (sympy.Rational(731, 1000), sympy.Rational(-1373, 1000)):
            given, right = (complex(one.subs(x, point).evalf()) for one in (derivative, wanted))
            if abs(given - right) > 1e-6 * (1 + abs(right)):
                return False
    except Exception:  # sympy's many, for what is no expression and for what has no value there: the library decides
        return True
    return True


def _is_expanded(answer: str, entry: dict[str, Any]) -> bool:
    """Whether the answer is a sum of monomials, each of which stands in it once."""
    text = re.sub(r"\s", "", answer)
    if re.fullmatch(r"\([^()]*\)", text):
        text = text[1:-1]
    terms = re.findall(r"[-+]?[^-+]+", text.replace("**", "^"))
    if "".join(terms) != text.replace("**", "^") or not all(_MONOMIAL.fullmatch(term) for term in terms):
        return False
    variables = [sorted(re.findall(r"[A-Za-z](?:\^[0-9]+)?", term)) for term in terms]
    letters = [[variable[0] for variable in term] for term in variables]
    once = all(len(set(term)) == len(term) for term in letters)
    return once and len({tuple(term) for term in variables}) == len(terms)


def _states_one_number(answer: str, entry: dict[str, Any]) -> bool:
    return final_answer(f"<answer>{answer}</answer>") is not None


def _is_no_premise(answer: str, entry: dict[str, Any]) -> bool:
    def plain(text: str) -> str:
        text = re.sub(r"\s", "", text)
        while len(text) > 1 and text[0] == "(" and _closes_at_the_end(text):
            text = text[1:-1]
        return text

    premises = {plain(premise) for premise in entry["metadata"]["premises"]}
    return plain(answer) not in premises - {plain(entry["metadata"]["example_answer"])}


def _closes_at_the_end(text: str) -> bool:
    """Whether the bracket that opens `text` closes with its last character."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i == len(text) - 1
    return False


_CHECKS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "coin_flip": _coin_flip,
    "complex_arithmetic": lambda answer, entry: _COMPLEX.fullmatch(answer) is not None,
    "countdown": _countdown,
    "fraction_simplification": _states_one_number,
    "game_of_life_halting": lambda answer, entry: answer.strip().lower() == entry["answer"].lower(),
    "gsm_symbolic": _states_one_number,
    "intermediate_integration": _is_antiderivative,
    "number_sorting": lambda answer, entry: _SORTED.fullmatch(answer) is not None,
    "polynomial_equations": lambda answer, entry: _NUMBERS.fullmatch(answer) is not None,
    "polynomial_multiplication": _is_expanded,
    "propositional_logic": _is_no_premise,
    "puzzle24": _puzzle24,
    "rush_hour": lambda answer, entry: _LONG_MOVE.search(answer) is None,
    "simple_integration": _is_antiderivative,
}
