"""Fits a task's prompts to a model's tokenizer, and refuses in one line what the tokenizer cannot write.

`shaped` is the one way from a task to what a model is given, in training, rankings, evaluations and sweeps: messages or
plain text, with a system text and with solved problems ahead where they are asked for. What the shape does to a
completion, it takes back before the completion is graded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_onelayer.records.text import one_line
from peft_onelayer.tasks import Task, as_chat, up_to_end

THINK = "<think>"
SHOTS_SEED = 1234  # of the problems that are shown: the same in every run, whatever its seed

Row = dict[str, Any]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """How prompts are given, the same for every problem.

    Attributes:
        chat: as messages of a user; None for: if the tokenizer has a chat template.
        system: text of a system message; of a plain prompt its first paragraph. None or "" for none.
        shots: problems of the train split that are shown with their solutions ahead of the one that is asked.
        template_kwargs: what the chat template is given beside the messages.
    """

    chat: bool | None = None
    system: str | None = None
    shots: int = 0
    template_kwargs: Mapping[str, Any] | None = None


def shaped(task: Task, tokenizer: PreTrainedTokenizerBase, shape: Shape) -> tuple[Task, bool]:
    """The task with its prompts in `shape`, and whether its plain prompts became messages.

    In a chat a shown problem is a message of the user and one of the assistant. In plain text it is the task's own form
    for base models (`Task.shown`), and a completion is graded up to where it begins another problem. Problems that are
    shown are left out of "train". A system text goes ahead of the user's first message where the chat template takes no
    system messages, also one of the task's own. Where the template begins a completion with <think>, the reward is
    given it too.

    Raises:
        ValueError: in one line: `chat` without a chat template, fewer than 0 shots, or shots of a task that has no
            solutions to show, or too few of them.
    """
    if shape.chat and tokenizer.chat_template is None:
        raise ValueError("--chat needs a chat template, and the model's tokenizer has none; use --plain")
    chat = shape.chat is not False and tokenizer.chat_template is not None
    examples = shown_rows(task, shape.shots)
    opening, fold = "", False
    if tokenizer.chat_template is not None:
        kwargs = shape.template_kwargs or {}
        fold = not _takes_system(tokenizer, kwargs)
        if chat and task.environment_factory is None and _begins_with_thinking(tokenizer, kwargs):
            opening = THINK
    if not (chat or fold or examples or shape.system):
        return task, False

    def rows(split: str, n: int, seed: int) -> list[Row]:
        left_out = {repr(row["prompt"]) for row in examples} if split == "train" else set()
        drawn = task.rows(split, n + len(examples) if left_out and n > 0 else n, seed)
        asked = [row for row in drawn if repr(row["prompt"]) not in left_out][:n]
        if not asked:
            raise ValueError(f"--shots {shape.shots} shows all train problems of {task.name}; show fewer")
        return [{**row, "prompt": _prompt(task, row, chat, examples, shape.system, fold)} for row in asked]

    size = task.train_size
    end = _end(task, examples) if examples and not chat else None
    given = replace(task, rows=rows, train_size=None if size is None else size - len(examples), end=end)
    return _graded(given, opening, end), chat


def shown_rows(task: Task, shots: int | None) -> list[Row]:
    """The rows of the train split that `shots` shows, the same in every run.

    Raises:
        ValueError: in one line: fewer than 0, or a task that has no solutions to show, or too few of them.
    """
    if not shots:
        return []
    if shots < 0:
        raise ValueError(f"--shots must be at least 0, got {shots}")
    if task.environment_factory is not None:
        raise ValueError(f"task {task.name} plays through an environment, which --shots cannot show; leave it out")
    if task.shown is None:
        raise ValueError(
            f"task {task.name} has no solutions that --shots could show; a file.py has them by a function solution(row)"
        )
    examples = task.rows("train", shots, SHOTS_SEED)
    if len(examples) < shots:
        raise ValueError(f"--shots {shots} asks for more than the {len(examples)} train problems of {task.name}")
    for one in examples:
        task.shown.solution(one), task.shown.message(one)
    return examples


def _prompt(
    task: Task, row: Row, chat: bool, examples: Sequence[Row], system: str | None, fold: bool
) -> str | Messages:
    """The prompt of a row of `task` in its shape."""
    if isinstance(row["prompt"], str) and not chat:
        text = row["prompt"]
        if examples:
            assert task.shown is not None
            solved = [task.shown.question(one) + task.shown.solution(one) for one in examples]
            text = task.shown.between.join([*solved, task.shown.question(row)])
        return f"{system}\n\n{text}" if system else text
    messages: Messages = [dict(message) for message in as_chat([row])[0]["prompt"]]
    if examples:
        assert task.shown is not None
        shown = [
            dict(message)
            for one in as_chat(examples)
            for message in (one["prompt"][-1], {"role": "assistant", "content": task.shown.message(one)})
        ]
        start = int(messages[0]["role"] == "system")
        messages[start:start] = shown
    if system:
        own = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        messages.insert(0, {"role": "system", "content": f"{system}\n\n{own}" if own else system})
    if fold and messages[0]["role"] == "system" and len(messages) > 1:
        said = messages.pop(0)["content"]
        messages[0]["content"] = f"{said}\n\n{messages[0]['content']}"
    return messages


def _takes_system(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> bool:
    """Whether the chat template writes system messages; some raise, some leave them out."""
    mark = "onelayer-system-text"
    messages = [{"role": "system", "content": mark}, {"role": "user", "content": "?"}]
    return mark in (_rendered(tokenizer, messages, kwargs) or "")


def _begins_with_thinking(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> bool:
    """Whether the chat template itself writes the <think> that a completion begins with."""
    user, system = ({"role": role, "content": "?"} for role in ("user", "system"))
    rendered = _rendered(tokenizer, [user], kwargs) or _rendered(tokenizer, [system, user], kwargs) or ""
    return rendered.rstrip().endswith(THINK)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, kwargs: Mapping[str, Any]) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs))
    except Exception:  # a template is its author's program, and raises what it likes
        return None


def _end(task: Task, examples: Sequence[Row]) -> str | None:
    """Where a plain completion goes over to a problem of its own; None where a solution may hold the same."""
    assert task.shown is not None
    end = task.shown.end
    return None if end is None or any(end in task.shown.solution(one) for one in examples) else end


def _graded(task: Task, opening: str, end: str | None) -> Task:
    """The task whose reward and answer see a completion with the `opening` that the template wrote of it, and a plain
    one up to `end`."""
    if not opening and end is None:
        return task

    def whole(text: str) -> str:
        return text if text.lstrip().startswith(THINK) else opening + text

    def seen(completion: str | Messages) -> str | Messages:
        if isinstance(completion, str):
            return up_to_end(completion, end)
        last = completion[-1]
        if "reasoning_content" in last or "thinking" in last:  # told apart by the tokenizer already
            return completion
        return [*completion[:-1], {**last, "content": whole(last.get("content") or "")}]

    @functools.wraps(task.reward)  # trainers name the metric after it
    def reward(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        return task.reward(prompts=prompts, completions=[seen(completion) for completion in completions], **kwargs)

    answer = task.answer

    def answer_seen(text: str) -> str | None:
        assert answer is not None
        return answer(up_to_end(whole(text), end))

    return replace(task, reward=reward, answer=None if answer is None else answer_seen)


def check_prompt(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    plays: bool = False,
) -> None:
    """Raise ValueError for a prompt that the tokenizer of `model` cannot write as it is meant.

    Args:
        row: one of the task's.
        template_kwargs: `chat_template_kwargs`, each of which must have an effect.
        plays: whether the task plays through an environment, whose tools the chat template is then given.
    """
    chat = not isinstance(row["prompt"], str)
    texts = [message["content"] for message in row["prompt"]] if chat else [row["prompt"]]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids if isinstance(text, str) else [0]
        if text and (not ids or tokenizer.unk_token_id in ids):
            raise ValueError(f"the tokenizer of {model} cannot write the task's prompts, such as {text[:60]!r}")
    template = tokenizer.chat_template
    for name in template_kwargs or {}:
        if not chat:
            raise ValueError(f"chat_template_kwargs sets {name}, but the prompts are plain text, not chat messages")
        if isinstance(template, str) and not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"chat_template_kwargs sets {name}, which the chat template of {model} does not read")
    if chat and template is None:
        raise ValueError(
            f"the task's prompts are chat messages, and the tokenizer of {model} has no chat template; take an "
            "instruct model, or rows whose prompt is text"
        )
    if chat and not plays:
        _check_template(list(row["prompt"]), tokenizer, model, template_kwargs or {})


def _check_template(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, model: str, kwargs: Mapping[str, Any]
) -> None:
    """Raise ValueError where the chat template of `model` cannot write `messages`."""
    try:
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
    except Exception as error:  # a template is its author's program, and raises what it likes
        parameters = {"type": "object", "properties": {}}
        tool = {"type": "function", "function": {"name": "f", "description": "f", "parameters": parameters}}
        system = {"role": "system", "content": "?"}
        if _rendered(tokenizer, messages, {**kwargs, "tools": [tool]}) is not None:
            why = "it needs tools, and the task has none"
        elif messages[0]["role"] != "system" and _rendered(tokenizer, [system, *messages], kwargs) is not None:
            why = f"it needs a system message ({one_line(error)}); give one with --system TEXT"
        else:
            why = one_line(error)
        raise ValueError(
            f"the chat template of {model} cannot write the task's prompts: {why}; --plain gives prompts as text"
        ) from error
