"""What a training run, an evaluation and a ranking are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_onelayer.probe.settings import BUDGET, METHODS, RACES
from peft_onelayer.records.text import meant

if TYPE_CHECKING:
    from peft_onelayer.tasks import Task

STEPS = 150  # optimizer steps of an online run
KEEP = ("best", "last")  # of the states that were measured on the way
GENERATE = 64  # completions at a time, at least, where there are no gradients
# Fields of a TRL configuration that a setting of their own decides, and the option of the command line.
_LOADING = "--revision and --trust-remote-code: the model is loaded before there is a trainer"
TRAINING_OPTIONS = {
    "output_dir": "--out",
    "seed": "--seed",
    "max_steps": "--steps",
    "lr": "--learning-rate",  # which is no field of TRL's
    "report_to": "--report-to",
    "resume_from_checkpoint": "--resume",
    "trust_remote_code": "--trust-remote-code",
    "model_init_kwargs": _LOADING,
}
PROBE_OPTIONS = {
    "output_dir": "nothing: a probe writes only --out",
    "seed": "--seed",
    "max_steps": "--steps",
    "lr": "--learning-rate",
    "num_train_epochs": "--steps",
    "trust_remote_code": "--trust-remote-code",
    "model_init_kwargs": _LOADING,
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model and the data of a run, an evaluation or a ranking.

    Attributes:
        model: base model: a folder or a Hub id.
        task: a name for `load_task`, or a task; None with `dataset`.
        dataset: a JSONL, CSV or Parquet file or a Hub data set, instead of a task.
        reward: of its prompts: "file.py:function".
        seed: of data, sampling and training.
        chat: give prompts as messages of a user; None for: if the tokenizer has a chat template.
        system: text of a system message; of a plain prompt its first paragraph. None for none; in an evaluation for the
            run's, and "" for none.
        shots: problems of the train split that every prompt shows with their solutions; None for none, in an evaluation
            for the run's.
        revision: Hub revision of the base model.
        trust_remote_code: run the Python code that comes with the base model.
        unsafe: let the model's code run without a full sandbox.
    """

    model: str
    task: str | Task | None = None
    dataset: str | None = None
    reward: str | None = None
    seed: int = 0
    chat: bool | None = None
    system: str | None = None
    shots: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    unsafe: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Source):
    """One training run, as `onelayer train` takes it; beside the attributes of `Source`:

    Attributes:
        out: new folder for the adapter, run.json and the checkpoints.
        layer: blocks to train, as `SingleLayerConfig` takes them, or "auto" to rank the blocks on the task first.
        mask: safetensors file of the entries of these blocks that train, as `SingleLayerConfig` takes it.
        full: train every parameter instead: the baseline.
        boost: with `full`, "BLOCKS:FACTOR": blocks that train at so many times the learning rate.
        algorithm: a name for `load_algorithm`.
        steps: optimizer steps; None for those that `num_train_epochs` in `config` asks for, else for 150 and, offline,
            for those of TRL's default number of epochs.
        prompts: of an optimizer step; None for 8 of an online algorithm, or what `config` says.
        completions: of a prompt; None for 8, or what `config` says.
        learning_rate: None for what `config` says and, online, for one that is found: it moves the policy far enough
            (`find_learning_rate`, or the ranking's own).
        method: of the ranking of `layer="auto"`, as `probe_layers` takes it.
        budget: of that ranking: tokens to spend, as a share of those of the run.
        config: values by field of the algorithm's TRL configuration.
        sampling: with `pairs_from_task`: values by field of `Sampling`, over those in `config`.
        top_entropy: train only this share of the tokens, those of highest entropy.
        pairs_from_task: offline: make the data from graded completions of so many prompts of the task.
        report_to: TRL's own logging: "wandb", "trackio", "tensorboard", or several with commas.
        init_adapter: adapter to start from, a folder or a Hub id, whose blocks are trained; the KL term of an
            algorithm stays one to the base.
        prefix_cache: offline: folder for what leaves the frozen blocks, which later epochs and runs start from.
        prefix_cache_gb: of all files in it, at most, in 10^9 bytes.
        eval_problems: held-out problems on which base and result are compared, 4 completions of each; 0 for none, None
            for 128, or fewer of a short run: both together take a fifth of the completions of the run at most.
        eval_every: steps between two measurements of as many other held-out problems; None for none.
        keep: with `eval_every`: put out the state that scored "best", or the "last".
        also: names of other tasks to measure before and after.
        show: so many held-out problems are shown with a completion of base and result.
    """

    out: str | Path
    layer: int | str | Sequence[int] = "auto"
    mask: str | None = None
    full: bool = False
    boost: str | None = None
    algorithm: str = "grpo"
    steps: int | None = None
    prompts: int | None = None
    completions: int | None = None
    learning_rate: float | None = None
    method: str = "auto"
    budget: float = BUDGET
    config: Mapping[str, Any] = field(default_factory=dict)
    top_entropy: float | None = None
    pairs_from_task: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    report_to: str = "none"
    init_adapter: str | None = None
    prefix_cache: str | None = None
    prefix_cache_gb: float = 50.0
    eval_problems: int | None = None
    eval_every: int | None = None
    keep: Literal["best", "last"] = "best"
    also: Sequence[str] = ()
    show: int = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Source):
    """One evaluation, as `onelayer eval` takes it; beside the attributes of `Source`, whose `model` may also be an
    adapter's folder, which names its base:

    Attributes:
        adapter: to compare with the base: a folder or a Hub id.
        split: problems of which split: "test" or "train".
        problems: their number; fewer where the split is smaller.
        samples: sampled completions of each; 0 for greedy decoding alone.
        greedy: whether to decode greedily too.
        temperature: of sampling, above 0; None for the run's, or 1.
        max_completion_tokens: where a completion is cut; None for the run's, or the task's own.
        sampling: values by field of `Sampling`, over those of the run that made the adapter or the model.
        batch_size: completions at a time, on which the samples depend.
        allow_other_base: evaluate an adapter of our method on a base that it was not trained on.
        top_p, top_k, min_p: of sampling; None for the run's, or no bound.
        also: names of other tasks to measure on their test splits, with as many problems and samples.
        show: so many problems are shown with a completion of each model, its answer and reward.
        out: JSON file for the figures and every problem's score.
        completions: JSONL file for every completion with its reward.
    """

    adapter: str | None = None
    split: str = "test"
    problems: int = 256
    samples: int = 4
    greedy: bool = True
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_completion_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    allow_other_base: bool = False
    also: Sequence[str] = ()
    show: int = 0
    out: str | Path | None = None
    completions: str | Path | None = None


@dataclass(frozen=True, kw_only=True)
class VoteSettings(Source):
    """One vote of several adapters, as `onelayer vote` takes it; beside the attributes of `Source`, whose `model` "" is
    the base that the first adapter names:

    Attributes:
        adapters: two or more adapters of our method of one base: folders or Hub ids.
        against: which of them is given as many samples alone, counted from 0.
        split: problems of which split: "test" or "train".
        problems: their number; fewer where the split is smaller.
        samples: completions of each problem by each adapter.
        sampling: values by field of `Sampling`, over those of the run that made the first adapter.
        batch_size: completions at a time, on which the samples depend.
        allow_other_base: take adapters on a base that they were not trained on.
        out: JSON file for the figures.
    """

    model: str = ""
    adapters: Sequence[str]
    against: int = 0
    split: str = "test"
    problems: int = 256
    samples: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    allow_other_base: bool = False
    out: str | Path | None = None


@dataclass(frozen=True, kw_only=True)
class EntropySettings(Source):
    """One measurement of the learning signal by token entropy, as `onelayer entropy` takes it; beside the attributes of
    `Source`:

    Attributes:
        adapter: of our method, at whose weights and for whose blocks the gradient is taken: a folder or a Hub id.
        layer: without an adapter, the blocks, as `SingleLayerConfig` takes them.
        share: of the tokens, those of highest entropy.
        problems: of the train split.
        samples: completions of each.
        sampling: values by field of `Sampling`.
        batch_size: completions at a time.
        micro_batch: completions of a pass with gradients.
        allow_other_base: take an adapter on a base that it was not trained on.
    """

    adapter: str | None = None
    layer: int | str | Sequence[int] = "middle"
    share: float = 0.2
    problems: int = 16
    samples: int = 8
    sampling: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    micro_batch: int = 8
    allow_other_base: bool = False


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(Source):
    """One ranking of the blocks, as `onelayer probe` takes it; beside the attributes of `Source`:

    Attributes:
        method: "auto", "race", "prior" or "profile", as `probe_layers` takes it.
        budget: of a race: tokens to spend, as a share of those of the run to come.
        profile: for "profile": what `load_profile` takes.
        layers: blocks to choose from: "all", or as `SingleLayerConfig` takes them.
        algorithm: of the run to come.
        steps: of the run to come.
        prompts, completions, learning_rate: of the run to come, as of `TrainingSettings`.
        config: of the run to come, by field of the algorithm's TRL configuration.
        out: JSON file for the ranking; its plot is put beside it.
    """

    method: str = "auto"
    budget: float = BUDGET
    profile: str | None = None
    layers: int | str | Sequence[int] = "all"
    algorithm: str = "grpo"
    steps: int = STEPS
    prompts: int | None = None
    completions: int | None = None
    learning_rate: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    out: str | Path | None = None

    @property
    def runs(self) -> bool:
        """Whether the method runs the model, and so needs a task."""
        return self.method in RACES


def check_ranking(method: str, budget: float) -> None:
    """Raise ValueError for a method that there is not, or a budget that is no share."""
    if method not in METHODS:
        raise ValueError(f"no probe {method!r}; the methods are {', '.join(METHODS)}{meant(method, METHODS)}")
    if not 0 < budget < math.inf:
        raise ValueError(f"--budget is a share of a training run, above 0, such as {BUDGET}; got {budget}")


def check_rate(rate: float | str, option: str = "--learning-rate") -> None:
    """Raise ValueError for a learning rate, a number or a text that stands for one, that is not above 0."""
    try:
        above = 0 < float(rate) < math.inf
    except (TypeError, ValueError):  # no number, which is said where the field is read
        return
    if not above:
        raise ValueError(f"{option}: a learning rate must be above 0, got {rate}; give one such as 1e-5")
