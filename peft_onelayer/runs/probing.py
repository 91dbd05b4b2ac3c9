"""One ranking of the blocks, from settings to layer_profile.json and its plot."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from peft_onelayer.hub.profiles import load_profile
from peft_onelayer.layers import resolve_layers
from peft_onelayer.probe.race import NothingToLearnError
from peft_onelayer.records.files import output, write_whole
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.rl.algorithms import load_algorithm
from peft_onelayer.rl.recipe import make_recipe, refuse_fields, refuse_without_effect
from peft_onelayer.rl.sampling import sampling_of_run
from peft_onelayer.rl.training import rows_of_step
from peft_onelayer.rollouts.prompts import Shape, check_prompt, shaped, shown_rows
from peft_onelayer.tasks import open_task
from peft_onelayer.tuner import find_decoder_stack
from peft_onelayer.tuner.stack import layer_kinds

from .early import check_probe, plot_beside
from .models import load_causal_lm, load_skeleton, quiet_logs, to_device, without_progress_bars
from .progress import Progress
from .ranking import explain, rank_blocks
from .settings import GENERATE, PROBE_OPTIONS, ProbeSettings


def probe(settings: ProbeSettings, *, progress: Progress | None = None) -> LayerRanking:
    """Rank the blocks of a model for a task, and write the ranking to `settings.out`, its plot beside it.

    Args:
        progress: is told what goes on.

    Raises:
        ValueError: in one line: settings that cannot work, a model or data that are not there; as `probe_layers`.
    """
    with nullcontext() if settings.out is None else output(Path(settings.out)):
        return _probe(settings, progress or Progress())


def _probe(settings: ProbeSettings, progress: Progress) -> LayerRanking:
    check_probe(settings)
    algorithm = load_algorithm(settings.algorithm)
    sourced = bool(settings.task or settings.dataset)
    with without_progress_bars():
        with quiet_logs():
            task = (
                open_task(settings.task, settings.dataset, settings.reward, unsafe=settings.unsafe) if sourced else None
            )
            profile = load_profile(settings.profile) if settings.profile else None
        if task is not None:
            shown_rows(task, settings.shots)
        refuse_fields(settings.config, PROBE_OPTIONS)
        refuse_without_effect(settings.config, algorithm)
        recipe = make_recipe(
            algorithm,
            task,
            settings.config,
            prompts=settings.prompts,
            completions=settings.completions,
            learning_rate=settings.learning_rate,
        )
        config = recipe.config(output_dir="unused")
        sampling = sampling_of_run(algorithm, config)  # before the model is loaded
        out = None if settings.out is None else Path(settings.out)
        if profile is not None:
            progress.note(f"the profile is of {profile.model}: {profile.method}, {profile.task}; {profile.source}")
        with progress.status(f"loading {settings.model} ..."):
            load = load_causal_lm if settings.runs else load_skeleton  # a depth needs no weights
            base, tokenizer = load(settings.model, settings.revision, trust_remote_code=settings.trust_remote_code)
        if settings.runs:
            to_device(base)
        depth = len(find_decoder_stack(base).blocks)
        layers = None if settings.layers == "all" else resolve_layers(settings.layers, depth, layer_kinds(base))
        if task is not None:
            shape = Shape(settings.chat, settings.system, settings.shots or 0, sampling.chat_template_kwargs)
            task, _ = shaped(task, tokenizer, shape)
            rows, plays = rows_of_step(task, recipe, config, settings.seed), task.environment_factory is not None
            check_prompt(rows[0], tokenizer, settings.model, sampling.chat_template_kwargs, plays=plays)
        try:
            ranking = rank_blocks(
                base,
                tokenizer,
                task,
                progress,
                recipe=recipe,
                training_steps=settings.steps,
                seed=settings.seed,
                method=settings.method,
                budget=settings.budget,
                layers=layers,
                profile=profile,
                batch_size=max(GENERATE, config.per_device_train_batch_size),
            )
        except NothingToLearnError as error:
            assert task is not None
            raise explain(error, task, algorithm, progress) from error
    if out is not None:
        from peft_onelayer.report.plots import plot_ranking

        write_whole(out, ranking.to_json())
        plot_ranking(ranking, plot_beside(out), ", ".join(filter(None, (settings.method, ranking.task))))
    return ranking
