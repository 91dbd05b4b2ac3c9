"""layer_profile.json: what each block of a model is worth, by a probe, a sweep or a paper."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from peft_onelayer.layers import resolve_layers

from .fields import Record, read
from .text import printable

FORMATS = ("onelayer-ranking-1", "onelayer-sweep-1", "onelayer-profile-1")  # of a probe, of a sweep, published
OPTIONAL_PARTS = (
    "sweep",
    "source",
    "rate_together",
    "first_step_kl",
)  # fields that files have only where they say something
NO_COST: dict[str, float] = {"tokens_generated": 0, "tokens_trained": 0, "seconds": 0.0, "share": 0.0}


@dataclass(frozen=True)
class Sweep:
    """What a sweep measured beside the gains. One entry per block, None where a block was not measured.

    Attributes:
        contribution: C of each block, by `layer_contribution`.
        base: S_base, the score of the untrained model.
        full: S_full, the score after training every parameter.
        contribution_errors: standard errors of C.
        undefined: why no C is defined; None where it is.
        means: S_k, the mean score over problems and seeds.
        base_error: standard error of S_base over problems.
        full_gain: S_full - S_base and its standard error.
        full_learning_rate: of the full-parameter runs.
        learning_rate_search: scores by learning rate, of "layer" and of "full", with the settings of the search; None
            where there was none.
        learning_rates_found: how the rates were found that nobody gave, "layer" and "full", and the "block" of the
            former; None where both were given or searched for.
        algorithm: name of the algorithm.
        settings: fields of its TRL configuration that were set, without the learning rate.
        steps: optimizer steps of a run.
        seeds: of training.
        problems: number evaluated on.
        samples: completions of each problem.
        split: of the problems.
        stopped: by block, the steps at which early stopping ended its runs; such a run has no score.
        greedy: {"base", "full", "means"}: the same by greedy decoding; None where it was not asked for.
        regimes: by "equal rates", "the full run's tuned" and "both tuned": "block_rate", "full_rate", "full_gain",
            "contribution", "contribution_errors" and "undefined"; None where it was not asked for.
    """

    contribution: list[float | None]
    base: float | None
    full: float | None
    contribution_errors: list[float | None] | None = None
    undefined: str | None = None
    means: list[float | None] | None = None
    base_error: float | None = None
    full_gain: list[float | None] | None = None
    full_learning_rate: float | None = None
    learning_rate_search: dict[str, Any] | None = None
    learning_rates_found: dict[str, Any] | None = None
    algorithm: str | None = None
    settings: dict[str, Any] | None = None
    steps: int | None = None
    seeds: list[int] | None = None
    problems: int | None = None
    samples: int | None = None
    split: str | None = None
    stopped: dict[str, list[int]] = field(default_factory=dict)
    greedy: dict[str, Any] | None = None
    regimes: dict[str, Any] | None = None


@dataclass(frozen=True)
class LayerRanking(Record):
    """Scores of a model's blocks for one task, and which block to train.

    Attributes:
        model: name or path of the base model.
        revision: commit hash of the base model, where it has one.
        num_layers: number of blocks.
        method: "auto", "race", "prior", "profile", "sweep", or "published".
        scores: one per block, higher is better; None where not measured. Of a race and of a sweep, the gain in mean
            reward; published ones are contributions.
        errors: standard errors of the scores, None likewise; of a race, those of the difference from the mean of all.
        order: measured blocks, best first; of a race a block that did not run may stand before the pick.
        tied: blocks that cannot be told from the best at 95 %, the best one included.
        pick: the best block, of a race the best that ran, or None when no block beats the untrained base.
        learning_rate: of the run that the block is chosen for: the one given, else the pick's; of a sweep, of the best
            block.
        cost: "tokens_generated", "tokens_trained", "seconds", and "share", the tokens (generated and trained) over
            those of one training run.
        task: name of the task.
        seed: of data, sampling and training.
        learning_rates: the rate for each block: lower than `learning_rate` where a step at it moves the policy too far.
        expected: of a race, expected gain of the pick over that of the best block, C(pick) / C(best).
        rounds: of a race, by block, [updates so far, gain in mean reward, its standard error] of each of its rounds.
        fallback: why there is no race where one was asked for.
        sweep: of a sweep, and of a published profile.
        source: of a published profile, the paper.
        rate_together: of a race without a pick, the learning rate for the blocks of `choice` together, lower than that
            of one: 1 / sqrt(n) of the mean of n blocks.
        first_step_kl: of a race, by block, [nats per token that its first update moved the policy, the noise that was
            taken off]: the learning rate was scaled until the former lay between .005 and .05, where it could be.
    """

    FORMAT: ClassVar[str] = FORMATS[0]
    WHAT: ClassVar[str] = "a layer profile"

    model: str
    revision: str | None
    num_layers: int
    method: str
    scores: list[float | None]
    errors: list[float | None]
    order: list[int]
    tied: list[int]
    pick: int | None
    learning_rate: float | None
    cost: dict[str, float]
    task: str
    seed: int | None
    learning_rates: list[float | None] | None = None
    expected: float | None = None
    rounds: dict[str, list[list[float]]] | None = None
    fallback: str | None = None
    sweep: Sweep | None = None
    source: str | None = None
    rate_together: float | None = None
    first_step_kl: dict[str, list[float]] | None = None

    @property
    def measured(self) -> bool:
        """Whether the scores come with errors, from runs of this model."""
        return any(error is not None for error in self.errors)

    @property
    def worth(self) -> list[float | None]:
        """What ranks the blocks: contributions where they were measured, else scores."""
        return self.sweep.contribution if self.sweep and not self.sweep.undefined else self.scores

    @property
    def choice(self) -> list[int]:
        """The blocks to train, ascending: the pick; without one those of the paper's five middle blocks, which need no
        profile (arXiv 2607.01232), that are in `order`; where there is none, the first in `order`."""
        if self.pick is not None:
            return [self.pick]
        middle = resolve_layers("mid-5", self.num_layers) if self.num_layers >= 5 else []
        return [layer for layer in middle if layer in self.order] or self.order[:1]

    @property
    def choice_learning_rate(self) -> float | None:
        """The learning rate that `choice` is to be trained with."""
        if self.pick is None:
            own = self.rate_together
        else:
            own = self.learning_rates[self.pick] if self.learning_rates else None
        return self.learning_rate if own is None else own

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: the fields of `sweep` stand beside the others."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OPTIONAL_PARTS}
        for name in ("rate_together", "first_step_kl"):
            own |= {} if getattr(self, name) is None else {name: getattr(self, name)}
        if self.sweep is None:
            return {"format": self.FORMAT, **own}
        measured = {f.name: getattr(self.sweep, f.name) for f in fields(Sweep)}
        for name in ("learning_rates_found", "regimes"):
            if measured[name] is None:
                del measured[name]
        return {"format": FORMATS[1], **own, **measured} | ({"source": self.source} if self.source else {})

    @classmethod
    def from_dict(cls, fields_: Mapping[str, Any], where: str) -> Self:
        """Take the fields of a layer_profile.json, of a probe or a sweep, or of a published profile.

        Files were written with C where all parameters had ended below the base; it is undefined there.

        Raises:
            ValueError: another format, or a field that is missing, unknown or of another type, by its name.
        """
        kind = fields_.get("format")
        if kind not in FORMATS:
            raise ValueError(
                f'{where} holds no layer profile: its "format" is {printable(kind, 40)}, expected {", ".join(FORMATS)}.'
            )
        given = {name: value for name, value in fields_.items() if name != "format"}
        if kind == FORMATS[2]:
            return cls._published(given, where)
        if kind == FORMATS[1]:
            names = {f.name for f in fields(Sweep)}
            given["sweep"] = {name: given.pop(name) for name in names & given.keys()}
        return read(cls, given, where)._checked(where)._without_shares_of_no_gain()

    @classmethod
    def _published(cls, given: dict[str, Any], where: str) -> Self:
        """A profile of a paper: contributions, of some blocks or of all."""
        published = read(_Published, given, where)
        scores = published.contribution
        order = sorted((k for k, c in enumerate(scores) if c is not None), key=lambda k: -(scores[k] or 0.0))
        ranking = cls(
            model=published.model,
            revision=None,
            num_layers=published.num_layers,
            method="published",
            scores=scores,
            errors=[None] * len(scores),
            order=order,
            tied=order[:1],
            pick=order[0] if order else None,
            learning_rate=None,
            cost=dict(NO_COST),
            task=published.data or "",
            seed=None,
            sweep=Sweep(scores, published.base, published.full, algorithm=published.algorithm),
            source=published.source,
        )
        return ranking._checked(where)

    def _checked(self, where: str) -> Self:
        """Raise ValueError unless there is one finite score or null for each block, and every index is a block."""
        lists = {"scores": self.scores, "errors": self.errors, "learning_rates": self.learning_rates}
        if self.sweep:
            lists |= {name: getattr(self.sweep, name) for name in ("contribution", "contribution_errors", "means")}
        for name, values in lists.items():
            if values is None:
                continue
            if len(values) != self.num_layers:
                raise ValueError(
                    f"{where}: {name} has {len(values)} entries, expected {self.num_layers}, one per block"
                )
            if not all(value is None or math.isfinite(value) for value in values):
                raise ValueError(f"{where}: {name} holds a number that is not finite; expected numbers or null")
        for name, blocks in (("order", self.order), ("tied", self.tied), ("pick", [self.pick or 0])):
            if not all(0 <= block < self.num_layers for block in blocks):
                raise ValueError(f"{where}: {name} names a block that is not one of 0 to {self.num_layers - 1}")
        if self.sweep and self.sweep.full_gain and len(self.sweep.full_gain) != 2:
            raise ValueError(
                f"{where}: full_gain has {len(self.sweep.full_gain)} entries, expected a gain and its error"
            )
        return self

    def _without_shares_of_no_gain(self) -> Self:
        from peft_onelayer.statistics import why_no_share  # numpy, which a ranking is read without

        sweep = self.sweep
        if sweep is None or sweep.undefined or not sweep.full_gain:
            return self
        gain, error = sweep.full_gain
        if gain is None or (reason := why_no_share(gain, error)) is None:
            return self
        nothing: list[float | None] = [None] * self.num_layers
        return replace(self, sweep=replace(sweep, contribution=nothing, contribution_errors=nothing, undefined=reason))

    def to_csv(self) -> str:
        """Of a sweep, one line for the base, for full, and for each block that was to be measured."""
        sweep = self.sweep
        assert sweep is not None and sweep.means is not None and sweep.contribution_errors is not None
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(
            ["layer", "score", "gain", "gain_error", "contribution", "contribution_error", "learning_rate", "stopped"]
        )
        table.writerow(["base", sweep.base, "", "", "", "", "", ""])
        table.writerow(["full", sweep.full, *(sweep.full_gain or []), "", "", sweep.full_learning_rate, ""])
        for k in range(self.num_layers):
            stopped = sweep.stopped.get(str(k), [])
            if sweep.means[k] is not None or stopped:
                row = [k, sweep.means[k], self.scores[k], self.errors[k]]
                row += [sweep.contribution[k], sweep.contribution_errors[k]]
                rate = self.learning_rates[k] if self.learning_rates else self.learning_rate
                table.writerow([*row, rate, " ".join(map(str, stopped))])
        return text.getvalue()


@dataclass(frozen=True)
class _Published:
    """A file of peft_onelayer/profiles/."""

    model: str
    num_layers: int
    contribution: list[float | None]
    algorithm: str | None = None
    data: str | None = None
    base: float | None = None
    full: float | None = None
    best: float | None = None
    partial: bool | None = None
    source: str | None = None
