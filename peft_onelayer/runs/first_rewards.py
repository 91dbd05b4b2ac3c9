"""Looks closer where the first steps of a run find no two completions of a prompt that differ in reward."""

from __future__ import annotations

import math
from collections.abc import Callable

from transformers import TrainerCallback

PROMPTS = 8  # without a difference in reward, after which to look: a batch at its default size


class FirstRewards(TrainerCallback):
    """Calls `look` once if TRL's share of groups of equal rewards is 1 in all steps of the first `PROMPTS` prompts, or
    of a run that has fewer.

    Args:
        prompts: of a log: a step's or, where one has several steps, a generation's.
        look: samples the task, and raises where it can teach nothing.
    """

    def __init__(self, prompts: float, look: Callable[[], object]) -> None:
        self.left, self.look, self.seen = math.ceil(PROMPTS / prompts), look, False

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.left == 0:
            return
        if "frac_reward_zero_std" in (logs or {}):
            if logs["frac_reward_zero_std"] < 1:
                self.left = 0
                return
            self.left, self.seen = self.left - 1, True
        if self.seen and (self.left == 0 or state.global_step == state.max_steps):
            self.left = 0
            self.look()
