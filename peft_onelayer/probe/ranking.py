"""The ranking of a model's layers: what a probe returns and what layer_profile.json holds.

It does not know how the scores were made.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = "onelayer-ranking-1"


@dataclass(frozen=True)
class LayerRanking:
    """Scores of a model's layers for one task.

    Args:
        model: name or path of the base model.
        revision: commit hash of the base model, where it has one.
        num_layers: number of blocks.
        method: the scorer.
        scores: one per layer, higher is better; None where not measured.
        errors: standard errors of the scores, None likewise.
        order: measured layers, best first.
        tied: layers that cannot be told from the best at 95 %, the best one included.
        pick: the layer to train, or None when no layer beats the untrained base.
        learning_rate: the rate the scores were measured at.
        cost: "tokens_generated", "tokens_trained", "seconds", and "share", the tokens (generated and trained) over
            those of one training run.
        task: name of the task.
        seed: seed of data, sampling and training.
    """

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
    format: str = field(default=FORMAT)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LayerRanking:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not JSON, another format, or fields missing or unknown.
        """
        fields: dict[str, Any] = json.loads(text)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ValueError(f'not a layer ranking: expected a JSON object with "format": "{FORMAT}".')
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a layer ranking: {error}.") from None
