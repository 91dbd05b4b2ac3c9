"""Sums of two two-digit numbers after three examples; the first number that is written counts."""

import random
import re

MAX_COMPLETION_TOKENS = 6


def rows(split, n, seed):
    generator = random.Random(f"{split} {seed}")
    made = []
    while len(made) < n:
        shown = []
        for _ in range(4):
            shown.append((generator.randint(10, 99), generator.randint(10, 99)))
        *examples, (a, b) = shown
        if ((a * 100 + b) % 5 == 0) != (split == "test"):
            continue
        lines = [f"{x} + {y} = {x + y}\n" for x, y in examples]
        made.append({"prompt": "".join(lines) + f"{a} + {b} =", "answer": a + b})
    return made


def first_number_reward(prompts, completions, answer, **kwargs):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    found = [re.search(r"\d+", t) for t in texts]
    return [float(m is not None and int(m.group()) == a) for m, a in zip(found, answer, strict=True)]
