"""The learning signal by token entropy, from settings to figures: of a base, or of the adapter that a run left."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from peft import PeftModel, get_peft_model

from peft_onelayer.analysis.entropy import EntropySignal, signal_by_entropy
from peft_onelayer.records.locate import adapter_folder
from peft_onelayer.rollouts.prompts import check_prompt, shaped
from peft_onelayer.tasks import open_task
from peft_onelayer.tuner import SingleLayerConfig

from .as_run import as_in_run, run_in
from .early import check_entropy
from .models import load_causal_lm, quiet_logs, to_device, without_progress_bars
from .progress import Progress, Update
from .settings import EntropySettings


def entropy(settings: EntropySettings, *, progress: Progress | None = None) -> EntropySignal:
    """Measure which tokens the gradient of a block comes from.

    Prompts are given and completions sampled as by the run that made the adapter (or the model, where `settings.model`
    is a folder of `train --full`), by the run.json beside it, unless the settings say otherwise.

    Args:
        settings: what is asked for.
        progress: is told what goes on.

    Raises:
        ValueError: in one line: settings that cannot work, a model, adapter or data that are not there or do not fit.
    """
    progress = progress or Progress()
    check_entropy(settings)
    with quiet_logs():
        folder = None if settings.adapter is None else adapter_folder(settings.adapter)
        task = open_task(settings.task, settings.dataset, settings.reward, unsafe=settings.unsafe)
    if task.environment_factory is not None:
        raise ValueError(f"task {task.name} plays through an environment; measure a task of one turn.")
    run = run_in(folder or Path(settings.model).expanduser())
    shape, sampling = as_in_run(run, task, settings, progress)
    with without_progress_bars(), progress.status(f"loading {settings.model} ..."):
        base, tokenizer = load_causal_lm(
            settings.model, settings.revision, trust_remote_code=settings.trust_remote_code
        )
    to_device(base)
    task, _ = shaped(task, tokenizer, shape)
    rows = task.rows("train", settings.problems, settings.seed)
    check_prompt(rows[0], tokenizer, settings.model, settings.sampling.get("chat_template_kwargs"))
    layer = settings.layer if isinstance(settings.layer, (int, str)) else list(settings.layer)
    if folder is None:
        model = get_peft_model(base, SingleLayerConfig(layer=layer, task_type="CAUSAL_LM"))
    else:
        allowed = {"allow_other_base": True} if settings.allow_other_base else {}
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=True, **allowed)
    model.eval()
    with progress.bar("sampling", len(rows) * settings.samples, "completion") as update:
        return signal_by_entropy(
            model,
            tokenizer,
            task,
            rows,
            sampling,
            share=settings.share,
            micro_batch=settings.micro_batch,
            on_progress=partial(_report, update),
        )


def _report(update: Update, done: int) -> None:
    update(done, "")
