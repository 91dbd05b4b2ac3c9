"""Prompts as messages where they are asked for, and prompts that a tokenizer has no tokens for."""

import demo_model
import pytest

from peft_onelayer.rollouts.prompts import Shape, check_prompt, shaped
from peft_onelayer.tasks import load_task

TASK = load_task("arithmetic")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def demo_tokenizer():
    return demo_model.load()[1]


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(("chat", "expected"), [(None, True), (True, True), (False, False)])
def test_a_chat_template_makes_messages_unless_plain_is_asked_for(chat_tokenizer, chat, expected):
    task, is_chat = shaped(TASK, chat_tokenizer, Shape(chat))
    assert is_chat is expected
    plain, given = TASK.rows("test", 3, 0), task.rows("test", 3, 0)
    if not expected:
        assert given == plain
        return
    assert [row["prompt"] for row in given] == [[{"role": "user", "content": row["prompt"]}] for row in plain]
    assert [row["answer"] for row in given] == [row["answer"] for row in plain]
    assert shaped(task, chat_tokenizer, Shape(True))[0].rows("test", 3, 0) == given  # messages stay as they are


@pytest.mark.parametrize("chat", [None, False])
def test_without_a_chat_template_prompts_stay_plain(demo_tokenizer, chat):
    assert shaped(TASK, demo_tokenizer, Shape(chat)) == (TASK, False)


def test_messages_without_a_chat_template_are_refused(demo_tokenizer):
    with pytest.raises(ValueError, match="needs a chat template, and the model's tokenizer has none"):
        shaped(TASK, demo_tokenizer, Shape(True))


def test_a_prompt_without_tokens_is_refused_with_its_beginning(demo_tokenizer, tokenizer):
    row = TASK.rows("test", 1, 0)[0]
    check_prompt(row, demo_tokenizer, "demo")
    check_prompt({"prompt": ""}, demo_tokenizer, "demo")
    for prompt in ("What is 3 + 4?", [{"role": "user", "content": "What is 3 + 4?"}]):
        with pytest.raises(ValueError, match=r"tokenizer of demo cannot write .* such as 'What is 3 \+ 4\?'"):
            check_prompt({"prompt": prompt}, demo_tokenizer, "demo")
    with pytest.raises(ValueError, match="cannot write the task's prompts"):
        check_prompt(row, tokenizer, "other")  # has no token for "="
