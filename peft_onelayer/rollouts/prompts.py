"""Fits a task's prompts to a model's tokenizer, and refuses in one line what the tokenizer cannot write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_onelayer.tasks import Task, as_chat


def with_chat_prompts(task: Task, tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> tuple[Task, bool]:
    """The task with its plain prompts as messages of a user, and whether they are.

    Args:
        chat: whether they shall be; None for: if the tokenizer has a chat template.

    Raises:
        ValueError: `chat` without a chat template.
    """
    if chat and tokenizer.chat_template is None:
        raise ValueError("--chat needs a chat template, and the model's tokenizer has none; use --plain")
    if chat is False or tokenizer.chat_template is None:
        return task, False
    return replace(task, rows=lambda split, n, seed: as_chat(task.rows(split, n, seed))), True


def check_prompt(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, model: str, template_kwargs: Iterable[str] = ()
) -> None:
    """Raise ValueError for a prompt that the tokenizer of `model` cannot write as it is meant.

    Args:
        row: one of the task's.
        template_kwargs: names in `chat_template_kwargs`, each of which must have an effect.
    """
    chat = not isinstance(row["prompt"], str)
    text = row["prompt"][-1]["content"] if chat else row["prompt"]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if text and (not ids or tokenizer.unk_token_id in ids):
        raise ValueError(f"the tokenizer of {model} cannot write the task's prompts, such as {text[:60]!r}")
    template = tokenizer.chat_template
    for name in template_kwargs:
        if not chat:
            raise ValueError(f"chat_template_kwargs sets {name}, but the prompts are plain text, not chat messages")
        if isinstance(template, str) and not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"chat_template_kwargs sets {name}, which the chat template of {model} does not read")
