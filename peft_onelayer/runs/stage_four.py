"""CPI-FT's fourth stage (arXiv 2508.21741): after the fusion a short training on all tasks, with frozen core regions.

The fused adapter is merged into a copy of the base, on which the entries outside of the core regions train. What comes
out is one adapter of the base that both were made from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from peft_onelayer.adapter.combine import Combined, combine_adapters
from peft_onelayer.adapter.merge import merge_into_checkpoint
from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.records.files import CONFIG, WEIGHTS, check_folder, output, scratch_directory, staged_directory
from peft_onelayer.tasks import Task, open_task
from peft_onelayer.tasks.mixture import mixture

from .progress import Progress
from .settings import TrainingSettings
from .training import train


def combine_with_stage_four(
    adapters: Sequence[str | Path],
    out: str | Path,
    tasks: Sequence[str | Task],
    *,
    steps: int,
    learning_rate: float | None = None,
    config: dict[str, Any] | None = None,
    training_seed: int = 0,
    chat: bool | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Combined:
    """As `combine_adapters` with method "cpi", with a fourth stage on a balanced mixture of `tasks`.

    Args:
        adapters: as `combine_adapters` takes them.
        out: a folder that does not exist yet, or an empty one.
        tasks: of the adapters: names for `load_task`, or tasks.
        steps: optimizer steps of the fourth stage, of GRPO.
        learning_rate: None for one that is found, as by `train`.
        config: values by field of the algorithm's TRL configuration.
        training_seed: of data, sampling and training.
        chat: give prompts as messages of a user; None for: if the tokenizer has a chat template.
        progress: is told what goes on.
        options: for `combine_adapters`.

    Returns:
        What the fusion gave; the adapter in `out` is the trained one.

    Raises:
        ValueError: as `combine_adapters` and `train`, or a task that plays through an environment.
    """
    mixed = mixture([open_task(task) for task in tasks])
    check_folder(Path(out))
    with output(Path(out)), scratch_directory(Path(out)) as scratch:
        fused, mask = scratch / "fused", scratch / "mask.safetensors"
        found = combine_adapters(adapters, fused, "cpi", mask_out=mask, **options)
        merge_into_checkpoint(found.base, fused, scratch / "base", allow_other_base=True)
        train(
            TrainingSettings(
                model=str(scratch / "base"),
                task=mixed,
                layer=found.layers,
                mask=str(mask),
                out=scratch / "run",
                steps=steps,
                learning_rate=learning_rate,
                config=config or {},
                seed=training_seed,
                chat=chat,
                eval_problems=0,
            ),
            progress=progress,
            keeps=False,
        )
        before, after = open_adapter(fused), open_adapter(scratch / "run")
        trained = set(after.names)
        tensors = {
            next(iter(before.keys[name].values())): (after if name in trained else before).tensor(name)
            for name in before.names
        }
        fields = before.config
        fields["combined"] = {**fields["combined"], "stage_four": mixed.name}
        with staged_directory(Path(out)) as staging:
            save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
            (staging / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
    return replace(found, folder=Path(out))
