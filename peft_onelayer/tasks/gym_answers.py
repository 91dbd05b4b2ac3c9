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
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from peft_onelayer.tasks.gsm8k import ANSWER_PHRASE, final_answer

EVALUATED = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
INTEGRALS = ("intermediate_integration", "simple_integration")
ARITHMETIC = ("countdown", "puzzle24")
FORMULAS = (*INTEGRALS, "polynomial_multiplication", *ARITHMETIC)

# Data sets whose answers are whole numbers, or single words and other numbers: they need no tags.
WHOLE_NUMBERS = (
    "aiw", "basic_arithmetic", "binary_alternation", "chain_sum", "circuit_logic", "count_bits", "count_primes", "gcd",
    "largest_island", "lcm", "leg_counting", "letter_counting", "maze", "number_sequence", "products",
    "rectangle_count", "rotten_oranges", "self_reference", "simple_equations", "simple_geometry",
)  # fmt: skip
WORDS = (
    "acre", "base_conversion", "bf", "bitwise_arithmetic", "calendar_arithmetic", "color_cube_rotation",
    "course_schedule", "decimal_arithmetic", "decimal_chain_sum", "dice", "family_relationships", "figlet_font",
    "game_of_life_halting", "gsm_symbolic", "isomorphic_strings", "mahjong_puzzle", "needle_haystack", "number_format",
    "palindrome_generation", "power_function", "ransom_note", "spell_backward", "string_insertion",
    "string_manipulation", "syllogism", "tsumego", "zebra_puzzles",
)  # fmt: skip

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


def whole_number(text: str) -> str | None:
    """Return the final answer of a completion without tags if it is a whole number, None otherwise.

    >>> whole_number("3 + 4 makes 7, so the answer is 7."), whole_number("The answer is not 7."), whole_number("1/2")
    ('7', None, None)
    """
    number = final_answer(text)
    return str(number.numerator) if number is not None and number.denominator == 1 else None


def word(text: str) -> str | None:
    r"""Return the final answer of a completion without tags if it is one word, None otherwise.

    >>> word("So the answer is **True**."), word("Each divides.\n\\boxed{No}"), word("It may be true or false.")
    ('True', 'No', None)
    """
    text = text.strip()
    boxed, phrases = text.rfind("\\boxed{"), list(ANSWER_PHRASE.finditer(text))
    if boxed >= 0:
        found, closed, _ = text[boxed + len("\\boxed{") :].partition("}")
        if not closed:
            return None
    elif phrases:
        found = text[phrases[-1].end() :].partition("\n")[0].partition(". ")[0]
    else:
        found = text.rpartition("\n")[2]
    found = found.strip().strip("*_`$\"'").rstrip(".!*_`$\"'")
    return found if re.fullmatch(r"\S{1,400}", found) else None


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
