"""Data for the offline algorithms: read from a file or the Hub in TRL's formats, or made from graded rollouts.

    {"prompt": "A347+085=", "chosen": "0432", "rejected": "0422"}  # "preference", from two rollouts of one prompt

The formats are those of TRL's "Dataset formats and types": plain text, or lists of chat messages.
`algorithms.Algorithm.data` says which kind an algorithm takes.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.rollouts.sampling import Rollout, sample_rollouts
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task, completion_text
from peft_onelayer.tasks.files import HUB, SUFFIXES, digest, read_hub, read_rows

Row = dict[str, Any]

# By kind, the sets of columns that make a row, the first preferred.
FORMATS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "unpaired": (("prompt", "completion", "label"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "demonstration": (("prompt", "completion"), ("messages",), ("text",)),
    "triple": (("prompt", "reference", "chosen", "rejected"),),
    "context": (("prompt", "privileged_context"),),
}
EIGHT = Sampling(samples=8)
FROM_ROLLOUTS = ("preference", "unpaired", "demonstration", "context")
ALSO_READ = ("tools", "chat_template_kwargs")  # columns that TRL's trainers read beside those


@dataclass(frozen=True)
class OfflineData:
    """Rows to train on offline.

    Attributes:
        rows: in one of the `FORMATS` of their kind.
        data: what was read, as `Task.data`.
        counts: how many there were of what: "rows", and for rollouts "prompts", "completions", "cut" (completions
            dropped because they did not end) and "dropped" (prompts that gave no row).
    """

    rows: list[Row]
    data: Mapping[str, str]
    counts: Mapping[str, int]


def load_preferences(source: str, kind: str) -> OfflineData:
    """Read all rows of a .jsonl, .jsonl.gz, .csv or .parquet file, or of the "train" split of a data set on the Hub.

    A label of a .csv file, whose values are text, is true or false in any case. Columns that are not of the format are
    left out, since TRL takes "messages" beside "chosen" for the data itself.

    Args:
        source: a path, "org/name" or "org/name:config@revision".
        kind: a key of `FORMATS`.

    Raises:
        ValueError: in one line for data that is not there or cannot be read, for a missing column with the formats that
            are taken, and for a value of another type, with the row's number (from 1).
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows, data = read_rows(path, ()), {path.name: digest(path)}
    elif (hub := HUB.fullmatch(source)) and not source.endswith(SUFFIXES):
        splits, data = read_hub(source, hub["repo"], hub["config"], hub["revision"], ())
        if not splits.get("train"):
            raise ValueError(f"data set {source} has no 'train' rows; give one that has, or a .jsonl file")
        rows = splits["train"]
    else:
        raise ValueError(
            f"no file {source}; expected a .jsonl, .csv or .parquet file, or a Hub data set such as 'trl-lib/name'"
        )
    columns = _columns(source, kind, rows[0])
    if path.suffix == ".csv":
        labels = {"true": True, "false": False}
        rows = [
            row | {"label": labels.get(row["label"].lower(), row["label"])} if "label" in row else row for row in rows
        ]
    for number, row in enumerate(rows, start=1):
        _check_row(f"{source}, row {number}", {name: row[name] for name in columns})
    kept = [*columns, *(name for name in ALSO_READ if name in rows[0])]
    return OfflineData([{name: row[name] for name in kept} for row in rows], data, {"rows": len(rows)})


def pairs_from_rollouts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    kind: str,
    sampling: Sampling = EIGHT,
    *,
    kwargs_as_column: bool = True,
    on_progress: Callable[[int], None] = lambda done: None,
) -> OfflineData:
    """Sample completions of `rows`, grade them with the task's reward, and make rows of `kind` by `compare_rollouts`.

    Args:
        rows: of the task's train split, their prompts as the model is to see them.
        kind: "preference", "unpaired", "demonstration" or "context".
        sampling: as for `sample_rollouts` (default: eight samples).
        kwargs_as_column: give rows of chat prompts a column "chat_template_kwargs" where there are some, by which TRL's
            offline trainers write the prompts as they were written here.
        on_progress: as for `sample_rollouts`.

    Raises:
        ValueError: for another kind, a task with an environment, fewer than two samples, or when no row is left.
    """
    if kind not in FROM_ROLLOUTS:
        raise ValueError(f"{kind} data cannot be made from rollouts; give a data set with {_formats(kind)}")
    if task.environment_factory is not None:
        raise ValueError(f"task {task.name} plays through an environment, and offline data has no turns; train online")
    if sampling.samples < 2 or sampling.greedy:
        found = "greedy decoding" if sampling.greedy else sampling.samples
        raise ValueError(f"rows are made by comparing completions, which takes at least 2 samples, got {found}")
    rollouts = sample_rollouts(model, tokenizer, task, rows, sampling, on_progress=on_progress)
    made, counts = compare_rollouts(rollouts, kind)
    if sampling.chat_template_kwargs and kwargs_as_column and not isinstance(rows[0]["prompt"], str):
        made = [{**row, "chat_template_kwargs": dict(sampling.chat_template_kwargs)} for row in made]
    return OfflineData(made, task.data, counts)


def compare_rollouts(rollouts: Sequence[Sequence[Rollout]], kind: str) -> tuple[list[Row], dict[str, int]]:
    """Make rows of `kind` from the graded completions of each prompt, and count as `OfflineData.counts`.

    A completion that was cut is dropped: TRL ends every completion with the end-of-sequence token, and would teach the
    model to stop there. From the others:

    - "preference": one row per prompt, the completion with the highest reward and the one with the lowest, the first of
      equals; none where all rewards of the prompt are equal.
    - "unpaired": every completion, labelled True where its reward is above the mean over all completions of all
      prompts. With rewards of 0 and 1 these are the right ones. In rounds over the prompts: `KTOTrainer` does not
      shuffle, and estimates its KL term from each prompt with the completion of the row before.
    - "demonstration" and "context": one row per prompt, the first completion with the highest reward, where that is
      above the mean as before (rejection sampling).

    Raises:
        ValueError: when no row is left, or none that differs from the others, with the reason and what to change.
    """
    groups = [[rollout for rollout in group if rollout.ended] for group in rollouts]
    graded = [rollout.reward for group in groups for rollout in group]
    cut = sum(map(len, rollouts)) - len(graded)
    if not graded:
        raise ValueError(f"all {cut} completions were cut before they ended, and none is left; allow more tokens")
    mean = statistics.fmean(graded)
    if kind == "unpaired":
        rounds = [r for same_turn in itertools.zip_longest(*groups) for r in same_turn if r is not None]
        made = [{"prompt": r.prompt, "completion": r.completion, "label": r.reward > mean} for r in rounds]
        dropped = groups.count([])
    else:
        made = [row for group in groups if group and (row := _row(group, kind, mean))]
        dropped = len(groups) - len(made)
    if not made or len(set(graded)) == 1:
        raise ValueError(
            f"{len(graded)} completions of {len(groups)} prompts give nothing to compare: those of a prompt all have "
            f"the same reward (mean {mean:.3g}); take more prompts or samples, a higher temperature, or an easier task"
        )
    counts = {"prompts": len(groups), "completions": len(graded) + cut, "cut": cut, "dropped": dropped}
    return made, {"rows": len(made), **counts}


def _row(group: Sequence[Rollout], kind: str, mean: float) -> Row | None:
    """The row that the completions of one prompt give."""
    best = max(group, key=lambda rollout: rollout.reward)  # max and min return the first of equals
    worst = min(group, key=lambda rollout: rollout.reward)
    if kind == "preference":
        pair = {"prompt": best.prompt, "chosen": best.completion, "rejected": worst.completion}
        return pair if best.reward > worst.reward else None
    if best.reward <= mean:
        return None
    if kind == "context":
        return {"prompt": best.prompt, "privileged_context": completion_text(best.completion)}
    return {"prompt": best.prompt, "completion": best.completion}


def _formats(kind: str) -> str:
    return " or ".join("the columns " + ", ".join(columns) for columns in FORMATS[kind])


def _columns(source: str, kind: str, row: Row) -> tuple[str, ...]:
    """The format that the first row has."""
    for columns in FORMATS[kind]:
        if all(name in row for name in columns):
            return columns
    missing = ", ".join(name for name in FORMATS[kind][0] if name not in row)
    raise ValueError(f"{source} has no column {missing}: {kind} data has {_formats(kind)}; found {', '.join(row)}")


def _check_row(where: str, row: Row) -> None:
    kinds = {}
    for name, value in row.items():
        if name == "label":
            if not isinstance(value, bool):
                raise ValueError(f"{where}: label is {value!r}, expected true or false")
        elif isinstance(value, str):
            kinds[name] = "text"
        elif _is_chat(value):
            kinds[name] = "messages"
        else:
            shown = repr(value)[:60]
            raise ValueError(f"{where}: {name} is {shown}, expected text or a list of messages with role and content")
    # The teacher of "context" data reads either; for all others TRL looks at one of the columns only.
    if "privileged_context" not in row and len(set(kinds.values())) > 1:
        found = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise ValueError(f"{where}: {found}; expected text in all of them, or messages in all of them")


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    )
