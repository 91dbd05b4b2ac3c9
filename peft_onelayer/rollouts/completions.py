"""What completions look like, beside their rewards: how many were cut, how many hold no answer, and some to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_onelayer.records.figures import CompletionStatistics
from peft_onelayer.tasks import Task, completion_text

from .sampling import Rollout

SHOWN = 600  # characters of a prompt or a completion that are shown at most


def completion_statistics(rollouts: Sequence[Rollout], task: Task) -> CompletionStatistics:
    """The statistics of at least one completion of `task`."""
    return CompletionStatistics(
        completions=len(rollouts),
        mean_length=round(fmean(rollout.tokens for rollout in rollouts), 2),
        cut=fmean(not rollout.ended for rollout in rollouts),
        no_answer=None if task.answer is None else fmean(_answer(rollout, task) is None for rollout in rollouts),
    )


def describe_completions(statistics: CompletionStatistics) -> str:
    """One sentence: "6.2 tokens on average; 12 % cut at the token limit; 3 % without an answer"."""
    parts = [f"{statistics.mean_length:.1f} tokens on average", f"{statistics.cut:.0%} cut at the token limit"]
    if statistics.no_answer is not None:
        parts.append(f"{statistics.no_answer:.0%} without an answer")
    return "; ".join(parts)


def show_completions(rollouts: Sequence[Rollout], task: Task) -> str:
    """Prompt, completion, answer found and reward of each, for a person to read; long texts are shortened."""
    blocks = []
    for rollout in rollouts:
        answer = None if task.answer is None else _answer(rollout, task)
        found = "" if task.answer is None else f"   answer found: {'none' if answer is None else _short(answer)}"
        ended = "" if rollout.ended else "   cut at the token limit"
        blocks.append(
            f"prompt:     {_short(_question(rollout))}\ncompletion: {_short(_text(rollout))}\n"
            f"reward:     {rollout.reward:g}   tokens: {rollout.tokens}{found}{ended}"
        )
    return "\n\n".join(blocks)


def compare_completions(rollouts: Mapping[str, Rollout], task: Task) -> list[str]:
    """Lines with one prompt and what each model made of it, by the model's name."""
    lines = [f"prompt:     {_short(_question(next(iter(rollouts.values()))))}"]
    for name, rollout in rollouts.items():
        answer = None if task.answer is None else _answer(rollout, task)
        found = "" if task.answer is None else f"   answer found: {'none' if answer is None else _short(answer)}"
        ended = "" if rollout.ended else "   cut at the token limit"
        lines += [
            f"  {name + ':':<9} {_short(_text(rollout))}",
            f"            reward: {rollout.reward:g}   tokens: {rollout.tokens}{found}{ended}",
        ]
    return lines


def question_and_text(rollout: Rollout) -> tuple[str, str]:
    """The prompt, of a chat its last message, and the completion."""
    return _question(rollout), _text(rollout)


def prompt_as_read(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A chat prompt as its template wrote it, with what the template adds by itself; None for a plain prompt."""
    if isinstance(rollout.prompt, str):
        return None
    return f"first prompt as the model reads it: {_short(str(tokenizer.decode(rollout.prompt_ids)))}"


def completion_lines(rollouts: Sequence[Sequence[Rollout]], task: Task, **about: Any) -> Iterator[dict[str, Any]]:
    """The completions of each problem as JSON objects for a file, `about` in each."""
    for problem, group in enumerate(rollouts):
        for sample, rollout in enumerate(group):
            answer = {} if task.answer is None else {"answer_found": _answer(rollout, task)}
            yield {
                **about,
                "problem": problem,
                "sample": sample,
                "prompt": rollout.prompt,
                "completion": rollout.completion,
                "reward": rollout.reward,
                "tokens": rollout.tokens,
                "ended": rollout.ended,
                **answer,
            }


def why_equal(rollouts: Sequence[Rollout], task: Task, limit: str = "max_completion_length") -> str:
    """The likely reason why the rewards of all these completions are equal within each prompt, and what mends it.

    Args:
        limit: the field of the run's configuration that cuts completions.
    """
    statistics = completion_statistics(rollouts, task)
    rewards = {rollout.reward for rollout in rollouts}
    without = statistics.no_answer
    if len(rewards) == 1 and rewards != {0}:
        return (
            f"every completion gets {rollouts[0].reward:g}: the reward does not tell good from bad, or the model "
            "masters the task already; look at the reward, or take a harder task"
        )
    longest = max(rollout.tokens for rollout in rollouts)
    if statistics.cut >= 0.5 and (without is None or without >= 0.5):
        return (
            f"{statistics.cut:.0%} of the completions were cut at the token limit, {longest}, before they ended: raise "
            f"it, as with --set {limit}={2 * longest}; where the answer comes before the cut, look at the reward"
        )
    if without is not None and without >= 0.5:
        return (
            f"no answer was found in {without:.0%} of the completions: the model does not write the form that the task "
            "asks for; show it with --shots, say it with --system, or take an instruct model"
        )
    if rewards == {0}:
        cut = ""
        if statistics.cut >= 0.5:  # what stands before a cut may look like an answer
            cut = (
                f"; {statistics.cut:.0%} were cut at the token limit, {longest}: where the answer was still to come, "
                f"--set {limit}={2 * longest}"
            )
        return (
            "every completion gets 0: the task is too hard for this model, or the reward takes nothing for right; look "
            "at the reward, take an easier task or a larger model, or raise --prompts where right answers are rare"
            f"{cut}"
        )
    return "the completions of one prompt do not differ in reward: raise --completions, or --set temperature"


def _answer(rollout: Rollout, task: Task) -> str | None:
    assert task.answer is not None
    return task.answer(_text(rollout))


def _question(rollout: Rollout) -> str:
    prompt = rollout.prompt
    return prompt if isinstance(prompt, str) else prompt[-1].get("content") or ""


def _text(rollout: Rollout) -> str:
    return completion_text(rollout.completion) or ""


def _short(text: str) -> str:
    """In one line: what cannot be printed is escaped, a long text loses its middle."""
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} [...] {text[-SHOWN // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
