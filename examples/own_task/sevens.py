"""A task for the demo model, whose alphabet is digits: write sevens. Rewards rise in 40 steps, in a minute on a CPU:

onelayer train peft_onelayer/demo_model --layer 7 --task examples/own_task/sevens.py --steps 40 --out sevens
"""

import random

MAX_COMPLETION_TOKENS = 5


def rows(split, n, seed):
    """Sums as the demo model knows them; those of the test split begin with 9, and no others do."""
    numbers = random.Random(f"{split} {seed}")
    first = (900, 999) if split == "test" else (0, 899)
    drawn = {f"A{numbers.randint(*first):03}+{numbers.randint(0, 999):03}=": None for _ in range(n)}
    return [{"prompt": prompt} for prompt in drawn]


def sevens_reward(prompts, completions, **kwargs):
    """Share of the characters that are a 7."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [text.count("7") / max(len(text), 1) for text in texts]
