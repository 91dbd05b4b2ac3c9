"""Several tasks as one: equal numbers of rows of each, every completion graded by its own task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_onelayer.tasks import Task
from peft_onelayer.tasks.rows import reward_columns

OF_TASK, ROW = "mixture_task", "mixture_row"


def mixture(tasks: Sequence[Task]) -> Task:
    """The tasks in turns: row i is of task i modulo their number.

    Raises:
        ValueError: no task, one twice, or one that plays through an environment.
    """
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"a mixture takes different tasks, and {', '.join(names) or 'none'} was given.")
    if playing := [task.name for task in tasks if task.environment_factory is not None]:
        raise ValueError(f"task {playing[0]} plays through an environment, which a mixture of tasks cannot.")

    def rows(split: str, n: int, seed: int) -> list[dict[str, Any]]:
        counts = [len(range(i, n, len(tasks))) for i in range(len(tasks))]
        own = [task.rows(split, count, seed) if count else [] for task, count in zip(tasks, counts, strict=True)]
        places = [(k, i) for k in range(max(map(len, own))) for i in range(len(tasks)) if k < len(own[i])]
        return [{"prompt": own[i][k]["prompt"], OF_TASK: i, ROW: own[i][k]} for k, i in places]

    def mixture_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        rewards = [0.0] * len(completions)
        of_task, whole = columns.pop(OF_TASK), columns.pop(ROW)
        for_all = {name: columns[name] for name in ("trainer_state", "log_metric") if name in columns}
        for i, task in enumerate(tasks):
            if mine := [k for k, number in enumerate(of_task) if number == i]:
                given = reward_columns([whole[k] for k in mine]) | for_all
                if "completion_ids" in columns:
                    given["completion_ids"] = [columns["completion_ids"][k] for k in mine]
                scores = task.reward(
                    prompts=[prompts[k] for k in mine], completions=[completions[k] for k in mine], **given
                )
                for k, score in zip(mine, scores, strict=True):
                    rewards[k] = score
        return rewards

    return Task(
        name="+".join(names),
        rows=rows,
        reward=mixture_reward,
        max_completion_tokens=max(task.max_completion_tokens for task in tasks),
        data={f"{task.name} {name}": value for task in tasks for name, value in task.data.items()},
    )
