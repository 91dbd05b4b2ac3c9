"""run.json: what is needed to repeat a training run, and to tell whether a resumed one is the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from .adapter_config import MaskRecord
from .fields import Record
from .figures import CompletionStatistics, Measured
from .movement import Movement


@dataclass(frozen=True)
class BaseModel:
    """The base model of a run.

    Attributes:
        name: a folder, or an id on the Hub.
        revision: commit on the Hub; None for a folder.
        sha256: of a folder, SHA-256 of its configuration and its weights, by file; empty for a model from the Hub.
        dtype: of the weights, such as "bfloat16".
        num_layers: number of blocks.
        parameters: of the whole model.
    """

    name: str
    revision: str | None
    sha256: dict[str, str]
    dtype: str
    num_layers: int
    parameters: int


@dataclass(frozen=True)
class DataSource:
    """What a model was trained or evaluated on.

    Attributes:
        name: of the task, or of the data set.
        data: versions, revisions and digests of the data, by name.
        chat: whether prompts were given as messages of a user; None for offline data.
        system: text of the system message, or ahead of a plain prompt; None for none.
        shots: problems that every prompt showed with their solutions; None for none.
    """

    name: str
    data: dict[str, str]
    chat: bool | None = None
    system: str | None = None
    shots: int | None = None


@dataclass(frozen=True)
class Boost:
    """Blocks that full training gave a learning rate of their own.

    Attributes:
        layers: their indices, ascending.
        factor: by which their rate is that of the others.
    """

    layers: list[int]
    factor: float


@dataclass(frozen=True)
class RunSettings:
    """All that decides the outcome of a run.

    Attributes:
        model: the base.
        algorithm: name of the algorithm.
        trainer: import path of its trainer.
        task: prompts and reward come from; None for an offline data set.
        dataset: an offline algorithm's data set; None for a task.
        layer: the blocks as they were asked for, such as 14, "mid-5" or "auto"; None where everything was trained.
        mask: record of the entries that trained; None where all of the blocks' did.
        boost: blocks with a learning rate of their own, where everything trained; None for none.
        full: whether every parameter was trained.
        top_entropy: share of the tokens that were trained on; None for all.
        pairs_from_task: prompts that an offline algorithm's data was made from; None for none.
        sampling: how that data was sampled, by field of `Sampling`, where it was asked for; None where it was not.
        trust_remote_code: whether the code that comes with the base was allowed to run; None for no.
        eval_problems: held-out problems that were asked for; None for as many as the run's length pays for.
        eval_every: steps between two measurements of held-out problems during training; None for none.
        keep: with `eval_every`: "best", the state that scored best, or "last".
        also: other tasks that were measured before and after.
        seed: of data, sampling and training.
        config: fields of the trainer's configuration.
        init_adapter: name of the adapter that the run started from, and SHA-256 of its weights; None for none.
    """

    model: BaseModel
    algorithm: str
    trainer: str
    task: DataSource | None
    seed: int
    config: dict[str, Any]
    dataset: DataSource | None = None
    layer: int | str | list[int] | None = None
    mask: MaskRecord | None = None
    boost: Boost | None = None
    full: bool = False
    top_entropy: float | None = None
    pairs_from_task: int | None = None
    sampling: dict[str, Any] | None = None
    trust_remote_code: bool | None = None
    init_adapter: dict[str, str] | None = None
    eval_problems: int | None = None
    eval_every: int | None = None
    keep: Literal["best", "last"] | None = None
    also: list[str] | None = None

    @property
    def source(self) -> DataSource:
        """The task or the data set."""
        found = self.task or self.dataset
        assert found is not None
        return found


@dataclass(frozen=True)
class HeldOutScore:
    """What a run scored on held-out problems on its way.

    Attributes:
        step: after which it was measured.
        mean: reward.
        standard_error: of the mean over problems; None for a single problem.
    """

    step: int
    mean: float
    standard_error: float | None


@dataclass(frozen=True)
class RunResults:
    """What came of a run.

    Attributes:
        steps: optimizer steps, those before a resumption counted.
        rewards: mean reward at every log that has one; empty for offline algorithms.
        reward_steps: the steps of these logs; None where every step has one, or none.
        losses: at every log.
        tokens_generated: tokens of all completions; 0 for offline algorithms, and where TRL logs no lengths.
        tokens_trained: prompt and completion tokens that the trainer counted; 0 where it counts none.
        seconds: of training.
        sha256: SHA-256 of each safetensors file.
        verdict: what a held-out evaluation says of it, in a sentence.
        movement: how far the trained tensors moved; None of a run that was not asked.
        held_out: base and trained model ("adapter") on held-out problems; None where none were measured.
        also: the same of other tasks, by their names.
        completions: what the completions of training looked like; None where the trainer does not say.
        evaluations: the scores during training, on other held-out problems than `held_out`; None for none.
        kept_step: the step whose state was put out, where it was chosen by these scores.
        stopped: why the run ended early; None where it did not.
    """

    steps: int
    rewards: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens_generated: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0
    sha256: dict[str, str] = field(default_factory=dict)
    verdict: str | None = None
    movement: Movement | None = None
    held_out: Measured | None = None
    also: dict[str, Measured] | None = None
    completions: CompletionStatistics | None = None
    evaluations: list[HeldOutScore] | None = None
    kept_step: int | None = None
    stopped: str | None = None
    reward_steps: list[int] | None = None


@dataclass(frozen=True)
class LearningRate:
    """How a run that was given no learning rate got one.

    Attributes:
        asked: the value in the trainer's configuration before.
        by: "ranking", of its choice of blocks, or "first step": `find_learning_rate`.
        kl: of a first step at the rate found, divided by the square root of `blocks`, in nats per token, less the
            noise; None where not measured.
        kl_noise: what the same policy gives, measured twice.
        tokens_generated: tokens that the search generated.
        tokens_trained: tokens that it passed through the model.
        seconds: its time.
        blocks: that train together.
    """

    asked: float
    by: Literal["ranking", "first step"]
    kl: float | None = None
    kl_noise: float | None = None
    tokens_generated: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0
    blocks: int = 1


@dataclass(frozen=True)
class RunRecord(Record):
    """run.json.

    Attributes:
        command: the command line; None for a run from Python.
        settings: what decides the outcome.
        machine: versions and hardware: on others the same run may round differently.
        status: "unfinished" until the result is in place.
        layers: the blocks that were trained; None for all parameters, and until they are chosen.
        why: how these blocks were chosen.
        results: None until the run has ended.
        resumed_from: names of the checkpoints from which it was continued.
        learning_rate: how the learning rate in `settings.config` was found; None where it was given.
    """

    FORMAT: ClassVar[str] = "onelayer-run-1"
    WHAT: ClassVar[str] = "a training run"

    command: str | None
    settings: RunSettings
    machine: dict[str, Any]
    status: Literal["unfinished", "finished"]
    layers: list[int] | None
    why: str | None = None
    results: RunResults | None = None
    resumed_from: list[str] | None = None
    learning_rate: LearningRate | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], where: str) -> Self:
        """As `Record.from_dict`; a run without task and data set is refused too."""
        record = super().from_dict(fields, where)
        if record.settings.task is None and record.settings.dataset is None:
            raise ValueError(f"{where}: settings.task and settings.dataset are null, expected one of them")
        return record


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The entries in which two nested dicts differ, as "name: old -> new".

    >>> differences({"seed": 0, "config": {"beta": 0.0}}, {"seed": 1, "config": {"beta": 0.0}})
    ['seed: 0 -> 1']
    """
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a} -> {b}")
    return found
