"""The ranking of a model's layers: what a probe returns and what layer_profile.json holds.

It does not know how the scores were made.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from peft_onelayer.layers import resolve_layers

FORMAT = "onelayer-ranking-1"
MID_5 = (51.4 - 44.1) / (51.8 - 44.1)  # arXiv 2607.01232, Qwen3-1.7B-Base


@dataclass(frozen=True)
class LayerRanking:
    """Scores of a model's layers for one task.

    Args:
        model: name or path of the base model.
        revision: commit hash of the base model, where it has one.
        num_layers: number of blocks.
        method: "auto", "race", "prior", "profile", or "sweep".
        scores: one per layer, higher is better; None where not measured. Of a race, the gain in mean reward.
        errors: standard errors of the scores, None likewise; of a race, those of the difference from the mean of all.
        order: measured layers, best first.
        tied: layers that cannot be told from the best at 95 %, the best one included.
        pick: the layer to train, or None when no layer beats the untrained base.
        learning_rate: of the run that the layer is chosen for.
        cost: "tokens_generated", "tokens_trained", "seconds", and "share", the tokens (generated and trained) over
            those of one training run.
        task: name of the task.
        seed: seed of data, sampling and training.
        learning_rates: the rate for each layer: lower than `learning_rate` where a step at it moves the policy too far.
        expected: expected gain of the pick over that of the best layer, C(pick) / C(best), where there is a posterior.
        fallback: why there is no race where one was asked for.
        rounds: of a race: by layer, [updates so far, gain in mean reward, its standard error] of each of its rounds.
    """

    KIND: ClassVar[str] = "a layer ranking"

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
    seed: int
    learning_rates: list[float | None] | None = None
    expected: float | None = None
    rounds: dict[str, list[list[float]]] | None = None
    fallback: str | None = None
    format: str = FORMAT

    @property
    def measured(self) -> bool:
        """Whether the scores come with errors, from runs of this model."""
        return any(error is not None for error in self.errors)

    @property
    def choice(self) -> str:
        """What to train, as `SingleLayerConfig` takes it: the pick, or "mid-5" where that is the better bet.

        It is where nothing is picked, and where the pick is expected to miss more of the best layer's gain than mid-5
        did in arXiv 2607.01232 (without any profile it reached 51.4 against 51.8 of the best layer, from 44.1, that is
        95 %, on the model of the three where it did worst) while none of its layers is behind.
        """
        if self.num_layers < 5:
            return str(self.order[0] if self.pick is None else self.pick)
        middle = resolve_layers("mid-5", self.num_layers)
        unsure = self.expected is not None and self.expected < MID_5
        return "mid-5" if self.pick is None or (unsure and set(middle) <= set(self.tied)) else str(self.pick)

    @property
    def recommended_rate(self) -> float | None:
        """The learning rate for `choice`."""
        own = None if self.pick is None or not self.learning_rates else self.learning_rates[self.pick]
        return self.learning_rate if own is None else own

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not JSON, another format, or fields missing or unknown.
        """
        fields: dict[str, Any] = json.loads(text)
        if not isinstance(fields, dict) or fields.get("format") != cls.format:
            raise ValueError(f'not {cls.KIND}: expected a JSON object with "format": "{cls.format}".')
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not {cls.KIND}: {error}.") from None
