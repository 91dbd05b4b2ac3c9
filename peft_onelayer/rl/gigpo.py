"""GiGPO (arXiv 2505.10978) for TRL's multi-turn rollouts: GRPO whose advantage differs from step to step.

A rollout in an environment is one completion: what the model wrote, and between it what the tools answered. A step is
one turn of the model. `GiGPOTrainer` notes the state in which each turn began and what it earned, and adds the
advantage of the step to TRL's own on the tokens of that turn. How the advantages are computed stands in `advantages`;
the environments are the tasks'.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import gather_object
from trl import GRPOConfig, GRPOTrainer

from peft_onelayer.seams import check

from .advantages import NORMALIZATIONS, anchor_groups, check_trajectories, gigpo_advantages, step_advantages

__all__ = ["GiGPOConfig", "GiGPOTrainer", "gigpo_advantages"]


check(__name__)


@dataclass
class GiGPOConfig(GRPOConfig):
    """`GRPOConfig` with the settings of GiGPO.

    The loss is the paper's: PPO's clip at .2 and a plain KL term (`use_bias_correction_kl=False`), averaged over each
    rollout (`loss_type="grpo"`). The weight of the KL is that of arXiv 2607.01232, Table 8 (`beta=0.001`).

    Args:
        gamma: discount of a step's return to go, in [0, 1].
        omega: weight of the step advantage; 0 is GRPO.
        normalize: what the step advantages are divided by, "std" (of their group) or "none".
        anchor_similarity: `None` groups equal states; in (0, 1], states whose texts have that
            `difflib.SequenceMatcher` ratio.
        scale_rewards: as in GRPO; `None` is what `normalize` says, "group" for "std" and "none" for "none".

    Raises:
        ValueError: for a value out of range, and for `importance_sampling_level="sequence"`, which would give every
            token of a rollout the mean of its advantages.
    """

    gamma: float = field(default=0.95, metadata={"help": "Discount of a step's return to go, in [0, 1]."})
    omega: float = field(default=1.0, metadata={"help": "Weight of the step advantage; 0 is GRPO."})
    normalize: str = field(
        default="std", metadata={"help": "What step advantages are divided by: 'std' of their group, or 'none'."}
    )
    anchor_similarity: float | None = field(
        default=None, metadata={"help": "Similarity in (0, 1] from which states count as the same; None: equal ones."}
    )
    scale_rewards: str | None = field(
        default=None, metadata={"help": "As in GRPO; None follows `normalize`: 'group' for 'std', else 'none'."}
    )
    loss_type: str = field(default="grpo", metadata={"help": "As in GRPO."})
    beta: float = field(default=0.001, metadata={"help": "Weight of the KL term."})
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Whether to multiply the KL term by the importance sampling ratio."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}")
        if not math.isfinite(self.omega):
            raise ValueError(f"omega must be a finite number, got {self.omega}")
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got {self.normalize!r}")
        if self.anchor_similarity is not None and not 0 < self.anchor_similarity <= 1:
            raise ValueError(f"anchor_similarity must be None or in (0, 1], got {self.anchor_similarity}")
        if self.importance_sampling_level == "sequence":
            raise ValueError(
                "importance_sampling_level='sequence' gives every token of a rollout the mean of its advantages, "
                "which undoes GiGPO's steps: use 'token'"
            )
        if self.scale_rewards is None:
            self.scale_rewards = "group" if self.normalize == "std" else "none"
        super().__post_init__()


class GiGPOTrainer(GRPOTrainer):
    """`GRPOTrainer` with step advantages: A = A_E + omega * A_S on the tokens of each step.

    A_E is TRL's own advantage of the rollout, from the reward functions. A_S compares a step with the others that
    began in the same state, among the `num_generations` rollouts of one prompt (`gigpo_advantages`). With `omega=0` the
    training equals that of `GRPOTrainer` with the same settings bit for bit.

    It takes the arguments of `GRPOTrainer`, `args` a `GiGPOConfig`, and needs an `environment_factory`. Next to its
    tools, an environment has two properties (not methods: TRL would offer them to the model as tools):

    - `state`: what the agent sees now, the anchor, a string;
    - `score`: the sum of the rewards of this episode so far, a float.

    Both are read right before the model's turn, and `score` once more when the rollout has ended: a step's reward is
    what the score rose by. A turn may call several tools, or none that exists; a call whose answer TRL drops because
    the completion would grow too long has still happened. A rollout whose `reward_funcs` all return None has no
    episode advantage, but its steps are compared all the same.

    Logged: `gigpo/singleton_groups` (share of the anchor groups with one step), `gigpo/group_size` (mean),
    `gigpo/step_advantage` and `gigpo/episode_advantage` (mean magnitude, over steps before omega, and over rollouts).

    Raises:
        ValueError: when made without a `GiGPOConfig`, without environments or tools, with an environment that has no
            `state` and `score`, or with a `rollout_func`, whose turns are not known here; while training for a score
            that is NaN or infinite.
    """

    _tag_names = ["trl", "gigpo"]
    _name = "GiGPO"
    _paper = {"title": "Group-in-Group Policy Optimization for LLM Agent Training", "id": "2505.10978"}

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GiGPOConfig | None = None,
        *others: Any,
        rollout_func: Any = None,
        environment_factory: Any = None,
        **options: Any,
    ) -> None:
        if not isinstance(args, GiGPOConfig):
            raise ValueError(f"args must be a GiGPOConfig, got {type(args).__name__}")
        if rollout_func is not None:
            raise ValueError("GiGPO does not know the turns of a rollout_func: pass an environment_factory instead")
        if environment_factory is None:
            raise ValueError("GiGPO compares the steps of rollouts in environments: pass an environment_factory")
        super().__init__(model, reward_funcs, args, *others, environment_factory=environment_factory, **options)
        for (environment,) in self._environment_pool.values():
            for name in ("state", "score"):
                if name not in dir(environment) or inspect.isroutine(inspect.getattr_static(environment, name)):
                    raise ValueError(
                        f"{type(environment).__name__} has no property {name!r}; GiGPO reads `state` (what the agent "
                        "sees, a string) and `score` (the sum of rewards so far) before every turn"
                    )
        if not self.tools:
            raise ValueError("the environment has no public method, so that the model has no tool to act with")

    # The four methods below are private to TRL. tests/rl/test_gigpo_trainer.py holds what is relied on (trl 1.16.0,
    # trainer/grpo_trainer.py, GRPOTrainer):
    # - _generate_and_score_completions resets one environment per rollout into self.environments, then generates.
    # - _generate_single_turn generates the first turn of all rollouts, and then from _tool_call_loop, after the tools
    #   of a turn were called, the next turn of those that go on. All of them are in the same turn, so that turn t of a
    #   rollout began with the environments as they stood at call t.
    # - _tool_call_loop returns first, per rollout, a list with 1 for the model's tokens and 0 for those of the tools.
    #   Between two turns stand tokens of a tool. A turn cut to nothing leaves no 1; it is no step.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._turns: list[list[tuple[str, float]]] = []  # per turn, (state, score) of every environment
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = self._with_step_advantages(output["advantages"], output["completion_ids"].shape)
        return output

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self._turns.append([(environment.state, float(environment.score)) for environment in self.environments])
        return super()._generate_single_turn(*args, **kwargs)

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._tool_call_loop(*args, **kwargs)
        self._step_of_token = [_number_runs(mask) for mask in result[0]]
        self._final_scores = [float(environment.score) for environment in self.environments]
        return result

    def _with_step_advantages(self, episode: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return the advantages of the local rollouts, (B, T) float32: 0 on tokens of tools and on padding."""
        anchors, rewards = [], []  # per local rollout, one per step
        for i, numbers in enumerate(self._step_of_token):
            steps = [turn[i] for turn in self._turns[: max(numbers) + 1]]
            scores = [score for _, score in steps] + [self._final_scores[i]]
            anchors.append([state for state, _ in steps])
            rewards.append([after - before for before, after in pairwise(scores)])
        # The rollouts of one prompt follow one another over all processes, and may lie on two.
        start = self.accelerator.process_index * len(anchors)
        anchors, rewards = gather_object(anchors), gather_object(rewards)
        mode = "train" if self.model.training else "eval"
        size = self.num_generations if mode == "train" else self.num_generations_eval
        groups = [i // size for i in range(len(anchors))]

        check_trajectories(rewards, anchors, groups)
        labels = anchor_groups(anchors, groups, self.args.anchor_similarity)
        step = step_advantages(rewards, labels, self.args.gamma, self.args.normalize)
        self._log_groups(mode, labels, step, self.accelerator.gather(episode))

        advantages = torch.zeros(shape, dtype=episode.dtype)
        for i, numbers in enumerate(self._step_of_token):
            of_step = episode[i].item() + self.args.omega * torch.tensor(step[start + i], dtype=torch.float64)
            number = torch.tensor(numbers)
            of_token = torch.where(number >= 0, of_step[number.clamp(min=0)], 0.0)
            advantages[i, : len(numbers)] = of_token.to(episode.dtype)
        return advantages.to(episode.device)

    def _log_groups(self, mode: str, labels: list[list[int]], step: list[list[float]], episode: torch.Tensor) -> None:
        sizes = torch.tensor([label for row in labels for label in row]).bincount()
        magnitudes = [abs(a) for row in step for a in row]
        metrics = self._metrics[mode]
        metrics["gigpo/singleton_groups"].append((sizes == 1).float().mean().item())
        metrics["gigpo/group_size"].append(sizes.float().mean().item())
        metrics["gigpo/step_advantage"].append(sum(magnitudes) / len(magnitudes))
        metrics["gigpo/episode_advantage"].append(episode.abs().mean().item())


def _number_runs(mask: list[int]) -> list[int]:
    """Number the runs of ones, from 0; -1 where there is a 0.

    >>> _number_runs([1, 1, 0, 1, 0, 0, 1])
    [0, 0, -1, 1, -1, -1, 2]
    """
    numbers, run = [], -1
    for before, now in pairwise([0, *mask]):
        run += now > before
        numbers.append(run if now else -1)
    return numbers
