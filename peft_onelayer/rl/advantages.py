"""The advantages of GiGPO (arXiv 2505.10978): each action is compared with the others taken in the same state.

Plain Python on the rewards of finished trajectories; `GiGPOTrainer` lays the advantages over the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher

NORMALIZATIONS = ("std", "none")
EPSILON = 1e-6  # added to the standard deviation


def gigpo_advantages(
    rewards: Sequence[Sequence[float]],
    anchors: Sequence[Sequence[Hashable]],
    groups: Sequence[Hashable],
    gamma: float = 0.95,
    omega: float = 1.0,
    normalize: str = "std",
    similarity: float | None = None,
) -> list[list[float]]:
    """Return A_E + omega * A_S for every step of every trajectory (arXiv 2505.10978), in float64.

    - A_E = (R - mean) / F over the trajectories of one task, R the undiscounted sum of a trajectory's rewards.
    - A_S = (R_t - mean) / F over the steps of one task that share an anchor state, also within one trajectory, with
      the return to go R_t = r_t + gamma * r_{t+1} + gamma^2 * r_{t+2} + ...
    - F is the sample standard deviation (n - 1) of what was averaged, plus 1e-6, or 1 with `normalize="none"`.
    - What stands alone, a step or a trajectory, has nothing to be compared with: its term is 0.

    Args:
        rewards: per trajectory, the reward of each step.
        anchors: per trajectory, the state in which each step's action was taken.
        groups: per trajectory, its task. Trajectories of different tasks are never compared.
        gamma: discount of the return to go, in [0, 1].
        omega: weight of the step term.
        normalize: "std" or "none".
        similarity: `None` compares anchors for equality. A ratio in (0, 1] groups similar texts: going through the
            steps in order, an anchor joins the first group whose first anchor it resembles by at least that
            `difflib.SequenceMatcher` ratio (without its heuristic for long texts), else it opens a group.

    Returns:
        One list per trajectory, with one advantage per step.

    Raises:
        ValueError: for lists that do not fit together, a trajectory without steps, a reward that is NaN or infinite,
            or an option out of range.

    Example: two trajectories start in "hall"; one goes on to "cellar" and is rewarded there.

        >>> rewards, states, tasks = [[0, 1], [0]], [["hall", "cellar"], ["hall"]], ["game", "game"]
        >>> gigpo_advantages(rewards, states, tasks, gamma=0.5, normalize="none")
        [[0.75, 0.5], [-0.75]]

    The returns 1 and 0 are .5 above and below their mean; going on from the hall was worth .5 * 1, staying 0, so that
    the steps there are .25 above and below theirs. The cellar was seen once: its step has the episode term only.
    """
    if not math.isfinite(omega):
        raise ValueError(f"omega must be a finite number, got {omega}")
    check_trajectories(rewards, anchors, groups)
    labels = anchor_groups(anchors, groups, similarity)
    step = step_advantages(rewards, labels, gamma, normalize)
    episode = _compare([math.fsum(trajectory) for trajectory in rewards], groups, normalize)
    return [[a_e + omega * a_s for a_s in row] for a_e, row in zip(episode, step, strict=True)]


def check_trajectories(
    rewards: Sequence[Sequence[float]], anchors: Sequence[Sequence[Hashable]], groups: Sequence[Hashable]
) -> None:
    """Raise ValueError where the three do not fit together, or a reward is not a finite number."""
    if not len(rewards) == len(anchors) == len(groups):
        raise ValueError(
            "rewards, anchors and groups must have one entry per trajectory, "
            f"got {len(rewards)}, {len(anchors)} and {len(groups)}"
        )
    for i, (steps, states) in enumerate(zip(rewards, anchors, strict=True)):
        if len(steps) != len(states) or not len(steps):
            raise ValueError(
                f"trajectory {i} has {len(steps)} rewards and {len(states)} anchors, expected one of each per step "
                "and at least one step"
            )
        for t, reward in enumerate(steps):
            if not math.isfinite(reward):
                raise ValueError(f"the reward of step {t} of trajectory {i} is {reward}, expected a finite number")


def anchor_groups(
    anchors: Sequence[Sequence[Hashable]], groups: Sequence[Hashable], similarity: float | None = None
) -> list[list[int]]:
    """Return the number of each step's anchor group, counted from 0 in order of appearance (see `gigpo_advantages`).

    Raises:
        ValueError: for a similarity out of (0, 1], or with one and an anchor that is not a string.
    """
    if similarity is not None and not 0 < similarity <= 1:
        raise ValueError(f"similarity must be None (equal anchors) or in (0, 1], got {similarity}")
    seen: dict[Hashable, dict[Hashable, int]] = {}  # task -> anchor -> group
    first: dict[Hashable, dict[int, Hashable]] = {}  # task -> group -> its first anchor
    count = 0

    def find(task: Hashable, anchor: Hashable) -> int | None:
        if similarity is None or anchor in seen[task]:
            return seen[task].get(anchor)
        if not isinstance(anchor, str):
            raise ValueError(f"similarity compares strings, got an anchor of type {type(anchor).__name__}")
        # autojunk would take the frequent letters of a text of 200 or more for noise, and find nothing similar.
        matcher = SequenceMatcher(None, "", anchor, autojunk=False)
        for group, representative in first[task].items():
            matcher.set_seq1(representative)  # type: ignore[arg-type]
            # The first two are upper bounds of the third and cheap.
            if min(matcher.real_quick_ratio(), matcher.quick_ratio()) >= similarity <= matcher.ratio():
                return group
        return None

    labels = []
    for trajectory, task in zip(anchors, groups, strict=True):
        seen.setdefault(task, {})
        first.setdefault(task, {})
        row = []
        for anchor in trajectory:
            group = find(task, anchor)
            if group is None:
                group, count = count, count + 1
                first[task][group] = anchor
            seen[task][anchor] = group
            row.append(group)
        labels.append(row)
    return labels


def step_advantages(
    rewards: Sequence[Sequence[float]], labels: Sequence[Sequence[int]], gamma: float, normalize: str
) -> list[list[float]]:
    """Return A_S for every step of every trajectory, in float64; `labels` from `anchor_groups`.

    Raises:
        ValueError: for a gamma out of [0, 1] or an unknown normalization.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    returns = []
    for trajectory in rewards:
        to_go, row = 0.0, []
        for reward in reversed(trajectory):
            to_go = float(reward) + gamma * to_go
            row.append(to_go)
        returns.append(row[::-1])
    flat = iter(_compare([r for row in returns for r in row], [label for row in labels for label in row], normalize))
    return [[next(flat) for _ in row] for row in returns]


def _compare(values: Sequence[float], groups: Sequence[Hashable], normalize: str) -> list[float]:
    """Return (value - mean) / F within each group, 0 in a group of one."""
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}")
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    advantages = [0.0] * len(values)
    for indices in members.values():
        if len(indices) == 1:
            continue
        # Counted from the first of them, so that equal values give exactly 0, whatever their size.
        shifted = [values[i] - values[indices[0]] for i in indices]
        mean = math.fsum(shifted) / len(shifted)
        scale = 1.0
        if normalize == "std":
            scale = math.sqrt(math.fsum((v - mean) ** 2 for v in shifted) / (len(shifted) - 1)) + EPSILON
        for i, value in zip(indices, shifted, strict=True):
            advantages[i] = (value - mean) / scale
    return advantages
