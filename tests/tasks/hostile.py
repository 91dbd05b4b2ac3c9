"""200 answers that are made to keep a scorer busy, to crash it, or to be paid for nothing."""

# ruff: noqa: RUF001

import random

HUGE = 10**6

NUMBERS = [
    *("1e30000000", "1e999999999", "-1e999999999", "1e-999999999", "1E+99999999999999999999", "1/1e999999999"),
    *("9**9**9**9", "10**(10**10)", "2**2**2**2**2**2", "9^9^9^9", "1<<(1<<60)", "100000!", "999999999!!!!"),
    *("factorial(10**9)", "gamma(10**9)", "exp(exp(exp(exp(9))))", "exp(999999999*log(9))", "(1+1e-9)**1e9"),
    *("nan", "NaN", "-nan", "sNaN", "inf", "-Infinity", "1e400", "-1e400", "1e-400", "nan+nanj", "nani", "0/0", "1/0"),
    *("0x" + "f" * 10_000, "0b" + "1" * 10_000, "1_" * 5_000 + "1", "0" * 10_000, "0." + "0" * 15_000 + "1"),
    *("٣" * 10, "１８", "²", "Ⅻ", "𝟗" * 500, "1" + "\u200b" + "2", "−5", "½"),
    *("9" * n for n in (4_299, 4_301, 19_999, 20_001, HUGE)),
    *("1/" * n + "1" for n in (50, 5_000, 500_000)),
    *("-" * n + "1" for n in (50, 5_000, HUGE)),
    *("1+" * n + "1" for n in (140, 9_000)),
]
BRACKETS = [bracket * n for bracket in "([{" for n in (90, 1_000, 9_000, HUGE)]
BRACKETS += ["(" * n + "1" + ")" * n for n in (90, 900, 9_000)] + ["[" * n + "]" * n for n in (90, 900, 9_000)]
BRACKETS += ['{"a":' * n + "1" + "}" * n for n in (90, 900, 3_000)] + ["¬" * n + "P" for n in (90, 900, 9_000)]
FORMULAS = [
    *("x**99*sin(x)**9*cos(x)**9*exp(x)**9", "sin(x)*cos(x)*tan(x)*exp(x)*log(x)*sinh(x)*cosh(x)", "x**x**x**x"),
    *("(x+y+z+a+b+c)**9", "(x+1)**999999", "exp(x)**99*log(x)**99", "sqrt(" * 60 + "x" + ")" * 60, "1e999999999*x"),
    *("sin(" * 90 + "x" + ")" * 90, "+".join(f"sin({i}*x)**9" for i in range(40)), "Integral(exp(x**x), x)"),
    *(
        "*".join(f"(x+{i})" for i in range(60)),
        "exp(99999999*x)*exp(-99999999*x) + 9999999999*log(9)",
        "atan(x)**(1/9)",
    ),
    *(
        "x**(1/9)+x**(1/8)+x**(1/7)+x**(1/6)",
        "log(log(log(log(x))))",
        "(P ∧ Q) ∨ " * 400 + "R",
        " → ".join("PQRS" * 300),
    ),
]
CODE = [
    *(
        "__import__('os').system('kill -9 $PPID')",
        "exit()",
        "[0] * 10**10",
        "'a' * 10**10",
        "lambda: 0",
        "open('x','w')",
    ),
    *("(lambda f: f(f))(lambda f: f(f))", "[x for x in iter(int, 1)]", "eval('1' * 10**6)", "range(10**18)", "..."),
    *("${jndi:x}", "%s%n" * 100, "{0.__class__}", "\\boxed{", "<answer>", "<!--", "'; DROP TABLE rows; --", "../../x"),
]
GRIDS = [
    *("1 2 3 4 5 6 7 8 9\n" * n for n in (9, 1_000, 50_000)),
    *(" ".join("1" * n) for n in (81, 9_000, HUGE)),
    *(str([[0] * 90] * 90), str([[1e300] * 9] * 9), "[[]," * 3_000 + "0" + "]" * 3_000, str([["nan"] * 9] * 9)),
    *(str(["nan"] * n) for n in range(1, 9)),
    *("Q _ _ _\n" * n for n in (4, 2_000)),
    *("move disk 1 from peg 1 to peg 2\n" * n for n in (5, 500)),
]
MOVES = [
    *("F+99999999999", "A-" + "9" * 4_000, "A+1A-1" * 3_000, "A+9" * 6_000, "F+1 " * 4_000),
    *("R" * 9_000, "RLUD" * 4_900, "R" * HUGE, "up " * 6_000, "A → B → C → " * 1_600, "U2 R' F " * 2_400),
    *('["fill A", ' * 1_500, str(["fill A", "pour A->B", "empty B"] * 700), str(["w,A1,B3"] * 1_400), "A=1," * 4_000),
    *(
        "B2 A1,A2",
        "CAT,COT," * 2_400,
        "Zoey is a knight, and " * 800,
        "2 × " * 4_900 + "2",
        "1:" * 9_000,
        "9999999 days",
    ),
    "9" * 4_000 + " days, " + "9" * 4_000 + ":00:00",
]
TEXTS = [character * n for character in ("\0", "\ud800", "a", " ", "\n", "\U0010ffff") for n in (1, 9_000, HUGE)]
TEXTS += ["", "\u202e", "e\u0301" * 5_000, "\x1b[2J", "\r\n", ",", "=", "'", '"', "💥" * 5_000, "a,b;c" * 3_900, "null"]


FIXED = [*NUMBERS, *BRACKETS, *FORMULAS, *CODE, *GRIDS, *MOVES, *TEXTS]


def of(right: str) -> list[str]:
    """Return 200 answers: `FIXED`, and some that are made of the right one. None is it."""
    rng = random.Random(right)
    made: list[str] = []
    while len(FIXED) + len(made) < 200:
        place = rng.randrange(len(right) + 1)
        made += [
            (right + " ") * (19_000 // (len(right) + 1)),
            right[:place] + rng.choice(NUMBERS[:12]) + right[place:],
            "".join(chr(0x660 + int(c)) if c in "0123456789" else c for c in right) + "٠",
            right.replace("1", "9" * 40) + "**9**9",
        ]
    return [answer for answer in (FIXED + made)[:200] if answer != right]
