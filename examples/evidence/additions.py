"""Sums of a two-digit number and a number of one digit, after three examples; one pair in five is held out."""

import random
import re

MAX_COMPLETION_TOKENS = 6


def rows(split, n, seed):
    generator = random.Random(f"{split} {seed}")
    made: list[dict[str, object]] = []
    while len(made) < n:
        *examples, (a, b) = [(generator.randint(20, 99), generator.randint(2, 9)) for _ in range(4)]
        if ((a * 10 + b) % 5 == 0) == (split == "test"):
            lines = [f"{x} + {y} = {x + y}\n" for x, y in examples]
            made.append({"prompt": "".join(lines) + f"{a} + {b} =", "answer": a + b})
    return made


def sum_reward(prompts, completions, answer, **kwargs):
    found = [re.search(r"\d+", text) for text in completions]
    return [float(match is not None and int(match.group()) == a) for match, a in zip(found, answer, strict=True)]
