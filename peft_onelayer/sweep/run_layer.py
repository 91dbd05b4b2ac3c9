"""One run of a sweep: a specification in, a row of results out.

On one kind of machine the same specification gives the same row, but for "seconds".
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from peft_onelayer.records.files import model_digests

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from peft_onelayer.tasks import Task

FORMAT = "onelayer-row-1"
OPTIONAL = ("system", "shots", "dataset", "reward")  # None is as if there were no such field

Layer = int | Literal["base", "full"] | list[int]
Row = dict[str, Any]
OnStep = Callable[[int, float], None]


@dataclass(frozen=True)
class RunSpec:
    """All that decides the outcome of a run; every field is a JSON value.

    Attributes:
        model: folder, or id on the Hub.
        revision: commit of a model on the Hub.
        model_digests: `model_digests(model)`: checked before the run.
        task: name for `load_task`; of a data set its own name.
        layer: the block, or blocks, to train; "full" for every parameter; "base" to train nothing.
        algorithm: name for `load_algorithm`; an online one.
        settings: fields of the algorithm's TRL configuration, over its defaults; the learning rate is among them.
        steps: optimizer steps; 0 of a block or of all parameters only finds the learning rate of such a run.
        seed: of training and of its data.
        problems: how many to evaluate on.
        samples: completions of each.
        split: the problems' split.
        evaluation_seed: of the problems and of sampling.
        batch_size: completions at a time in the evaluation; the samples depend on it.
        greedy: whether to evaluate greedily too.
        sampling: how the evaluation samples, by field of `Sampling`: as the runs do, and the same for the base.
        chat: whether plain prompts become messages of a user.
        system: text of a system message; None for none.
        shots: problems that every prompt shows with their solutions; None for none.
        task_data: `Task.data`: what identifies the data.
        unsafe: as of `load_task`.
        trust_remote_code: whether the code that comes with the model may run.
        dataset, reward: of prompts and a reward in place of a task; None for none.
    """

    model: str
    task: str
    layer: Layer
    algorithm: str
    steps: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    model_digests: Mapping[str, str] = field(default_factory=dict)
    problems: int = 256
    samples: int = 4
    split: str = "test"
    evaluation_seed: int = 0
    batch_size: int = 64
    greedy: bool = False
    chat: bool = False
    system: str | None = None
    shots: int | None = None
    task_data: Mapping[str, str] = field(default_factory=dict)
    unsafe: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    dataset: str | None = None
    reward: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layer, str) and self.layer not in ("base", "full"):
            raise ValueError(f'layer must be an index, a list of indices, "base" or "full", got {self.layer!r}')

    def digest(self) -> str:
        """SHA-256 of the specification as canonical JSON: keys sorted, no spaces.

        A folder is known by the digests of its files; its path is left out, so that it can be moved. The fields of
        `OPTIONAL` are left out where there are none.

        Raises:
            ValueError: a setting is no JSON value.

        >>> spec = RunSpec("Qwen/Qwen3-1.7B-Base", "gsm8k", 10, "grpo", 100, 0, {"learning_rate": 5e-6})
        >>> spec.digest()[:8], spec.digest() == RunSpec.from_dict(json.loads(json.dumps(asdict(spec)))).digest()
        ('0047035b', True)
        """
        identity = asdict(self)
        identity = {k: v for k, v in identity.items() if k not in OPTIONAL or v is not None}
        if self.model_digests:
            del identity["model"]
        try:
            text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except TypeError as error:
            raise ValueError(f"a run's settings must be JSON values: {error}") from None
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def finds_rate(self) -> bool:
        """Whether this run trains nothing and finds the learning rate of those that do."""
        return self.steps == 0 and self.layer != "base"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RunSpec:
        """The specification whose `dataclasses.asdict` is `fields`."""
        return cls(**fields)

    def __str__(self) -> str:
        """In a few words, for messages.

        >>> print(RunSpec("m", "sort", [3, 4], "grpo", 8, 1), RunSpec("m", "sort", "base", "grpo", 8, 1), sep="; ")
        blocks 3, 4, seed 1; base
        """
        if self.layer == "base":
            return "base"
        if self.finds_rate:
            return f"learning rate {'of all parameters' if self.layer == 'full' else f'of block {self.layer}'}"
        layers = self.layer if isinstance(self.layer, list) else [self.layer]
        what = "full" if self.layer == "full" else f"block{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        rate = self.settings.get("learning_rate")
        return f"{what}, seed {self.seed}" + (f", learning rate {rate:g}" if rate is not None else "")


class Alone:
    """Where a run computes: here, by itself."""

    def load(self, spec: RunSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base and its tokenizer, the run's own to change."""
        from peft_onelayer.runs.models import load_causal_lm, to_device

        model, tokenizer = load_causal_lm(spec.model, spec.revision, trust_remote_code=spec.trust_remote_code)
        to_device(model)
        return model, tokenizer

    def share(self, trainer: Trainer) -> object:
        """Share the work of the frozen blocks, as `share` of `train_rows`."""
        from peft_onelayer.rl.prefix import shared_prefix

        return shared_prefix(trainer)

    def begin_evaluation(self) -> None:
        """Called between training and evaluation."""


def run_layer(spec: RunSpec, on_step: OnStep = lambda step, reward: None, place: Alone | None = None) -> Row:
    """Train what `spec` says and evaluate it, leaving nothing behind; without steps, find its learning rate.

    Args:
        on_step: called after every step with its number and the last mean reward.
        place: where it computes; None: here, by itself.

    Returns:
        JSON values: "format"; "digest" and "spec", the specification; "scores", one per problem, the mean over its
        samples; "mean" and "standard_error" of them (None for one problem); "greedy_scores", likewise for greedy
        decoding, or None; "problems_digest", SHA-256 of the problems; "rewards", one per step or, where several train
        on one generation, per first step of one; "steps"; "tokens_generated" and "tokens_trained" in training;
        "tokens_evaluated", generated in the evaluation; "seconds"; "versions", of the libraries and the machine. Where
        a learning rate was to be found, in place of scores, rewards and problems "found", the fields of `FoundRate`;
        or, where nothing can be learned, "nothing", why, and "shown", some completions to read.

    Raises:
        ValueError: the model's files are not those of the specification, or what it names does not fit together.
    """
    from peft_onelayer.rollouts.prompts import Shape, shaped
    from peft_onelayer.runs.describe import describe_machine
    from peft_onelayer.runs.models import without_progress_bars
    from peft_onelayer.tasks import open_task

    start, place = time.perf_counter(), place or Alone()
    found = model_digests(spec.model)
    if found != spec.model_digests:
        changed = min(name for name, _ in found.items() ^ spec.model_digests.items())
        raise ValueError(f"the model in {spec.model} is not the one that the run was made for: {changed} differs")
    task = open_task(None if spec.dataset else spec.task, spec.dataset, spec.reward, unsafe=spec.unsafe)
    if dict(task.data) != dict(spec.task_data):
        raise ValueError(f"the data of task {spec.task} is not what the run was made for: {dict(task.data)}")
    with without_progress_bars():
        model, tokenizer = place.load(spec)
        kwargs = spec.sampling.get("chat_template_kwargs")
        task, _ = shaped(task, tokenizer, Shape(spec.chat, spec.system, spec.shots or 0, kwargs))
        if spec.finds_rate:
            outcome = _find_rate(spec, model, tokenizer, task)
        else:
            outcome = _train_and_evaluate(spec, model, tokenizer, task, on_step, place)
    return {
        "format": FORMAT,
        "digest": spec.digest(),
        "spec": asdict(spec),
        **outcome,
        "seconds": round(time.perf_counter() - start, 2),
        "versions": describe_machine(),
    }


def _train_and_evaluate(
    spec: RunSpec, model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, on_step: OnStep, place: Alone
) -> dict[str, Any]:
    from peft_onelayer.rl.algorithms import load_algorithm
    from peft_onelayer.rl.recipe import make_recipe
    from peft_onelayer.rl.training import train_layer
    from peft_onelayer.rollouts.evaluation import evaluate
    from peft_onelayer.rollouts.settings import Sampling

    rows = task.rows(spec.split, spec.problems, spec.evaluation_seed)
    rewards: list[float] = []
    steps = generated = trained = 0
    if spec.layer != "base":
        if not load_algorithm(spec.algorithm).online:
            raise ValueError(f"a sweep trains on rewards; {spec.algorithm} is offline")
        result = train_layer(
            model,
            tokenizer,
            task,
            None if spec.layer == "full" else spec.layer,
            steps=spec.steps,
            seed=spec.seed,
            recipe=make_recipe(spec.algorithm, task, spec.settings),
            on_step=on_step,
            share=place.share,
        )
        model = result.model
        rewards, steps = result.rewards, result.steps
        generated, trained = result.tokens_generated, result.tokens_trained

    place.begin_evaluation()
    sampling = Sampling(samples=spec.samples, seed=spec.evaluation_seed, batch_size=spec.batch_size, **spec.sampling)
    sampled = evaluate(model, tokenizer, task, rows, sampling)
    greedy = evaluate(model, tokenizer, task, rows, replace(sampling, greedy=True)) if spec.greedy else None
    return {
        "scores": list(sampled.scores),
        "mean": sampled.mean,
        "standard_error": None if math.isnan(sampled.standard_error) else sampled.standard_error,
        "greedy_scores": list(greedy.scores) if greedy else None,
        "problems_digest": hashlib.sha256("\n".join(sampled.problems).encode()).hexdigest(),
        "rewards": rewards,
        "steps": steps,
        "tokens_generated": generated,
        "tokens_trained": trained,
        "tokens_evaluated": sampled.tokens_generated + (greedy.tokens_generated if greedy else 0),
    }


def _find_rate(spec: RunSpec, model: Any, tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, Any]:
    from peft_onelayer.probe.race import NothingToLearnError
    from peft_onelayer.probe.rate import find_learning_rate
    from peft_onelayer.rl.recipe import make_recipe

    recipe = make_recipe(spec.algorithm, task, spec.settings)
    try:
        found = find_learning_rate(
            model,
            tokenizer,
            task,
            None if spec.layer == "full" else spec.layer,
            recipe,
            seed=spec.seed,
            batch_size=spec.batch_size,
        )
    except NothingToLearnError as error:
        shown, why = error.explained(task, recipe.algorithm)
        generated = sum(rollout.tokens for rollout in error.rollouts)
        return {"nothing": why, "shown": shown, "steps": 0, "tokens_generated": generated, "tokens_trained": 0}
    return {
        "found": asdict(found),
        "steps": 0,
        "tokens_generated": found.tokens_generated,
        "tokens_trained": found.tokens_trained,
    }
