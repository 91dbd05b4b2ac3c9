"""The runs that a sweep consists of, from its settings: what cannot work is refused here, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_onelayer.layers import resolve_layers
from peft_onelayer.records.files import model_digests
from peft_onelayer.rl.algorithms import load_algorithm
from peft_onelayer.rl.recipe import make_recipe, refuse_without_effect, step_fields
from peft_onelayer.rl.sampling import sampling_of_run
from peft_onelayer.rl.scored import check_backbone
from peft_onelayer.rl.training import rows_of_step
from peft_onelayer.rollouts.prompts import Shape, check_prompt, shaped
from peft_onelayer.runs.models import load_skeleton
from peft_onelayer.runs.plan import check_task
from peft_onelayer.tasks import open_task
from peft_onelayer.tuner import find_decoder_stack
from peft_onelayer.tuner.base import commit_hash
from peft_onelayer.tuner.stack import layer_kinds

from .early import check_problems, check_sweep
from .run_layer import Row, RunSpec
from .settings import SweepSettings


@dataclass(frozen=True)
class RateSearch:
    """Runs that choose the learning rates.

    Attributes:
        rates: to choose from.
        block: that is trained for the blocks' rate.
        layer: its runs, one for each rate.
        full: full-parameter runs, one for each rate.
    """

    rates: Sequence[float]
    block: int
    layer: Sequence[RunSpec]
    full: Sequence[RunSpec]

    @property
    def specs(self) -> list[RunSpec]:
        return [*self.layer, *self.full]

    def best(self, rows: Mapping[str, Row]) -> tuple[float, float]:
        """The rate of the highest score for a block, and for all parameters.

        Args:
            rows: of the runs, by the digests of their specifications.
        """

        def best_of(specs: Sequence[RunSpec]) -> float:
            scores = [rows[spec.digest()]["mean"] for spec in specs]
            return self.rates[scores.index(max(scores))]

        return best_of(self.layer), best_of(self.full)


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep.

    Attributes:
        num_layers: blocks of the model.
        base: the evaluation of the untrained model.
        full: full-parameter runs, one for each seed.
        blocks: the runs of each block to be measured, one for each seed.
        search: for the learning rates; None where they are given or found.
        finding: the runs that find a learning rate where none is given, of a block as "layer" and of "full".
    """

    num_layers: int
    base: RunSpec
    full: Sequence[RunSpec]
    blocks: Mapping[int, Sequence[RunSpec]]
    search: RateSearch | None
    finding: Mapping[str, RunSpec]

    @property
    def of_rates(self) -> list[RunSpec]:
        """The runs that choose the learning rates of the others."""
        return [*(self.search.specs if self.search else []), *self.finding.values()]

    @property
    def specs(self) -> list[RunSpec]:
        """All runs but those of the learning rates, those of one seed after those of another: the first seed says the
        most when the sweep does not get further."""
        by_seed = zip(self.full, *self.blocks.values(), strict=True)
        return [self.base, *(spec for of_seed in by_seed for spec in of_seed)]

    def with_learning_rates(self, rows: Mapping[str, Row]) -> Plan:
        """The same runs at the rates that `of_rates` chose.

        Args:
            rows: of these runs, by the digests of their specifications.

        Raises:
            ValueError: there is nothing to learn from.
        """
        layer = full = None
        if self.search:
            layer, full = self.search.best(rows)
        rates = {"layer": layer, "full": full}
        for name, spec in self.finding.items():
            row = rows[spec.digest()]
            if "nothing" in row:
                raise ValueError(row["nothing"])
            rates[name] = row["found"]["learning_rate"]
        return replace(
            self,
            full=[with_learning_rate(spec, rates["full"]) for spec in self.full],
            blocks={k: [with_learning_rate(s, rates["layer"]) for s in specs] for k, specs in self.blocks.items()},
        )


def plan_sweep(settings: SweepSettings, block: int | None = None) -> Plan:
    """The runs of a sweep, known without the model's weights.

    Args:
        block: by which the blocks' learning rate is found or searched for; None for the middle one of those measured.

    Raises:
        ValueError: a setting that cannot work, a model or data that are not there.
    """
    check_sweep(settings)
    _refuse_beside_search(settings)
    algorithm = load_algorithm(settings.algorithm)
    refuse_without_effect(settings.config, algorithm)
    seeds = list(settings.seeds)
    task = open_task(settings.task, settings.dataset, settings.reward, unsafe=settings.unsafe)
    check_task(algorithm, task)
    recipe = make_recipe(algorithm, task, settings.config, prompts=settings.prompts, completions=settings.completions)
    config = recipe.config(output_dir="unused", max_steps=settings.steps)
    given = dict(settings.config) | (step_fields(recipe) if settings.prompts or settings.completions else {})
    sampling = sampling_of_run(algorithm, config)
    model, tokenizer = load_skeleton(settings.model, settings.revision, trust_remote_code=settings.trust_remote_code)
    check_backbone(model, algorithm.trainer_class())
    num_layers = len(find_decoder_stack(model).blocks)
    layers = resolve_layers(settings.layers, num_layers, layer_kinds(model))
    rates, full_rate = _learning_rates(settings, layers)
    shape = Shape(settings.chat, settings.system, settings.shots or 0, sampling.chat_template_kwargs)
    asked, chat = shaped(task, tokenizer, shape)
    rows_of_step(asked, recipe, config, seeds[0])
    check_problems(settings.problems, asked)
    plays = task.environment_factory is not None
    check_prompt(asked.rows("test", 1, 0)[0], tokenizer, settings.model, sampling.chat_template_kwargs, plays=plays)
    folder = Path(settings.model).expanduser()
    block = layers[len(layers) // 2] if block is None else block
    first = RunSpec(
        model=str(folder.resolve()) if folder.is_dir() else settings.model,
        revision=commit_hash(model) or settings.revision,
        model_digests=model_digests(settings.model),
        task=settings.task or task.name,
        dataset=settings.dataset,
        reward=settings.reward,
        task_data=dict(task.data),
        layer="full",
        algorithm=settings.algorithm,
        settings=given,
        steps=settings.steps,
        seed=seeds[0],
        problems=settings.problems,
        samples=settings.samples,
        evaluation_seed=settings.evaluation_seed,
        batch_size=settings.batch_size,
        greedy=settings.greedy,
        sampling=sampling.shape,
        chat=chat,
        system=settings.system or None,
        shots=settings.shots or None,
        trust_remote_code=settings.trust_remote_code,
        unsafe=settings.unsafe,
    )
    full = with_learning_rate(first, full_rate)
    blocks = {k: with_learning_rate(replace(first, layer=k), rates[k]) for k in layers}
    return Plan(
        num_layers,
        base=replace(first, layer="base", algorithm="none", settings={}, steps=0, seed=0),
        full=[replace(full, seed=seed) for seed in seeds],
        blocks={k: [replace(spec, seed=seed) for seed in seeds] for k, spec in blocks.items()},
        search=_search(first, block, settings.search_learning_rates),
        finding={} if settings.search_learning_rates else _finding(first, block, rates, full_rate),
    )


def with_learning_rate(spec: RunSpec, rate: float | None) -> RunSpec:
    """The run at this rate; with None as it is."""
    return spec if rate is None else replace(spec, settings={**spec.settings, "learning_rate": rate})


def _learning_rates(settings: SweepSettings, layers: Sequence[int]) -> tuple[dict[int, float | None], float | None]:
    """The rate of each block, and that of the full-parameter runs; None where it is to be found."""
    rate, full_rate = settings.learning_rate, settings.full_learning_rate
    of_block: dict[int, float | None] = dict(rate) if isinstance(rate, Mapping) else dict.fromkeys(layers, rate)
    if full_rate is None:
        if isinstance(rate, Mapping):
            raise ValueError("where each block has its own learning rate, full_learning_rate must be given too")
        full_rate = rate
    if missing := [k for k in layers if k not in of_block]:
        raise ValueError(f"no learning rate for block {missing[0]}; there are rates for {sorted(of_block)}")
    return of_block, full_rate


def _refuse_beside_search(settings: SweepSettings) -> None:
    """Refuse a rate that a search would leave without effect."""
    if not settings.search_learning_rates:
        return
    given: dict[str, Any] = {"--full-learning-rate": settings.full_learning_rate}
    if not settings.regimes:  # these have blocks and all parameters at the given rate too
        given["--learning-rate"] = settings.learning_rate
    for option, rate in given.items():
        if rate is not None:
            raise ValueError(
                f"{option} {rate} has no effect beside --search-learning-rates, which chooses the rates of blocks and "
                "of all parameters; leave one of the two out"
            )


def _search(first: RunSpec, block: int, rates: Sequence[float]) -> RateSearch | None:
    if not rates:
        return None
    # on other problems than those that are reported
    trial = replace(first, split="train", evaluation_seed=first.evaluation_seed + 1)
    layer = [with_learning_rate(replace(trial, layer=block), rate) for rate in rates]
    return RateSearch(list(rates), block, layer, [with_learning_rate(trial, rate) for rate in rates])


def _finding(
    first: RunSpec, block: int, rates: Mapping[int, float | None], full_rate: float | None
) -> dict[str, RunSpec]:
    """The runs that find a rate; nothing of the evaluation is in them, so that another one does not repeat them."""
    run = replace(first, split="train", steps=0, problems=0, samples=0, greedy=False, sampling={}, evaluation_seed=0)
    found = {"layer": replace(run, layer=block)} if None in rates.values() else {}
    return found if full_rate is not None else {**found, "full": run}
