"""What is said of completions beside their rewards."""

import pytest

from peft_onelayer.rollouts.completions import (
    CompletionStatistics,
    completion_statistics,
    describe_completions,
    prompt_as_read,
    show_completions,
    why_equal,
)
from peft_onelayer.rollouts.sampling import Rollout
from peft_onelayer.tasks import Task


def digits(text):
    return next((word for word in text.split() if word.isdigit()), None)


def task(answer=digits):
    return Task("sums", lambda split, n, seed: [], lambda **kwargs: [], 8, answer=answer)


def rollout(text, reward=0.0, ended=True, tokens=4, prompt="1 + 1 ="):
    return Rollout(prompt, text, reward, tokens, ended, [1], [2] * tokens, [True] * tokens)


def test_statistics():
    rollouts = [rollout("2 of course", 1.0), rollout("a couple", tokens=6), rollout("3 or", ended=False), rollout("")]
    assert completion_statistics(rollouts, task()) == CompletionStatistics(4, 4.5, 0.25, 0.5)
    assert completion_statistics(rollouts, task(None)) == CompletionStatistics(4, 4.5, 0.25, None)
    said = describe_completions(completion_statistics(rollouts, task()))
    assert said == "4.5 tokens on average; 25% cut at the token limit; 50% without an answer"


def test_shown_for_a_person():
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1 + 1 =\n"}]
    shown = show_completions(
        [
            rollout([{"role": "assistant", "content": "it is\n2"}], 1.0, prompt=chat),
            rollout("x" * 5000, ended=False),
            rollout("\x1b[31mred \u202e", 0.0),
        ],
        task(),
    )
    blocks = shown.split("\n\n")
    assert blocks[0] == ("prompt:     1 + 1 =\\n\ncompletion: it is\\n2\nreward:     1   tokens: 4   answer found: 2")
    assert "[...]" in blocks[1] and len(blocks[1]) < 800 and blocks[1].endswith("none   cut at the token limit")
    assert "\\x1b[31mred \\u202e" in blocks[2]


def test_a_chat_prompt_is_shown_with_what_its_template_adds(tokenizer):
    ids = tokenizer("A347+085=").input_ids
    (chat, plain) = (Rollout(prompt, "", 0.0, 1, True, ids, [1], [True]) for prompt in ([{"content": "347"}], "347"))
    said = prompt_as_read(chat, tokenizer)
    assert said == f"first prompt as the model reads it: {tokenizer.decode(ids)}"
    assert prompt_as_read(plain, tokenizer) is None


@pytest.mark.parametrize(
    ("rollouts", "said"),
    [
        ([rollout("2", 1.0)] * 4, "masters the task already"),
        ([rollout("2", -1.0)] * 4, "every completion gets -1: the reward does not tell good from bad"),
        (
            [rollout("because", ended=False)] * 3 + [rollout("3")],
            "75% of the completions were cut at the token limit, 4, before they ended: raise it, as with --set "
            "max_completion_length=8; where",
        ),
        ([rollout("3 because", ended=False)] * 4, "too hard"),  # the answer may come before the cut
        (
            [rollout("3", ended=False)] * 4,
            "100% were cut at the token limit, 4: where the answer was still to come, --set max_completion_length=8",
        ),
        ([rollout("a couple")] * 4, "no answer was found in 100%"),
        ([rollout("3")] * 4, "too hard"),
        ([rollout("2", 1.0)] * 2 + [rollout("3")] * 2, "do not differ"),
    ],
)
def test_why_the_rewards_are_equal(rollouts, said):
    assert said in why_equal(rollouts, task())


def test_the_field_that_cuts_is_the_algorithms():
    assert "--set max_new_tokens=8;" in why_equal([rollout("because", ended=False)], task(None), "max_new_tokens")
