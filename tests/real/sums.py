"""Sums of two two-digit numbers after three examples; the first number that is written counts."""

import random
import re

MAX_COMPLETION_TOKENS = 6


def rows(split, n, seed):
    stream = random.Random(f"{split} {seed}")
    made = []
    while len(made) < n:
        *examples, (a, b) = [(stream.randint(10, 99), stream.randint(10, 99)) for _ in range(4)]
        if ((a * 100 + b) % 5 == 0) == (split == "test"):
            shown = "".join(f"{x} + {y} = {x + y}\n" for x, y in examples)
            made.append({"prompt": f"{shown}{a} + {b} =", "answer": a + b})
    return made


def first_number_reward(prompts, completions, answer, **kwargs):
    found = [re.search(r"\d+", completion) for completion in completions]
    return [
        float(number is not None and int(number.group()) == sum_) for number, sum_ in zip(found, answer, strict=True)
    ]
