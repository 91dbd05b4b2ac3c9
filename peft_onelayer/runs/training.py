"""One training run, from settings to an adapter with its run.json; resumable, repeatable."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from peft_onelayer.analysis.movement import movement_of_files, movement_of_model
from peft_onelayer.hub.card import model_card
from peft_onelayer.layers import names_a_file, ranking_without_gain, resolve_layers
from peft_onelayer.probe.race import NothingToLearnError
from peft_onelayer.probe.rate import MOST_PROMPTS, PROMPTS, SAMPLES, informative_completions
from peft_onelayer.records.disk import disk_errors
from peft_onelayer.records.files import CARD, CONFIG, WEIGHTS, file_digest, output, read_fields
from peft_onelayer.records.locate import adapter_folder
from peft_onelayer.records.movement import Movement
from peft_onelayer.records.run import Boost, DataSource, RunRecord, RunResults, RunSettings, differences
from peft_onelayer.records.text import name_blocks
from peft_onelayer.rl.prefix import shared_prefix
from peft_onelayer.rl.recipe import of_full_training
from peft_onelayer.rl.sampling import sampling_of_run
from peft_onelayer.rl.scored import check_backbone
from peft_onelayer.rl.state_cache import GIGABYTE
from peft_onelayer.rl.training import (
    TrainingResult,
    completions_generated,
    generation_steps,
    prompts_needed,
    prompts_of_pass,
    steps_of_epochs,
    train_rows,
)
from peft_onelayer.rollouts.prompts import shaped
from peft_onelayer.tuner import SingleLayerConfig, find_decoder_stack
from peft_onelayer.tuner.mask import Mask
from peft_onelayer.tuner.stack import layer_kinds
from peft_onelayer.tuner.targets import target_names

from .describe import describe_config, describe_machine, describe_model, is_main_process
from .early import check_training
from .first_rewards import FirstRewards
from .folder import RunFolder, step_of
from .judging import Judge
from .log import RunLog
from .models import load_causal_lm, to_device, without_progress_bars
from .plan import TrainingPlan
from .preparation import Preparation
from .progress import Progress
from .recipes import RUN_YAML, recipe_of
from .settings import TrainingSettings

KEPT = "complete checkpoints are kept, and --resume goes on from them"


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        record: what run.json holds.
        model: the trained model, wrapped unless everything was trained.
        tokenizer: the base's.
        folder: with the adapter, or the model.
        is_main_process: whether this is the first process, or the only one, which wrote the folder.
    """

    record: RunRecord
    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    is_main_process: bool

    @property
    def results(self) -> RunResults:
        """What came of it: rewards, verdict, what moved."""
        assert self.record.results is not None  # a run that has ended
        return self.record.results


def train(
    settings: TrainingSettings,
    *,
    resume: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
    keeps: bool = True,
) -> Run:
    """Train what `settings` say with an algorithm of TRL, and write the adapter, its card and run.json to a new folder.

    The same settings give the same weights on the same machine. A run that was killed goes on with `resume` and the
    same settings, and ends with the weights of an uninterrupted one, but for an online run that was killed after it had
    gone once over all prompts (TRL begins their order again), or that has no checkpoint between two generations. With
    several processes (torchrun) each calls it.

    Args:
        resume: go on with the interrupted run in `settings.out`.
        command: for run.json.
        progress: is told what goes on.
        keeps: whether to say what is kept of a run that ends early; False where the caller removes the folder then.

    Raises:
        ValueError: settings that cannot work, a model or data that are not there, or other settings than those of the
            run to be resumed; in one line, most of them before the model is loaded (`TargetError` for the folder).
    """
    out = Path(settings.out)
    with output(out, KEPT) if is_main_process() else disk_errors(out, KEPT), without_progress_bars():
        return _Training(settings, resume, command, progress or Progress(), keeps).run()


class _Training:
    """The steps of `train` in their order, and what they share."""

    def __init__(
        self, settings: TrainingSettings, resume: bool, command: str | None, progress: Progress, keeps: bool
    ) -> None:
        self.settings, self.command, self.progress, self.keeps = settings, command, progress, keeps
        check_training(settings, resume=resume)
        self.folder = RunFolder(Path(settings.out), resume, main=is_main_process())
        self.plan = plan = TrainingPlan(settings, self.folder.checkpoints)
        self.preparation = Preparation(plan, self.folder, progress)
        self.judge = Judge(settings, plan.algorithm, plan.config, plan.task, plan.generate, progress)
        self.init_adapter: Path | None = None

    def run(self) -> Run:
        settings, plan = self.settings, self.plan
        with self.progress.status(f"loading {settings.model} ..."):
            base, tokenizer = load_causal_lm(
                settings.model, settings.revision, trust_remote_code=settings.trust_remote_code
            )
        check_backbone(base, plan.algorithm.trainer_class())
        to_device(base)
        num_layers, chat = len(find_decoder_stack(base).blocks), None
        layers = None
        if settings.init_adapter is not None:
            self.init_adapter, layers = blocks_of_adapter(settings, num_layers, layer_kinds(base))
            self.progress.note(
                f"from {settings.init_adapter}; scores and what changed are given against the base, so that what this "
                "adapter has gained is part of them"
            )
        elif not settings.full and settings.layer != "auto":
            layers = resolve_layers(settings.layer, num_layers, layer_kinds(base))
            if file := ranking_without_gain(settings.layer):
                self.progress.note(f"{file}: no block gained beyond noise there, so the order of its blocks is noise")
        if settings.mask is not None and layers is not None:
            stack, config = find_decoder_stack(base), SingleLayerConfig(layer=layers)
            Mask.read(settings.mask).inside(base, stack.name, layers, target_names(stack, layers, config))
        if plan.task is not None:
            plan.task, chat = shaped(plan.task, tokenizer, plan.shape)
            plan.check_prompts(tokenizer, base)
        if plan.algorithm.note:
            self.progress.note(f"{plan.algorithm.name}: {plan.algorithm.note}")
        record = self._record(base, layers, chat)
        if self.folder.main and self.folder.previous:
            record = self._resumed(record, self.folder.previous)
        if self.folder.previous:
            record = replace(record, resumed_from=self._resumptions(self.folder.previous))
        with self._telling_what_is_kept(), self.folder.running(record):
            if text := recipe_of(settings):
                self.folder.write(RUN_YAML, text)
            if settings.pairs_from_task and plan.task:
                plan.data = self.preparation.pairs(base, tokenizer, plan.task, settings.pairs_from_task)
            if settings.full:
                record = replace(record, why=_why_full(record.settings.boost))
            record = self.preparation.choices(record, base, tokenizer, self.init_adapter)
            try:
                return self._train(record, base, tokenizer, plan.rows())
            except NothingToLearnError as error:
                raise self.preparation.explain(error) from error

    def _resumed(self, record: RunRecord, previous: RunRecord) -> RunRecord:
        """The run that goes on from `previous`, whose settings must be the same; only more steps may be asked for."""
        asked, raised, config = _moved(self._asked(previous), record.settings), 0, self.plan.config
        if config.max_steps > previous.settings.config.get("max_steps", -1) > 0 and self.settings.steps:
            epochs = config.num_train_epochs  # has no effect beside max_steps, and --steps leaves it out
            longer = {"max_steps": config.max_steps, "num_train_epochs": epochs}
            if "save_steps" not in self.plan.recipe.given:
                longer["save_steps"] = config.save_steps  # a share of the steps, in whole generations
            asked = replace(asked, config={**asked.config, **longer})
            raised = previous.settings.config["max_steps"]
        if changed := differences(asdict(asked), asdict(record.settings)):
            raise ValueError(
                f"the run in {self.settings.out} has other settings, so it cannot go on with these: "
                f"{'; '.join(changed)}."
            )
        if raised:
            self._tell_of_more_steps(raised)
        return replace(record, command=previous.command)

    def _resumptions(self, previous: RunRecord) -> list[str] | None:
        """The checkpoints that `previous` was continued from, and the one that it is continued from now."""
        checkpoint, before = self._checkpoint(), previous.settings.config.get("max_steps")
        if checkpoint is None:
            return previous.resumed_from
        of = f" of {before} steps" if before != self.plan.config.max_steps else ""
        return [*(previous.resumed_from or []), checkpoint.name + of]

    def _tell_of_more_steps(self, before: int) -> None:
        """What a run that was begun with fewer steps is, and is not."""
        config = self.plan.config
        schedule = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
        self.progress.note(
            f"{config.max_steps} steps instead of {before}: after its first step, which has the old rate, the "
            f"learning rate follows the {schedule} schedule to the new end, and prompts are drawn from a longer list, "
            f"so this is not the run that {config.max_steps} steps from the start would have been"
        )

    @contextmanager
    def _telling_what_is_kept(self) -> Iterator[None]:
        """On an error or Ctrl-C say which checkpoint is kept, and how to go on from it."""
        try:
            yield
        except BaseException as error:
            if self.keeps and self.folder.main and (last := self._checkpoint()):
                again = shlex.join(["onelayer", "train", "--resume", "--out", str(self.settings.out)])
                launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
                self.progress.note(
                    f"{last.name} is kept in {self.folder.checkpoints}; go on from it with: {again}"
                    + (" (started by the same launcher)" if launched else "")
                )
            elif self.keeps and self.folder.main and not isinstance(error, Exception):
                self.progress.note(f"no checkpoint had been written yet{self._first_checkpoint()}: nothing is kept")
            raise

    def _first_checkpoint(self) -> str:
        """When a run that saves by steps would have written its first one."""
        config = self.plan.config
        if config.save_strategy != SaveStrategy.STEPS or config.max_steps < 1:
            return ""
        return f" (the first comes after step {self._saves_every(config.max_steps)}; --set save_steps=N makes it N)"

    def _saves_every(self, steps: int) -> int:
        """`save_steps` of a run of so many steps in steps, as transformers' TrainerState counts."""
        every = self.plan.config.save_steps
        return math.ceil(every * steps) if every < 1 else int(every)

    def _checkpoint(self) -> Path | None:
        """What a resumption goes on from: the newest checkpoint between two generations, or else the newest."""
        return self.folder.last_checkpoint(generation_steps(self.plan.config)) or self.folder.last_checkpoint()

    def _tell_of_generations(self, steps: int, checkpoint: Path | None) -> None:
        """Say where checkpoints lie within generations, so that a run that goes on there is another one."""
        every, saves = generation_steps(self.plan.config), self._saves_every(steps)
        if self.plan.config.save_strategy == SaveStrategy.STEPS and saves % every:
            self.progress.note(
                f"save_steps={saves}: a generation ends every {every} steps, and only from a checkpoint of such a step "
                f"does a resumed run end as an uninterrupted one; --resume takes the last of those. --set "
                f"save_steps={every} writes no others"
            )
        if checkpoint is None:
            return
        text, last = f"going on from {checkpoint.name}", self.folder.last_checkpoint()
        lost = "is in the middle of a generation, whose completions no checkpoint holds"
        if step_of(checkpoint) % every:
            text += f", which {lost}, and there is none at its end: this run does not end as an uninterrupted one"
        elif last and last != checkpoint:
            text += f" and not from {last.name}, which {lost}: from there it would not end as an uninterrupted run"
        self.progress.note(text)

    def _record(self, base: PreTrainedModel, layers: list[int] | None, chat: bool | None) -> RunRecord:
        settings, task, data = self.settings, self.plan.task, self.plan.data
        layer = settings.layer if isinstance(settings.layer, (int, str)) else list(settings.layer)
        if names_a_file(layer):
            layer = layers or layer
        return RunRecord(
            command=self.command,
            settings=RunSettings(
                model=describe_model(base),
                algorithm=self.plan.algorithm.name,
                trainer=self.plan.algorithm.trainer,
                task=DataSource(task.name, dict(task.data), chat, settings.system or None, settings.shots or None)
                if task
                else None,
                seed=settings.seed,
                config=describe_config(
                    of_full_training(self.plan.config, self.plan.recipe, base.dtype)
                    if settings.full
                    else self.plan.config
                ),
                dataset=DataSource(str(settings.dataset), dict(data.data)) if data and not task else None,
                layer=None if settings.full else layer,
                full=settings.full,
                top_entropy=settings.top_entropy,
                pairs_from_task=settings.pairs_from_task,
                sampling=dict(settings.sampling) or None,
                trust_remote_code=settings.trust_remote_code or None,
                mask=self.plan.mask,
                boost=self._boost(base),
                init_adapter=_describe_adapter(str(settings.init_adapter), self.init_adapter)
                if self.init_adapter
                else None,
                eval_problems=settings.eval_problems,
                eval_every=settings.eval_every,
                keep=settings.keep if settings.eval_every else None,
                also=list(settings.also) or None,
            ),
            machine=describe_machine(),
            status="unfinished",
            layers=layers,
            why=None if layers is None else "those of the adapter" if self.init_adapter else "chosen by the user",
        )

    def _boost(self, base: PreTrainedModel) -> Boost | None:
        """Which blocks have a learning rate of their own."""
        if self.plan.boost is None:
            return None
        asked, factor = self.plan.boost
        return Boost(resolve_layers(asked, len(find_decoder_stack(base).blocks), layer_kinds(base)), factor)

    def _asked(self, previous: RunRecord) -> RunSettings:
        """The settings of the interrupted run as they were asked for: with the learning rate before one was found."""
        if previous.learning_rate is None:
            return previous.settings
        config = {**previous.settings.config, "learning_rate": previous.learning_rate.asked}
        return replace(previous.settings, config=config)

    def _train(
        self,
        record: RunRecord,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[dict[str, Any]],
    ) -> Run:
        """Train the record's blocks, and put the result and the finished run.json into the folder."""
        self.judge.before(base, tokenizer, self.plan.task, self.plan.shape)
        start = time.perf_counter()
        config, folder, layers, boost = self.plan.config, self.folder, record.layers, record.settings.boost
        steps = config.max_steps
        if steps < 1:
            steps = steps_of_epochs(self.plan.algorithm, config, len(rows))
        self.plan.save_between_generations(config, steps)
        checkpoint = self._checkpoint() if folder.previous else None
        self._tell_of_generations(steps, checkpoint)
        if checkpoint:
            drawn = prompts_needed(self.plan.algorithm, config, steps=step_of(checkpoint) + 1)
            of_pass = prompts_of_pass(self.plan.algorithm, config, len(rows))
            if self.plan.algorithm.group_size and drawn > of_pass:
                self.progress.note(
                    f"the run has gone once over its {of_pass} prompts; TRL begins their order again where a run is "
                    "resumed, so this one goes on with other prompts than an uninterrupted run"
                )
        what = "all blocks" if layers is None else name_blocks(layers)
        with folder.publishing() as published, folder.scratch() as scratch:
            log = RunLog(folder.path, step_of(checkpoint) if checkpoint else None) if folder.main else None
            logged: set[str] = set()

            def on_log(step: int, logs: Mapping[str, float]) -> None:
                logged.update(logs)
                if log:
                    log.write(step, logs)

            with self.progress.bar(f"training {what}", steps, "step") as update:
                result = train_rows(
                    base,
                    tokenizer,
                    self.plan.recipe,
                    config,
                    rows,
                    layers=layers,
                    task=self.plan.task,
                    resume_from=checkpoint,
                    init_adapter=self.init_adapter,
                    save_to=scratch,
                    on_step=lambda step, value: update(
                        step, f"{'reward' if 'reward' in logged else 'loss'} {value:.3g}"
                    ),
                    on_log=on_log,
                    mask=self.settings.mask,
                    share=partial(
                        shared_prefix,
                        cache_dir=self.settings.prefix_cache,
                        cache_bytes=round(self.settings.prefix_cache_gb * GIGABYTE),
                    ),
                    boost=None if boost is None else (boost.layers, boost.factor),
                    callbacks=[
                        *self.judge.during(folder.checkpoints, folder.main),
                        *self._first_rewards(base, tokenizer),
                    ],
                    at_end=self.judge.choose,
                )
            seconds = round(time.perf_counter() - start, 1)
            for file in sorted(scratch.iterdir()):
                # The tokenizer is the base's, and training_args.bin is a pickle of what run.json holds.
                if file.name in (CONFIG, WEIGHTS) or (layers is None and file.name != "training_args.bin"):
                    shutil.move(file, published / file.name)
            results = RunResults(
                steps=result.steps,
                rewards=result.rewards,
                reward_steps=_where_some_have_none(result),
                losses=result.losses,
                tokens_generated=result.tokens_generated,
                tokens_trained=result.tokens_trained,
                seconds=seconds,
                sha256={file.name: file_digest(file) for file in sorted(published.glob("*.safetensors"))},
                movement=self._movement(result.model, published),
                **self.judge.after(result, full=layers is None),
            )
            record = replace(record, status="finished", results=results)
            if folder.main:  # the trainer of another process saves nothing that a card could be of
                (published / CARD).write_text(_card(record, published), encoding="utf-8")
        if not folder.last_checkpoint():  # from which a run with more steps goes on, and its best state with it
            self.judge.watch.remove()
        folder.write_record(record)
        return Run(record, result.model, tokenizer, folder.path, folder.main)

    def _first_rewards(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[TrainerCallback]:
        """What looks at the first rewards of a run whose learning rate was given: nothing else sampled its task."""
        plan, task = self.plan, self.plan.task
        group = plan.algorithm.group_size
        if task is None or group is None or "learning_rate" not in plan.recipe.given:
            return []
        most = MOST_PROMPTS
        if plan.config.max_steps > 0:  # as many completions as the run has, or those of a few prompts
            most = max(PROMPTS, min(most, completions_generated(plan.config, plan.config.max_steps) // SAMPLES))
        sampling = replace(sampling_of_run(plan.algorithm, plan.config), batch_size=plan.generate)

        def look() -> None:
            self.progress.note(
                f"no two completions of a prompt differ in reward so far: up to {most * SAMPLES} more of the base show "
                "whether this task can teach it anything"
            )
            informative_completions(base, tokenizer, task, sampling, prompts=most, enough=1)

        return [FirstRewards(prompts_needed(plan.algorithm, plan.config, steps=1), look)]

    def _movement(self, model: PeftModel | PreTrainedModel, published: Path) -> Movement | None:
        """How far the trained tensors moved, and a word where some did not; None where that cannot be measured."""
        if isinstance(model, PeftModel):
            movement = movement_of_model(model)
        elif self.folder.main:
            movement = movement_of_files(self.settings.model, published, revision=self.settings.revision)
        else:
            movement = None
        for line in [movement.summary(), *movement.notes()] if movement else []:
            self.progress.note(line)
        return movement


def _where_some_have_none(result: TrainingResult) -> list[int] | None:
    """The steps whose reward was logged; None where every step's was, or none."""
    every = result.reward_steps == list(range(1, result.steps + 1))
    return None if every else result.reward_steps or None


def blocks_of_adapter(settings: TrainingSettings, num_layers: int, kinds: list[str] | None) -> tuple[Path, list[int]]:
    """The folder of the adapter that a run starts from, and its blocks.

    Raises:
        ValueError: no adapter of this method, or other blocks than --layer says.
    """
    name = str(settings.init_adapter)
    folder = adapter_folder(name)
    fields = read_fields(folder / CONFIG)
    if fields.get("peft_type") != "SINGLE_LAYER" or not (folder / WEIGHTS).exists():
        raise ValueError(f"--init-adapter {name} is no adapter that onelayer train wrote; export keeps its folder")
    layers = resolve_layers(fields.get("layer_indices") or fields["layer"], num_layers)
    if settings.layer != "auto" and resolve_layers(settings.layer, num_layers, kinds) != layers:
        raise ValueError(
            f"--init-adapter {name} holds {name_blocks(layers)} and --layer {settings.layer} names others; "
            "leave out --layer"
        )
    return folder, layers


def _why_full(boost: Boost | None) -> str:
    if boost is None:
        return "the full-parameter baseline"
    return f"full-parameter training, {name_blocks(boost.layers)} at {boost.factor:g} times the learning rate"


def _moved(before: RunSettings, now: RunSettings) -> RunSettings:
    """The settings `before` with the names that files have `now`, where their digests are the same: they may have
    moved."""
    if before.model.sha256 and before.model.sha256 == now.model.sha256:
        before = replace(before, model=now.model)
    for name in ("task", "dataset"):
        old, new = getattr(before, name), getattr(now, name)
        if old and new and old.data == new.data and _is_of_files(old):
            before = replace(before, **{name: replace(old, name=new.name)})
    if before.init_adapter and now.init_adapter and before.init_adapter[WEIGHTS] == now.init_adapter[WEIGHTS]:
        before = replace(before, init_adapter=now.init_adapter)
    return before


def _is_of_files(source: DataSource) -> bool:
    """Whether all that is known of the data are digests of files: versions and revisions go with a name."""
    return bool(source.data) and all(value.startswith("sha256:") for value in source.data.values())


def _describe_adapter(name: str, folder: Path) -> dict[str, str]:
    """The adapter that a run starts from: its name and the SHA-256 of its weights."""
    return {"name": name, WEIGHTS: file_digest(folder / WEIGHTS)}


def _card(record: RunRecord, folder: Path) -> str:
    """The model card: what was trained and how to repeat it; results are `onelayer eval`'s, and `push` adds them."""
    config = None if record.layers is None else read_fields(folder / CONFIG)
    return model_card(config, record, local_base=bool(record.settings.model.sha256))
