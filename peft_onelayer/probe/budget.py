"""The token budget of a race as arithmetic: what was spent, what is left, and what there is room for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .settings import RaceSettings


def base_prompts(share: float, run_completions: float, settings: RaceSettings) -> int:
    """How many prompts the base may complete at a time.

    Generating them costs no more than `shared_share` of the budget, whatever the completions' length.

    Args:
        share: the budget, as a share of the tokens of a training run.
        run_completions: completions that this run generates.

    >>> base_prompts(0.25, 28_800, RaceSettings()), base_prompts(0.1, 384, RaceSettings())
    (32, 0)
    """
    return min(settings.base_prompts, int(settings.shared_share * share * run_completions / settings.samples))


def least_share(run_completions: float, settings: RaceSettings) -> float:
    """The smallest budget that lets the base complete a prompt: `base_prompts` is 0 below it."""
    return settings.samples / settings.shared_share / run_completions


def shares_of_round(
    run_completions: float, run_passes: float, candidates: int, settings: RaceSettings
) -> tuple[float, float]:
    """The budget below which no first round has room for so many candidates, and one that has, whatever the lengths.

    The latter is in hundredths, rounded up, and lets the base complete a prompt.

    Args:
        run_completions: completions that the training run generates.
        run_passes: rows that it passes through the model.

    >>> [round(share, 3) for share in shares_of_round(768, 768, 3, RaceSettings())]
    [0.694, 0.9]
    """
    least, enough = [], []
    for completion in (0.0, 1.0):  # of a row of one token; between these a share lies between theirs
        left = TokenBudget(0, 0, completion, 1.0, 0, settings).least_left(candidates)
        run = completion * run_completions + run_passes
        least.append(left / run)
        enough.append((left + 2 * settings.minibatch[0]) / run)  # the base's rows that are passed, at least
    # The base's first completions cost half of the shared part at most. A tenth more, as others may be longer.
    share = max(1.1 * max(enough) / (1 - settings.shared_share / 2), least_share(run_completions, settings))
    hundredths = math.ceil(100 * share)
    if base_prompts(hundredths / 100, run_completions, settings) < 1:  # by rounding
        hundredths += 1
    return min(least), hundredths / 100


class TurnSize(NamedTuple):
    """What each candidate gets in a round.

    Attributes:
        prompts: of its score.
        minibatch: completions of an update.
    """

    prompts: int
    minibatch: int


@dataclass
class TokenBudget:
    """Tokens that a race may generate and pass through the model, and those that it has.

    Attributes:
        limit: tokens that may be spent.
        one_run: tokens of the training run that costs are shares of.
        completion: mean tokens of one of the base's completions.
        sequence: mean tokens of one of these with its prompt, which one pass of it costs.
        longest: tokens at which a completion is cut.
        settings: of the race.
        generated: tokens generated so far.
        trained: tokens passed through the model so far.
    """

    limit: float
    one_run: float
    completion: float
    sequence: float
    longest: int
    settings: RaceSettings
    generated: int = 0
    trained: int = 0

    @property
    def spent(self) -> int:
        return self.generated + self.trained

    @property
    def left(self) -> float:
        return self.limit - self.spent

    @property
    def most_shared(self) -> float:
        """Tokens that the base's completions may cost."""
        return self.settings.shared_share * self.limit

    def affordable_prompts(self, reserved: int = 0) -> int:
        """Prompts that can be completed for what is left beside `reserved` tokens, however long completions become."""
        return int((self.left - reserved) / self.settings.samples / self.longest)

    def affordable_candidates(self, number: int = 0) -> int:
        """Candidates that the `number`-th round has room for when each gets the least: the first one with its share of
        what is left, a final with all of it."""
        room = self._of_round(0) if number == 0 else self.left
        return int(room / self._least_turn) - self.settings.spare_turns

    def least_left(self, candidates: int) -> float:
        """Tokens that must be left for the first round to have room for so many candidates."""
        return (candidates + self.settings.spare_turns) * self._least_turn / self.settings.round_shares[0]

    def useful_candidates(self, number: int) -> int:
        """Candidates that the `number`-th round has room for when each gets the most."""
        most = self._turn(self.settings.minibatch[1]) / (1 - self.settings.scoring_share)
        return int(self._of_round(number) / most) - self.settings.spare_turns

    def turn_size(self, number: int, candidates: int) -> TurnSize | None:
        """What each of so many candidates gets in the `number`-th round; None where too little is left to score one."""
        s = self.settings
        turn = self._of_round(number) / (candidates + s.spare_turns)
        prompts = _clamp(s.scoring_share * turn / self._prompt, *s.scoring_prompts)
        minibatch = _clamp((turn - prompts * self._prompt) / self.sequence / s.updates, *s.minibatch)
        prompts = min(prompts, self.affordable_prompts())
        return TurnSize(prompts, minibatch) if prompts >= s.scoring_prompts[0] else None

    @property
    def _prompt(self) -> float:
        """Tokens of a prompt's completions."""
        return self.settings.samples * self.completion

    @property
    def _least_turn(self) -> float:
        """Tokens of a turn with the smallest updates and score."""
        return self._turn(self.settings.minibatch[0]) + self.settings.scoring_prompts[0] * self._prompt

    def _turn(self, minibatch: int) -> float:
        """Tokens of the updates of a turn."""
        return self.settings.updates * minibatch * self.sequence

    def _of_round(self, number: int) -> float:
        """Tokens of the `number`-th round, of what is left for it and those behind it."""
        shares = self.settings.round_shares
        return self.left * shares[number] / sum(shares[number:])


def _clamp(value: float, least: int, most: int) -> int:
    return max(least, min(most, int(value)))
