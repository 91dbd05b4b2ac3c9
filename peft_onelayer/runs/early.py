"""What can be refused of a command's settings at once, before torch, transformers and TRL are imported for seconds.

The commands call these checks first, and so do the library calls. What needs a model, a task's data or a field of TRL
is looked at later.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft_onelayer.layers import check_layers
from peft_onelayer.records.claim import check_parent, claimed
from peft_onelayer.records.evaluation import EvaluationRecord
from peft_onelayer.records.files import CONFIG, TargetError, check_file, check_folder, read_fields
from peft_onelayer.records.locate import check_base_of, check_model_name, check_order, holds_adapter, is_local, path_to
from peft_onelayer.records.privacy import holds_secrets
from peft_onelayer.records.run import RunRecord
from peft_onelayer.records.text import meant
from peft_onelayer.records.vote import VoteRecord
from peft_onelayer.rl.algorithms import Algorithm, load_algorithm
from peft_onelayer.rl.config_fields import check_names
from peft_onelayer.tasks import EXTRA, TASKS, Task, load_task

from .folder import RunFolder
from .inputs import check_blocks, check_data, check_fit, check_mask, check_weights
from .reporting import check_reporters
from .settings import (
    BUDGET,
    KEEP,
    PROBE_OPTIONS,
    EntropySettings,
    EvaluationSettings,
    ProbeSettings,
    TrainingSettings,
    VoteSettings,
    check_ranking,
    check_rate,
)

DEMO = "demo.json"
ANY = "*"  # in place of a name
DEMO_TASKS = ("arithmetic", "sort")


def check_training(settings: TrainingSettings, *, resume: bool = False, writes: bool = True) -> None:
    """Raise ValueError, in one line, for settings of a run that cannot work, or a folder that it may not be written to.

    Args:
        settings: values in their `config` may be texts.
        writes: whether the folder is looked at, for which a lock stands beside it for a moment.
    """
    if writes and resume:  # what is not here is named as what the run was begun with
        _check_folder(settings, resume=True)
    algorithm = load_algorithm(settings.algorithm)
    check_ranking(settings.method, settings.budget)
    _check_rate(settings)
    if settings.method == "profile":
        raise ValueError("--method profile is of onelayer probe, which says what to give --layer")
    if algorithm.online and settings.pairs_from_task:
        raise ValueError(f"--pairs-from-task makes data for offline algorithms; {algorithm.name} generates its own")
    if algorithm.online or settings.pairs_from_task:
        check_source(settings.task, settings.dataset, settings.reward)
    elif settings.task or settings.reward or not settings.dataset:
        raise ValueError(
            f"{algorithm.name} is offline and trains on {algorithm.data} data: give --dataset alone, or --task with "
            "--pairs-from-task"
        )
    if settings.sampling and not settings.pairs_from_task:
        raise ValueError("--sampling is of --pairs-from-task; --set has the fields that an online algorithm samples by")
    if settings.steps and "num_train_epochs" in settings.config:
        raise ValueError("--steps and --set num_train_epochs both say how long to train; give one of them")
    _check_blocks(settings, algorithm)
    _check_cache(settings, algorithm)
    if settings.keep not in KEEP:
        raise ValueError(f"--keep is one of {', '.join(KEEP)}, got {settings.keep!r}{meant(settings.keep, KEEP)}")
    if settings.eval_problems == 0 and (settings.eval_every or settings.also or settings.show):
        raise ValueError("--eval-problems 0 leaves --eval-every, --also and --show nothing to measure")
    for name in settings.also:
        check_task_name(name)
    if str(settings.config.get("use_vllm", False)).lower() in ("true", "yes", "1") and not _installed("vllm"):
        raise ValueError("use_vllm needs vLLM, which is not installed; pip install 'trl[vllm]', or leave use_vllm out")
    _check_temperature(settings.config)
    if settings.report_to != "none" and holds_secrets(settings.config):
        raise ValueError(
            "--set gives a secret, which --report-to would log with all settings; leave one of them out, or give the "
            "secret by an environment variable"
        )
    check_reporters(settings.report_to)
    if not algorithm.online and settings.dataset:
        check_data(settings.dataset)
    _check_inputs(settings)
    if writes:
        check_weights(settings.model)
    if writes and not resume:
        _check_folder(settings)


def _check_folder(settings: TrainingSettings, *, resume: bool = False) -> None:
    """Refuse a folder that the run may not be written to, and a run that cannot go on from here."""
    if os.environ.get("RANK", "0") != "0":
        return
    with claimed(Path(settings.out)):
        folder = RunFolder(Path(settings.out), resume)
    if folder.previous:
        _check_files(settings, folder.previous)
    if folder.previous and folder.previous.status == "finished":
        _check_more_steps(settings, folder.previous)


def _check_files(settings: TrainingSettings, previous: RunRecord) -> None:
    """Refuse to go on with a run of which files were named by paths that lead nowhere from here."""
    task = settings.task if isinstance(settings.task, str) else ""
    name, _, argument = task.partition(":")
    reward, _, function = (settings.reward or "").rpartition(":")
    kept = any(digest.startswith("sha256:") for digest in previous.settings.source.data.values())
    named = {
        "{}": settings.model if previous.settings.model.sha256 else None,
        "--task {}": task if task.endswith(".py") else None,
        f"--task {name}:{{}}": argument if kept else None,
        "--dataset {}": settings.dataset if kept and not task else None,
        f"--reward {{}}:{function}": reward,
        "--mask {}": settings.mask,
        "--init-adapter {}": settings.init_adapter if is_local(settings.init_adapter or "") else None,
    }
    paths = {option: str(path) for option, path in named.items() if path}
    away = [path for path in paths.values() if not Path(path).expanduser().exists()]
    if away:
        typed = [
            option.replace("{}", shlex.quote(path_to(path) if path in away else path)) for option, path in paths.items()
        ]
        raise ValueError(
            f"the run in {settings.out} was begun where {' and '.join(away)} could be found, which "
            f"{'is' if len(away) == 1 else 'are'} not here; name {'it' if len(away) == 1 else 'them'}: onelayer train "
            f"{' '.join(typed)} --resume --out {shlex.quote(str(settings.out))}"
        )


def _check_more_steps(settings: TrainingSettings, finished: RunRecord) -> None:
    """Refuse to go on with a run that has nothing left to do."""
    before = finished.settings.config.get("max_steps", -1)
    if not 0 < before < (settings.steps or 0):
        more = f", or raise --steps above {before} to train it further" if before > 0 else ""
        raise ValueError(f"the run in {settings.out} is finished; choose a new output folder{more}.")


def check_effect(given: Collection[str], settings: TrainingSettings) -> None:
    """Raise ValueError for an option of `onelayer train` among those `given` that the others leave without effect."""
    blocks = f"--layer {settings.layer} ranks" if settings.layer != "auto" else ""
    blocks = "--full ranks" if settings.full else "--init-adapter ranks" if settings.init_adapter else blocks
    for name in ("budget", "method"):
        if name in given and blocks:
            raise ValueError(f"--{name} is of a ranking, and {blocks} nothing; leave it out, or take --layer auto")
    if "keep" in given and not settings.eval_every:
        raise ValueError("--keep chooses among the states that --eval-every measures; add that, or leave --keep out")
    if "prefix_cache_gb" in given and settings.prefix_cache is None:
        raise ValueError("--prefix-cache-gb is of --prefix-cache; add that, or leave it out")


def _check_rate(settings: TrainingSettings | ProbeSettings) -> None:
    if settings.learning_rate is not None:
        check_rate(settings.learning_rate)
    if "learning_rate" in settings.config:
        check_rate(settings.config["learning_rate"], "--set learning_rate")


def _check_inputs(settings: TrainingSettings) -> None:
    """Look at the model and at what trains of it, by their files."""
    check_model_name(settings.model, settings.revision)
    if settings.init_adapter is not None:
        check_fit(settings.init_adapter, settings.model, settings.revision, way_out=False)
    elif settings.layer != "auto":
        check_blocks(settings.model, settings.layer)
    if settings.mask is not None:
        check_mask(settings.mask)


def _check_temperature(config: Mapping[str, Any]) -> None:
    try:
        above = float(config.get("temperature", 1)) > 0
    except (TypeError, ValueError):  # no number, which is said where the field is read
        return
    if not above:
        raise ValueError(f"--set temperature must be above 0 in training, got {config['temperature']}; 1 is usual")


def _check_blocks(settings: TrainingSettings, algorithm: Algorithm) -> None:
    """Refuse blocks that are none, and combinations that cannot train what was asked for."""
    if settings.full and settings.layer != "auto":
        raise ValueError(f"--full trains every parameter and --layer {settings.layer} a block; give one of them")
    if settings.init_adapter is not None and settings.full:
        raise ValueError("--full trains every parameter and --init-adapter a block; give one of them")
    if settings.mask is not None and (settings.full or settings.layer == "auto"):
        raise ValueError("--mask trains entries of given blocks; name them with --layer, or take --layer all")
    if settings.boost is not None and not settings.full:
        raise ValueError("--boost gives blocks a learning rate of their own in full training; add --full")
    if settings.layer != "auto":
        check_layers(settings.layer)
    elif not (settings.full or settings.init_adapter) and not algorithm.online:
        raise ValueError(f"--layer auto ranks the blocks with online RL; for {algorithm.name} name one, such as mid-5")


def _check_cache(settings: TrainingSettings, algorithm: Algorithm) -> None:
    """Refuse a cache of hidden states that could not be used, or be written."""
    if settings.prefix_cache is None:
        return
    if algorithm.online:
        raise ValueError(
            f"--prefix-cache keeps rows that come back in another epoch; those that {algorithm.name} generates do not"
        )
    if settings.full:
        raise ValueError("--prefix-cache keeps what leaves the frozen blocks, and --full trains them all")
    if not settings.prefix_cache_gb > 0:
        raise ValueError(f"--prefix-cache-gb is above 0, got {settings.prefix_cache_gb:g}")
    folder = Path(settings.prefix_cache).resolve()
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ValueError(f"--prefix-cache {settings.prefix_cache} is no folder that can be written to; name another")
    check_parent(folder)


def check_source(task: str | Task | None, dataset: str | None, reward: str | None) -> None:
    """Raise ValueError, in one line, unless a task, or a data set with a reward, is named that may be there."""
    if task and (dataset or reward):
        raise ValueError("--task comes with its own data and reward; give --task, or --dataset with --reward, not both")
    if isinstance(task, str) and task:
        check_task_name(task)
    elif not task and not (dataset and reward):
        raise ValueError(
            f"give --task, or --dataset with --reward; the tasks are {', '.join(TASKS)}, and a file.py of your own"
        )
    if reward:
        file, _, function = reward.rpartition(":")
        if not file.endswith(".py"):
            raise ValueError(f"reward must be 'path/to/file.py:function', got {reward!r}")
        module = _parsed(file)
        if not _may_define(module) & {function, ANY}:
            defined = [node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
            near = meant(function, defined) or f"; it has {', '.join(defined) or 'none'}"
            raise ValueError(f"{file} has no function {function!r}{near}")
    if dataset and not task:
        check_data(dataset, ("prompt",))


def check_task_name(name: str) -> None:
    """Raise ValueError, in one line, for the name of a task that there is not, or of a file that is no Python."""
    base = name.partition(":")[0]
    if name.endswith(".py"):
        names = _may_define(_parsed(name))
        if not names & {"rows", ANY}:
            raise ValueError(f"{name} has no function rows(split, n, seed)")
        if ANY not in names and not any("reward" in one.lower() for one in names):
            raise ValueError(f"{name} must have exactly one function whose name holds 'reward'; found none")
    elif base not in TASKS or (base in EXTRA and not _installed(base)):
        load_task(name)  # which says it


def _parsed(name: str) -> ast.Module:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"no file {path}{meant(path.name, [other.name for other in path.parent.glob('*.py')])}")
    try:
        return ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}") from error


def _may_define(module: ast.Module) -> set[str]:
    """The names that a file may give something, as far as its text says; `ANY` among them where that may be any."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Del):
            names.add(ANY if node.id in ("globals", "exec") else node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def check_probe(settings: ProbeSettings) -> None:
    """Raise ValueError, in one line, for settings of a ranking that cannot work; values in `config` may be texts."""
    check_ranking(settings.method, settings.budget)
    _check_rate(settings)
    if (settings.method == "profile") != (settings.profile is not None):
        raise ValueError("--profile and --method profile go together; give both, or neither")
    algorithm = load_algorithm(settings.algorithm)
    if not algorithm.online:
        raise ValueError(
            f"a probe compares blocks by their reward; {algorithm.name} is offline, choose one such as grpo"
        )
    if not settings.runs and settings.budget != BUDGET:
        raise ValueError(f"--budget is of a race, and --method {settings.method} runs nothing; leave it out")
    if settings.runs or settings.task or settings.dataset or settings.reward:
        check_source(settings.task, settings.dataset, settings.reward)
    check_names(algorithm, settings.config, PROBE_OPTIONS)
    _check_temperature(settings.config)
    if settings.layers != "all":
        check_layers(settings.layers)
    check_model_name(settings.model, settings.revision)
    check_weights(settings.model)
    if (chosen := check_blocks(settings.model, settings.layers)) is not None and len(chosen) < 2:
        raise ValueError(f"there is nothing to choose: --layers {settings.layers} names block {chosen[0]} alone")
    if settings.out is not None:
        check_outputs(Path(settings.out))


def plot_beside(out: Path) -> Path:
    """Where the plot of the ranking `out` is put."""
    return out.with_suffix(".png")


def check_outputs(out: Path) -> None:
    """Raise `TargetError` unless the ranking and its plot can be written without losing anything."""
    if out.suffix != ".json":
        raise TargetError(f"--out takes a JSON file, such as ranking.json, not {out}.")
    check_file(out)
    check_file(plot_beside(out))


def check_evaluation(settings: EvaluationSettings) -> None:
    """Raise ValueError, in one line, for settings of an evaluation that cannot work, or files that it may not write."""
    if not settings.samples and not settings.greedy:
        raise ValueError("--samples 0 with --no-greedy leaves nothing to measure.")
    if settings.temperature is not None and not settings.temperature > 0:
        raise ValueError("--temperature must be above 0; for greedy decoding alone use --samples 0.")
    for name in ("temperature", "top_p", "top_k", "min_p"):
        if getattr(settings, name) is not None and not settings.samples:
            raise ValueError(
                f"--{name.replace('_', '-')} is of sampling, and --samples 0 decodes greedily alone; leave one out"
            )
    _check_split(settings.split)
    out = None if settings.out is None else Path(settings.out)
    if out is not None:
        check_file(out, partial(_is_of, format=EvaluationRecord.FORMAT))
    if settings.completions is not None:
        if out is not None and Path(settings.completions).resolve() == out.resolve():
            raise ValueError(f"--out and --save-completions both name {out}; give two files.")
        check_file(Path(settings.completions), _holds_completions)
    check_source(settings.task, settings.dataset, settings.reward)
    for name in settings.also:
        check_task_name(name)
    if (Path(settings.model).expanduser() / CONFIG).is_file():
        if settings.adapter is not None:
            check_order(settings.model, settings.adapter, "onelayer eval {base} --adapter {adapter}")
            raise ValueError(f"{settings.model} is an adapter itself; give its base model, or leave --adapter out.")
        check_base_of(Path(settings.model).expanduser(), f"onelayer eval {{base}} --adapter {settings.model}")
        check_fit(settings.model, "", allow_other_base=settings.allow_other_base)
    else:
        check_model_name(settings.model, settings.revision)
        check_weights(settings.model)
        if settings.adapter is not None:
            check_fit(settings.adapter, settings.model, settings.revision, allow_other_base=settings.allow_other_base)


def check_vote(settings: VoteSettings) -> None:
    """Raise ValueError, in one line, for a vote that cannot be."""
    names = list(settings.adapters)
    if len(names) < 2:
        raise ValueError(f"a vote takes two adapters or more, and {len(names)} was given.")
    if not 0 <= settings.against < len(names):
        raise ValueError(f"--against {settings.against} is none of the {len(names)} adapters, counted from 0.")
    if settings.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {settings.samples}.")
    _check_split(settings.split)
    if settings.out is not None:
        check_file(Path(settings.out), partial(_is_of, format=VoteRecord.FORMAT))
    check_source(settings.task, settings.dataset, settings.reward)
    if settings.model:
        check_model_name(settings.model, settings.revision)
    for name in names:
        check_fit(name, settings.model, settings.revision, allow_other_base=settings.allow_other_base)


def check_entropy(settings: EntropySettings) -> None:
    """Raise ValueError, in one line, for a measurement of the learning signal that cannot be."""
    if not 0 < settings.share < 1:
        raise ValueError(f"--share {settings.share} is no part of the tokens; give a number between 0 and 1.")
    if settings.samples < 2:
        raise ValueError(f"--samples must be at least 2, got {settings.samples}: advantages compare completions.")
    if settings.adapter is None:
        check_layers(settings.layer)
    check_source(settings.task, settings.dataset, settings.reward)
    check_model_name(settings.model, settings.revision)
    check_weights(settings.model)
    if settings.adapter is None:
        check_blocks(settings.model, settings.layer)
    else:
        check_fit(settings.adapter, settings.model, settings.revision, allow_other_base=settings.allow_other_base)


def check_generation(
    model: str, adapters: Sequence[str], revision: str | None = None, *, allow_other_base: bool = False
) -> None:
    """Raise ValueError, in one line, for models that cannot answer together."""
    names, base = list(adapters), model
    for name in names[:1]:
        check_order(model, name, "onelayer generate {base} {adapter}")
    if is_local(model) and holds_adapter(model):
        check_base_of(Path(model).expanduser(), f"onelayer generate {{base}} {model}")
        names, base = [model, *names], str(read_fields(Path(model).expanduser() / CONFIG)["base_model_name_or_path"])
    else:
        check_model_name(model, revision)
    for name in names:
        check_fit(name, base, revision, allow_other_base=allow_other_base)


def _check_split(split: str) -> None:
    if split not in ("test", "train"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}{meant(split, ('test', 'train'))}")


def _is_of(file: Path, format: str) -> bool:
    """Whether an earlier command wrote `file` in this format, so that nothing is lost by replacing it."""
    try:
        return read_fields(file).get("format") == format
    except ValueError:
        return False


def _holds_completions(file: Path) -> bool:
    """Whether an earlier evaluation wrote `file`: completions, one a line."""
    try:
        with file.open(encoding="utf-8") as lines:
            first = json.loads(next(lines))
    except (ValueError, StopIteration):
        return False
    return isinstance(first, dict) and {"model", "decoding", "completion", "reward"} <= first.keys()


def check_demo(out: Path, task: str, layer: str, model: str | None) -> None:
    """Raise ValueError, in one line, for a demo that cannot be."""
    check_folder(out, lambda folder: (folder / DEMO).is_file())  # run_demo looks closer
    if task not in DEMO_TASKS:
        raise ValueError(
            f"the demo knows the tasks {' and '.join(DEMO_TASKS)}, not {task!r}, and onelayer train takes all"
            f"{meant(task, DEMO_TASKS)}"
        )
    if layer != "auto":
        check_layers(layer)
    if model is not None:
        check_model_name(model)
