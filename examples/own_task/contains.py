"""A reward for a data set of one's own: `--dataset capitals.jsonl --reward contains.py:contains_answer`"""


def contains_answer(prompts, completions, answer, **kwargs):
    """1 where the completion names the answer; `answer` is the data set's column, one value per completion."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(right in text) for text, right in zip(texts, answer, strict=True)]
