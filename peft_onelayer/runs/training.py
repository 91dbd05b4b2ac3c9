"""One training run, from settings to an adapter with its run.json; resumable, repeatable."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from peft_onelayer.analysis.movement import movement_of_files, movement_of_model
from peft_onelayer.hub.card import model_card
from peft_onelayer.layers import resolve_layers
from peft_onelayer.probe.race import NothingToLearnError
from peft_onelayer.probe.rate import find_learning_rate, informative_completions
from peft_onelayer.probe.updates import FOUND_RATE_KL
from peft_onelayer.records.disk import disk_errors
from peft_onelayer.records.files import CARD, CONFIG, PROFILE, WEIGHTS, file_digest, output, read_fields, read_text
from peft_onelayer.records.locate import adapter_folder
from peft_onelayer.records.movement import Movement
from peft_onelayer.records.privacy import holds_secrets
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.run import DataSource, LearningRate, RunRecord, RunResults, RunSettings, differences
from peft_onelayer.records.text import name_blocks
from peft_onelayer.rl.algorithms import Algorithm, load_algorithm
from peft_onelayer.rl.preferences import OfflineData, load_preferences, pairs_from_rollouts
from peft_onelayer.rl.recipe import Recipe, make_recipe, refuse_fields, refuse_without_effect
from peft_onelayer.rl.sampling import PAIRS_OPTIONS, sampling_of_run, with_given
from peft_onelayer.rl.training import completions_per_step, prompts_needed, steps_of_epochs, train_rows
from peft_onelayer.rollouts.completions import show_completions, why_equal
from peft_onelayer.rollouts.prompts import check_prompt, with_chat_prompts
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task, open_task
from peft_onelayer.tuner import find_decoder_stack

from .describe import describe_config, describe_machine, describe_model, is_main_process
from .first_rewards import FirstRewards
from .folder import RunFolder, step_of
from .judging import Judge
from .log import RunLog
from .models import check_model_name, load_causal_lm, to_device, without_progress_bars
from .progress import Progress
from .ranking import describe, rank_blocks
from .recipes import RUN_YAML, recipe_of
from .reporting import reporters
from .settings import GENERATE, STEPS, TRAINING_OPTIONS, TrainingSettings, check_ranking

SAMPLES_PER_PAIR = 8
PAIRS = "pairs.jsonl"
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
    same settings, and ends with the weights of an uninterrupted one. With several processes (torchrun) each calls it.

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
        check_ranking(settings.method, settings.budget)
        if settings.method == "profile":
            raise ValueError("--method profile is of onelayer probe, which says what to give --layer")
        self.task = _open_task(settings)
        if settings.sampling and not settings.pairs_from_task:
            raise ValueError(
                "--sampling is of --pairs-from-task; --set has the fields that an online algorithm samples by"
            )
        self.recipe = self._recipe(self.task)
        self.algorithm: Algorithm = self.recipe.algorithm
        _check_choice(settings, self.algorithm, self.task)
        self.folder = RunFolder(Path(settings.out), resume, main=is_main_process())
        self.config = self._config()
        self.sampling = self._sampling()
        self.judge = Judge(settings, self.algorithm, self.config, self.task, self.generate, self.progress)
        self.data: OfflineData | None = None
        self.init_adapter: Path | None = None
        if settings.dataset and self.task is None:
            self.data = load_preferences(settings.dataset, self.algorithm.data)
        check_model_name(settings.model)

    def _recipe(self, task: Task | None) -> Recipe:
        own = TRAINING_OPTIONS
        if self.settings.top_entropy is not None:
            own = {**own, "top_entropy_quantile": "--top-entropy"}
        refuse_fields(self.settings.config, own)
        refuse_without_effect(self.settings.config, load_algorithm(self.settings.algorithm))
        if self.settings.steps and "num_train_epochs" in self.settings.config:
            raise ValueError("--steps and --set num_train_epochs both say how long to train; give one of them")
        return make_recipe(
            self.settings.algorithm,
            task,
            self.settings.config,
            prompts=self.settings.prompts,
            completions=self.settings.completions,
            learning_rate=self.settings.learning_rate,
            top_entropy=self.settings.top_entropy,
        )

    def _config(self) -> TrainingArguments:
        settings, given = self.settings, self.recipe.given
        defaults: dict[str, Any] = {"logging_steps": 1, "disable_tqdm": True, "save_total_limit": 2}
        defaults["save_steps"] = 0.1  # of all steps
        if settings.full:  # TRL loads the reference model anew
            if settings.revision:
                defaults["model_init_kwargs"] = {"revision": settings.revision}
            if settings.trust_remote_code:
                defaults["trust_remote_code"] = True
        fixed: dict[str, Any] = {
            "output_dir": str(self.folder.checkpoints),
            "seed": settings.seed,
            "max_steps": settings.steps or (STEPS if self.algorithm.online else -1),
        }
        if settings.report_to != "none" and holds_secrets(given):
            raise ValueError(
                "--set gives a secret, which --report-to would log with all settings; leave one of them out, or give "
                "the secret by an environment variable"
            )
        fixed["report_to"] = reporters(settings.report_to)
        make = partial(self.recipe.config, **{k: v for k, v in defaults.items() if k not in given})
        if self.algorithm.online and "num_train_epochs" in given:
            fixed["max_steps"] = self._steps_of_epochs(make(**fixed | {"max_steps": 1}))
        return make(**fixed)

    def _steps_of_epochs(self, config: TrainingArguments) -> int:
        """The optimizer steps of `num_train_epochs` over the task's train split, all of which is then drawn."""
        assert self.task is not None
        size = self.task.train_size
        if size is None:
            raise ValueError(
                f"num_train_epochs needs data with an end, and task {self.task.name} draws prompts without one; use "
                "--steps"
            )
        steps = steps_of_epochs(self.algorithm, config, size)
        if steps < 1:
            raise ValueError(
                f"{size} prompts, num_train_epochs={config.num_train_epochs:g}: no step; use more epochs or a smaller "
                "--set per_device_train_batch_size"
            )
        return steps

    def _sampling(self) -> Sampling | None:
        """How the ranking or the pairs are sampled, as the run itself is; None where neither is wanted."""
        settings = self.settings
        if not (settings.pairs_from_task or (settings.layer == "auto" and not settings.full)):
            # What vLLM alone understands is no fault of a run that samples with it.
            return None if self.config.to_dict().get("use_vllm") else sampling_of_run(self.algorithm, self.config)
        own = sampling_of_run(self.algorithm, self.config)
        own = replace(own, samples=SAMPLES_PER_PAIR, seed=settings.seed, batch_size=self.generate)
        return with_given(own, settings.sampling, PAIRS_OPTIONS)

    @property
    def generate(self) -> int:
        """Completions at a time where there are no gradients."""
        return max(GENERATE, self.config.per_device_train_batch_size)

    def run(self) -> Run:
        settings = self.settings
        with self.progress.status(f"loading {settings.model} ..."):
            base, tokenizer = load_causal_lm(
                settings.model, settings.revision, trust_remote_code=settings.trust_remote_code
            )
        to_device(base)
        num_layers, chat = len(find_decoder_stack(base).blocks), None
        layers = None
        if settings.init_adapter is not None:
            layers = self._blocks_of_adapter(settings.init_adapter, num_layers)
        elif not settings.full and settings.layer != "auto":
            layers = resolve_layers(settings.layer, num_layers)
        if self.task is not None:
            self.task, chat = with_chat_prompts(self.task, tokenizer, settings.chat)
            self._check_prompts(tokenizer)
        if self.algorithm.note:
            self.progress.note(f"{self.algorithm.name}: {self.algorithm.note}")
        record = self._record(base, layers, chat)
        previous, raised = self.folder.previous, 0
        if self.folder.main and previous:
            asked = self._asked(previous)
            if self.config.max_steps > previous.settings.config.get("max_steps", -1) > 0 and settings.steps:
                asked = replace(asked, config={**asked.config, "max_steps": self.config.max_steps})
                raised = previous.settings.config["max_steps"]
            if changed := differences(asdict(asked), asdict(record.settings)):
                raise ValueError(
                    f"the run in {settings.out} has other settings, so it cannot go on with these: "
                    f"{'; '.join(changed)}."
                )
            record = replace(record, command=previous.command)
            if raised:
                self._tell_of_more_steps(raised)
            elif previous.status == "finished":
                raise ValueError(
                    f"the run in {settings.out} is finished; choose a new output folder, or raise --steps above "
                    f"{self.config.max_steps} to train it further."
                )
        with self._telling_what_is_kept(), self.folder.running(record):
            if text := recipe_of(settings):
                self.folder.write(RUN_YAML, text)
            if settings.pairs_from_task and self.task:
                self.data = self._pairs(base, tokenizer, self.task, settings.pairs_from_task)
            if settings.full:
                record = replace(record, why="the full-parameter baseline")
            if self.algorithm.online and self.task:
                try:
                    if record.layers is None and not settings.full:
                        record = self._chosen(record, base, tokenizer, self.task)
                    if "learning_rate" not in self.recipe.given and record.learning_rate is None:
                        record = self._with_found_rate(record, base, tokenizer, self.task)
                except NothingToLearnError as error:
                    raise self._explain(error) from error
                self.folder.write_record(record)
            if self.data is not None:
                rows = self.data.rows
            else:
                assert self.task is not None
                needed = prompts_needed(self.algorithm, self.config)
                if "num_train_epochs" in self.recipe.given and self.task.train_size:
                    needed = self.task.train_size
                rows = self.task.rows("train", needed, settings.seed)
            try:
                return self._train(record, base, tokenizer, rows)
            except NothingToLearnError as error:
                raise self._explain(error) from error

    def _tell_of_more_steps(self, before: int) -> None:
        """What a run that was begun with fewer steps is, and is not."""
        schedule = getattr(self.config.lr_scheduler_type, "value", self.config.lr_scheduler_type)
        self.progress.note(
            f"{self.config.max_steps} steps instead of {before}: after its first step, which has the old rate, the "
            f"learning rate follows the {schedule} schedule to the new end, and prompts are drawn from a longer list, "
            f"so this is not the run that {self.config.max_steps} steps from the start would have been"
        )

    @contextmanager
    def _telling_what_is_kept(self) -> Iterator[None]:
        """On an error or Ctrl-C say which checkpoint is kept, and how to go on from it."""
        try:
            yield
        except BaseException as error:
            if self.keeps and self.folder.main and (last := self.folder.last_checkpoint()):
                again = shlex.join(["onelayer", "train", "--resume", "--out", str(self.settings.out)])
                launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
                self.progress.note(
                    f"{last.name} is kept in {self.folder.checkpoints}; go on from it with: {again}"
                    + (" (started by the same launcher)" if launched else "")
                )
            elif self.keeps and self.folder.main and not isinstance(error, Exception):
                self.progress.note("no checkpoint had been written yet")
            raise

    def _blocks_of_adapter(self, name: str, num_layers: int) -> list[int]:
        """The blocks of the adapter to start from, of which it keeps the folder and the digest.

        Raises:
            ValueError: no adapter of this method, or other blocks than --layer says.
        """
        self.init_adapter = adapter_folder(name)
        fields = read_fields(self.init_adapter / CONFIG)
        if fields.get("peft_type") != "SINGLE_LAYER" or not (self.init_adapter / WEIGHTS).exists():
            raise ValueError(f"--init-adapter {name} is no adapter that onelayer train wrote; export keeps its folder")
        layers = resolve_layers(fields["layer"], num_layers)
        if self.settings.layer != "auto" and resolve_layers(self.settings.layer, num_layers) != layers:
            raise ValueError(
                f"--init-adapter {name} holds {name_blocks(layers)} and --layer {self.settings.layer} names others; "
                "leave out --layer"
            )
        return layers

    def _check_prompts(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse prompts that are too few for a step or that the tokenizer cannot write."""
        assert self.task is not None
        needed = prompts_needed(self.algorithm, self.config, steps=1) if self.algorithm.online else 1
        rows = self.task.rows("train", needed, self.settings.seed)
        if len(rows) < needed:
            raise ValueError(
                f"one step draws {needed} prompts and task {self.task.name} has {len(rows)}; use a smaller "
                "--set per_device_train_batch_size"
            )
        kwargs = self.sampling.chat_template_kwargs if self.sampling else self.recipe.given.get("chat_template_kwargs")
        check_prompt(rows[0], tokenizer, self.settings.model, kwargs or {})

    def _record(self, base: PreTrainedModel, layers: list[int] | None, chat: bool | None) -> RunRecord:
        settings, task = self.settings, self.task
        layer = settings.layer if isinstance(settings.layer, (int, str)) else list(settings.layer)
        return RunRecord(
            command=self.command,
            settings=RunSettings(
                model=describe_model(base),
                algorithm=self.algorithm.name,
                trainer=self.algorithm.trainer,
                task=DataSource(task.name, dict(task.data), chat) if task else None,
                seed=settings.seed,
                config=describe_config(self.config),
                dataset=DataSource(str(settings.dataset), dict(self.data.data)) if self.data and not task else None,
                layer=None if settings.full else layer,
                full=settings.full,
                top_entropy=settings.top_entropy,
                pairs_from_task=settings.pairs_from_task,
                sampling=dict(settings.sampling) or None,
                trust_remote_code=settings.trust_remote_code or None,
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

    def _asked(self, previous: RunRecord) -> RunSettings:
        """The settings of the interrupted run as they were asked for: with the learning rate before one was found."""
        if previous.learning_rate is None:
            return previous.settings
        config = {**previous.settings.config, "learning_rate": previous.learning_rate.asked}
        return replace(previous.settings, config=config)

    def _kept_ranking(self) -> LayerRanking | None:
        path = self.folder.path / PROFILE
        return LayerRanking.from_json(read_text(path), str(path)) if path.exists() else None

    def _chosen(
        self, record: RunRecord, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
    ) -> RunRecord:
        """The run with the blocks and the learning rate that a ranking chooses; it is kept for a resumption."""
        ranking = self._kept_ranking()
        if ranking is None:
            ranking = rank_blocks(
                base,
                tokenizer,
                task,
                self.progress,
                seed=self.settings.seed,
                training_steps=self.config.max_steps,
                recipe=self.recipe,
                method=self.settings.method,
                budget=self.settings.budget,
                batch_size=self.generate,
            )
            ranking = _of_first_process(ranking)
            self.folder.write(PROFILE, ranking.to_json())
        rate, why = ranking.choice_learning_rate, describe(ranking)
        if rate is not None and rate != self.config.learning_rate:
            why.insert(1, f"trained at the learning rate {rate:.3g} that the ranking found for it")
            record = self._with_rate(record, rate, LearningRate(self.config.learning_rate, "ranking"))
        why_text = "; ".join(why)
        self.progress.note(why_text)
        return replace(record, layers=ranking.choice, why=why_text)

    def _with_found_rate(
        self, record: RunRecord, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
    ) -> RunRecord:
        """The run with a learning rate that moves the policy far enough; on a resumption the one found before."""
        previous = self.folder.previous
        if previous and previous.learning_rate:
            return self._with_rate(record, previous.settings.config["learning_rate"], previous.learning_rate)
        with self.progress.status("finding a learning rate ..."):
            found = _of_first_process(
                find_learning_rate(
                    base,
                    tokenizer,
                    task,
                    record.layers,
                    self.recipe,
                    seed=self.settings.seed,
                    batch_size=self.generate,
                )
            )
        self.progress.note(
            f"learning rate {found.learning_rate:g}: a first step at it moves the policy by {found.kl:.2g} nats a token"
            + ("" if found.reached else f", and none was found that moves it by {' to '.join(map(str, FOUND_RATE_KL))}")
            + "; --learning-rate sets another"
        )
        how = {name: value for name, value in asdict(found).items() if name != "learning_rate"}
        return self._with_rate(
            record, found.learning_rate, LearningRate(self.config.learning_rate, "first step", **how)
        )

    def _with_rate(self, record: RunRecord, rate: float, how: LearningRate) -> RunRecord:
        self.config.learning_rate = rate
        config = {**record.settings.config, "learning_rate": rate}
        return replace(record, settings=replace(record.settings, config=config), learning_rate=how)

    def _explain(self, error: NothingToLearnError) -> ValueError:
        """What to say, in one line, of completions that teach nothing; three of them are shown."""
        assert self.task is not None
        shown = show_completions(error.rollouts[:: max(1, len(error.rollouts) // 3)][:3], self.task)
        for line in shown.splitlines():
            self.progress.note(line)
        return ValueError(f"{error}. The likely reason: {why_equal(error.rollouts, self.task)}.")

    def _pairs(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, prompts: int
    ) -> OfflineData:
        """Offline data from graded rollouts of the base, kept in pairs.jsonl so that a resumed run has the same."""
        assert self.sampling is not None
        kept = self.folder.path / PAIRS
        if kept.exists():
            lines = kept.read_text(encoding="utf-8").splitlines()
            return OfflineData([json.loads(line) for line in lines], task.data, {})
        with self.progress.bar(f"sampling {prompts} prompts", prompts * SAMPLES_PER_PAIR, "completion") as update:
            data = pairs_from_rollouts(
                base,
                tokenizer,
                task,
                task.rows("train", prompts, self.settings.seed),
                self.algorithm.data,
                self.sampling,
                kwargs_as_column="chat_template_kwargs" not in self.config.to_dict(),
                on_progress=lambda done: update(done, ""),
            )
        data = _of_first_process(data)
        self.progress.note(", ".join(f"{count} {what}" for what, count in data.counts.items()))
        self.folder.write(PAIRS, "".join(json.dumps(row) + "\n" for row in data.rows))
        return data

    def _train(
        self,
        record: RunRecord,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[dict[str, Any]],
    ) -> Run:
        """Train the record's blocks, and put the result and the finished run.json into the folder."""
        self.judge.before(base, tokenizer, self.task)
        start = time.perf_counter()
        config, folder, layers = self.config, self.folder, record.layers
        steps = config.max_steps
        if steps < 1:
            steps = steps_of_epochs(self.algorithm, config, len(rows))
        checkpoint = folder.last_checkpoint() if folder.previous else None
        if folder.previous and checkpoint:
            self.progress.note(f"going on from {checkpoint.name}")
            before = folder.previous.settings.config.get("max_steps")
            of = f" of {before} steps" if before != config.max_steps else ""
            record = replace(record, resumed_from=[*(folder.previous.resumed_from or []), checkpoint.name + of])
        what = "all blocks" if layers is None else name_blocks(layers)
        kind = "reward" if self.algorithm.online else "loss"
        with folder.publishing() as published, folder.scratch() as scratch:
            log = RunLog(folder.path, step_of(checkpoint) if checkpoint else None) if folder.main else None
            with self.progress.bar(f"training {what}", steps, "step") as update:
                result = train_rows(
                    base,
                    tokenizer,
                    self.recipe,
                    config,
                    rows,
                    layers=layers,
                    task=self.task,
                    resume_from=checkpoint,
                    init_adapter=self.init_adapter,
                    save_to=scratch,
                    on_step=lambda step, value: update(step, f"{kind} {value:.3g}"),
                    on_log=log.write if log else lambda step, logs: None,
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
        self.judge.watch.remove()
        folder.write_record(record)
        return Run(record, result.model, tokenizer, folder.path, folder.main)

    def _first_rewards(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[TrainerCallback]:
        """What looks at the first rewards of a run whose learning rate was given: nothing else sampled its task."""
        group = self.algorithm.group_size
        if self.task is None or group is None or "learning_rate" not in self.recipe.given:
            return []
        prompts = completions_per_step(self.config) / self.config.to_dict()[group]
        look = partial(informative_completions, base, tokenizer, self.task, self.recipe, batch_size=self.generate)
        return [FirstRewards(prompts, look)]

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


def _open_task(settings: TrainingSettings) -> Task | None:
    """The task that prompts and rewards come from; None where an offline algorithm reads its data."""
    algorithm = load_algorithm(settings.algorithm)
    if algorithm.online and settings.pairs_from_task:
        raise ValueError(f"--pairs-from-task makes data for offline algorithms; {algorithm.name} generates its own")
    if algorithm.online or settings.pairs_from_task:
        return open_task(settings.task, settings.dataset, settings.reward, unsafe=settings.unsafe)
    if settings.task or settings.reward or not settings.dataset:
        raise ValueError(
            f"{algorithm.name} is offline and trains on {algorithm.data} data: give --dataset alone, or --task with "
            "--pairs-from-task"
        )
    return None


def _check_choice(settings: TrainingSettings, algorithm: Algorithm, task: Task | None) -> None:
    """Refuse combinations that cannot train what was asked for."""
    if settings.full and settings.layer != "auto":
        raise ValueError(f"--full trains every parameter and --layer {settings.layer} a block; give one of them")
    if settings.init_adapter is not None and settings.full:
        raise ValueError("--full trains every parameter and --init-adapter a block; give one of them")
    if settings.layer == "auto" and not (settings.full or settings.init_adapter) and not algorithm.online:
        raise ValueError(f"--layer auto ranks the blocks with online RL; for {algorithm.name} name one, such as mid-5")
    if task is not None and task.environment_factory is not None and not algorithm.environments:
        raise ValueError(
            f"task {task.name} plays through an environment, which {algorithm.name} cannot; use grpo or gigpo"
        )
    if algorithm.needs_environment and (task is None or task.environment_factory is None):
        raise ValueError(f"{algorithm.name} needs a task with an environment, such as textworld")


def _describe_adapter(name: str, folder: Path) -> dict[str, str]:
    """The adapter that a run starts from: its name and the SHA-256 of its weights."""
    return {"name": name, WEIGHTS: file_digest(folder / WEIGHTS)}


def _of_first_process(value: Any) -> Any:
    """The first process' value: on a GPU the others may have rounded differently."""
    return broadcast_object_list([value])[0]


def _card(record: RunRecord, folder: Path) -> str:
    """The model card: what was trained and how to repeat it; results are `onelayer eval`'s, and `push` adds them."""
    config = None if record.layers is None else read_fields(folder / CONFIG)
    return model_card(config, record, local_base=bool(record.settings.model.sha256))
