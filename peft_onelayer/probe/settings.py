"""The settings of a race."""

from __future__ import annotations

from dataclasses import dataclass

RACES = ("auto", "race")  # of METHODS, those that run the model
METHODS = (*RACES, "prior", "profile")  # of ranking the blocks
BUDGET = 0.25  # of a race, by default, as a share of the tokens of the training run


@dataclass(frozen=True)
class RaceSettings:
    """How a race divides its budget and which blocks it keeps; examples/study measured the defaults.

    Attributes:
        samples: completions of a prompt.
        base_prompts: prompts that the base completes at a time, for the first round to learn from.
        shared_completions: informative completions of the base that are wanted.
        shared_share: part of the budget that generating them may cost, at most.
        round_shares: parts of the rest of the budget, one for each round.
        rate_factors: factors of the candidates' learning rates, one for each round.
        spare_turns: turns of a round whose tokens no candidate gets: for the base's score and for turns that cost more.
        starting_share: part of the blocks that start, evenly spread, at least.
        joining: other blocks that join them, chosen by their neighbours.
        finalists: candidates of each round after the first, at least.
        fewest: candidates of the first round, at least.
        updates: of a candidate in a round.
        minibatch: completions of an update, least and most.
        scoring_share: part of a turn's tokens that its score costs.
        scoring_prompts: prompts of a score, least and most.
    """

    samples: int = 8
    base_prompts: int = 32
    shared_completions: int = 256
    shared_share: float = 0.2
    round_shares: tuple[float, ...] = (0.6, 0.25, 0.15)
    rate_factors: tuple[float, ...] = (1.0, 0.7, 0.5)
    spare_turns: int = 2
    starting_share: float = 0.5
    joining: int = 2
    finalists: tuple[int, ...] = (4, 3)
    fewest: int = 3
    updates: int = 4
    minibatch: tuple[int, int] = (16, 128)
    scoring_share: float = 0.3
    scoring_prompts: tuple[int, int] = (8, 128)


DEFAULT_SETTINGS = RaceSettings()
