"""Which of five words stands there twice, after three examples; the first word in the completion counts.

Four words are drawn from a list, and one of them is put in once more. A problem belongs to the test split when the
repeated word is one of the last tenth of the list, so no answer of the test split is ever rewarded in training.
"""

import random
import re

MAX_COMPLETION_TOKENS = 4
WORDS = """
apple bread chair cloud dance eagle flame grape horse island jungle kite lemon mouse
night ocean piano queen river stone tiger uncle violin water yellow zebra bridge candle
desert engine forest garden hammer insect jacket kettle ladder marble needle orange pencil rabbit
silver tunnel valley window winter summer doctor farmer market school butter circle dragon father
ginger hunter
""".split()  # noqa: SIM905
HELD_OUT = 6


def rows(split, n, seed):
    generator = random.Random(f"{split} {seed}")
    answers = WORDS[-HELD_OUT:] if split == "test" else WORDS[:-HELD_OUT]
    made = []
    for _ in range(n):
        lines = []
        for asked in (False, False, False, True):
            twice = generator.choice(answers if asked else WORDS[:-HELD_OUT])
            words = [twice, *generator.sample([word for word in WORDS if word != twice], 3)]
            words.insert(generator.randrange(5), twice)
            lines.append(f"{', '.join(words)} ->" + ("" if asked else f" {twice}\n"))
        made.append({"prompt": "".join(lines), "answer": twice})
    return made


def first_word_reward(prompts, completions, answer, **kwargs):
    found = [re.search(r"[a-z]+", text) for text in completions]
    return [float(match is not None and match.group() == a) for match, a in zip(found, answer, strict=True)]


def extract_answer(text):
    match = re.search(r"[a-z]+", text)
    return match and match.group()
