"""Sums of two two-digit numbers after three examples; the first number in the completion counts.

One problem in five, by its own two numbers, belongs to the test split, whatever the seed.
"""

import random
import re

MAX_COMPLETION_TOKENS = 6


def rows(split, n, seed):
    generator = random.Random(f"{split} {seed}")
    made: list[dict[str, object]] = []
    while len(made) < n:
        *examples, (a, b) = [(generator.randint(10, 99), generator.randint(10, 99)) for _ in range(4)]
        if ((a * 100 + b) % 5 == 0) == (split == "test"):
            lines = [f"{x} + {y} = {x + y}\n" for x, y in examples]
            made.append({"prompt": "".join(lines) + f"{a} + {b} =", "answer": a + b})
    return made


def first_number_reward(prompts, completions, answer, **kwargs):
    found = [re.search(r"\d+", text) for text in completions]
    return [float(match is not None and int(match.group()) == a) for match, a in zip(found, answer, strict=True)]


def extract_answer(text):
    match = re.search(r"\d+", text)
    return match and match.group()
