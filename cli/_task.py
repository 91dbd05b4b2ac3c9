"""Opens the task a command was given, fitted to the model's tokenizer, and refuses in one line what cannot work."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_onelayer.tasks import Task


def open_task(name: str | None, dataset: str | None, reward: str | None, *, unsafe: bool) -> Task:
    """The task of `--task`, or of `--dataset` with `--reward`.

    Raises:
        ValueError: neither or both were given, or what was given is no task.
    """
    from peft_onelayer.tasks import load_task

    if name and (dataset or reward):
        raise ValueError("--task comes with its own data and reward; give --task, or --dataset with --reward, not both")
    if name:
        return load_task(name, unsafe=unsafe)
    if not dataset or not reward:
        raise ValueError("give --task, or --dataset with --reward")
    from peft_onelayer.tasks.user import load_dataset_task

    return load_dataset_task(dataset, reward)


def as_asked(task: Task, tokenizer, chat: bool | None) -> tuple[Task, bool]:
    """The task with its plain prompts as messages of a user, if `chat` or, by default, if there is a chat template.

    Raises:
        ValueError: `chat` without a chat template.
    """
    from peft_onelayer.tasks import as_chat

    if chat and tokenizer.chat_template is None:
        raise ValueError("--chat needs a chat template, and the model's tokenizer has none; use --plain")
    if chat is False or tokenizer.chat_template is None:
        return task, False
    return replace(task, rows=lambda split, n, seed: as_chat(task.rows(split, n, seed))), True


def check_writable(row: dict, tokenizer, model: str) -> None:
    """Refuse a tokenizer that has no tokens for the prompt of `row`.

    Raises:
        ValueError: with the prompt's beginning.
    """
    text = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if text and (not ids or tokenizer.unk_token_id in ids):
        raise ValueError(f"the tokenizer of {model} cannot write the task's prompts, such as {text[:60]!r}")
