"""What a sweep is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft_onelayer.runs.settings import STEPS

# Fields of a TRL configuration that a setting of their own decides, and the option of the command line.
SWEEP_OPTIONS = {
    "output_dir": "--out",
    "seed": "--seeds",
    "max_steps": "--steps",
    "num_train_epochs": "--steps",
    "learning_rate": "--learning-rate and --full-learning-rate",
    "trust_remote_code": "--trust-remote-code",
    "model_init_kwargs": "--revision and --trust-remote-code: the model is loaded before there is a trainer",
}


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """One sweep, as `onelayer sweep` takes it.

    Attributes:
        model: base model: a folder or a Hub id.
        task: a name for `load_task`; None with `dataset`.
        dataset, reward: instead of a task, as of `TrainingSettings`.
        layers: blocks to measure: "all", or as `SingleLayerConfig` takes them.
        algorithm: a name for `load_algorithm`; an online one.
        steps: optimizer steps of every run.
        seeds: of training and its data, one run of everything for each; the evaluation is the same for all.
        prompts, completions: of an optimizer step, as of `TrainingSettings`.
        learning_rate: of the blocks' runs; a mapping gives each block its own, such as a probe found. None for one that
            is found: a first step of the middle one of `layers` at it moves the policy far enough
            (`find_learning_rate`).
        full_learning_rate: of the full-parameter runs; None for `learning_rate`, as in the paper (small models need a
            lower one), and where that is None too, for one that is found likewise by a first step of all parameters. It
            must be given where each block has its own.
        search_learning_rates: rates to choose both from instead: each trains the middle one of `layers`, and all
            parameters, with the first seed; the best on problems of the training split is taken.
        regimes: whether to measure C under three regimes of rates too (`regimes.py`): at equal rates, `learning_rate`
            or else the blocks' tuned one; with the full run's tuned; with both tuned. It needs `search_learning_rates`.
        config: values by field of the algorithm's TRL configuration; what of it shapes completions shapes those of
            the evaluation too, the base's among them.
        problems: held-out problems to evaluate on, at least two; fewer than asked for where the split is smaller.
        samples: completions of each problem.
        greedy: whether to evaluate greedily too.
        batch_size: completions at a time in the evaluation, on which the samples depend.
        evaluation_seed: of the problems and of sampling.
        chat: give prompts as messages of a user; None for: if the tokenizer has a chat template.
        system, shots: of the prompts, as of `TrainingSettings`.
        revision: Hub revision of the base model.
        trust_remote_code: run the Python code that comes with the base model.
        unsafe: let the model's code run without a full sandbox.
    """

    model: str
    task: str | None = None
    dataset: str | None = None
    reward: str | None = None
    layers: int | str | Sequence[int] = "all"
    algorithm: str = "grpo"
    steps: int = STEPS
    seeds: Sequence[int] = (0,)
    prompts: int | None = None
    completions: int | None = None
    learning_rate: float | Mapping[int, float] | None = None
    full_learning_rate: float | None = None
    search_learning_rates: Sequence[float] = ()
    regimes: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    problems: int = 256
    samples: int = 4
    greedy: bool = False
    batch_size: int = 64
    evaluation_seed: int = 0
    chat: bool | None = None
    system: str | None = None
    shots: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    unsafe: bool = False
