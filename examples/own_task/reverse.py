"""A task of one's own: write a word backwards. `onelayer train MODEL --layer middle --task reverse.py --out DIR`"""

import random

MAX_COMPLETION_TOKENS = 16
WORDS = ["apple", "bread", "chair", "dream", "earth", "fruit", "grape", "house", "ideal", "juice", "knife", "lemon"]


def rows(split, n, seed):
    """Up to n problems, the same for the same arguments; no word is in both splits."""
    words = WORDS[:4] if split == "test" else WORDS[4:]
    words = random.Random(seed).sample(words, min(n, len(words)))
    return [{"prompt": f"Write backwards: {word}\n", "answer": word[::-1]} for word in words]


def reverse_reward(prompts, completions, answer, **kwargs):
    """Share of the letters that are right; a completion is a string, or a list of messages in a chat."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [
        sum(a == b for a, b in zip(text.strip(), right, strict=False)) / max(len(text.strip()), len(right))
        for text, right in zip(texts, answer, strict=True)
    ]
