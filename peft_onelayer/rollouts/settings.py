"""How completions are sampled: one set of settings for training data, rankings, evaluations and sweeps."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

HOW_MANY = ("samples", "greedy", "seed", "batch_size")  # fields that say how much is sampled, not from what
# Fields of GenerationConfig that play no part in greedy decoding.
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
ONE_COMPLETION = ("num_return_sequences", "return_dict_in_generate")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are sampled. The defaults draw from the model's full distribution.

    The fields behind `max_completion_tokens` have the names that they have in TRL's configurations, and mean the same.
    None for one of `top_p`, `top_k`, `min_p`, `repetition_penalty` and `cache_implementation` is what the model's own
    generation_config.json says.

    Attributes:
        samples: completions of each row.
        greedy: decode greedily, once per row: `samples`, `temperature`, `top_p`, `top_k` and `min_p` play no part then.
        seed: of sampling; the samples also depend on `batch_size`.
        batch_size: completions generated at a time.
        max_completion_tokens: where a completion is cut that did not end by itself (None: the task's own); with an
            environment it bounds all turns together, the environment's tokens included, as TRL's
            `max_completion_length`.
        temperature: above 0.
        top_p: sample among the likeliest tokens that together have this probability.
        top_k: sample among so many tokens; 0 for all.
        min_p: sample among tokens that are at least this share as likely as the likeliest.
        repetition_penalty: above 1 makes tokens less likely that were there before.
        cache_implementation: of `generate`.
        generation_kwargs: other fields of transformers' GenerationConfig, or the same, which then win.
        chat_template_kwargs: what chat templates are given beside the messages, such as {"enable_thinking": false}.
        max_prompt_length: tokens of a prompt that are kept, the last ones; None for all.
        max_tool_calling_iterations: turns in which tools are called; None for no limit.
        prompts_as_text: write a chat prompt as text before it is tokenized, and add no special tokens to any, as
            A2POTrainer and OnlineDPOTrainer do; of `max_prompt_length` the first tokens are kept then.

    Raises:
        ValueError: in one line, a value that cannot be.
    """

    samples: int = 4
    greedy: bool = False
    seed: int = 0
    batch_size: int = 1024
    max_completion_tokens: int | None = None
    temperature: float = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    min_p: float | None = None
    repetition_penalty: float | None = 1.0
    cache_implementation: str | None = None
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_prompt_length: int | None = None
    max_tool_calling_iterations: int | None = None
    prompts_as_text: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; greedy decoding is a setting of its own"
            )
        for name in ("batch_size", "max_completion_tokens", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_generation(self.generation_kwargs)
        check_template_arguments(self.chat_template_kwargs)

    @property
    def shape(self) -> dict[str, Any]:
        """The fields that shape a completion, all but `HOW_MANY`, as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in HOW_MANY}

    @property
    def changed(self) -> dict[str, Any]:
        """Those of `shape` that are not the defaults."""
        default = Sampling().shape
        return {name: value for name, value in self.shape.items() if value != default[name]}

    def generation(self) -> dict[str, Any]:
        """The fields of GenerationConfig that these settings decide, but for the length of a completion."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")
        decided = {"do_sample": True} | {name: getattr(self, name) for name in names} | self.generation_kwargs
        if self.greedy:
            decided = {k: v for k, v in decided.items() if k not in OF_SAMPLING} | {"do_sample": False}
        return {name: value for name, value in decided.items() if value is not None}


def check_generation(names: Iterable[str]) -> None:
    """Raise ValueError for a name in `generation_kwargs` that has no effect or that makes several completions."""
    from transformers import GenerationConfig

    known = set(GenerationConfig().to_dict()) | set(vars(GenerationConfig()))
    for name in names:
        if name in ONE_COMPLETION:
            raise ValueError(f"generation_kwargs may not set {name}: every completion is one sequence of tokens")
        if name not in known or name.startswith("_"):
            near = difflib.get_close_matches(name, sorted(known))
            meant = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"generation_kwargs sets {name!r}, which GenerationConfig does not have{meant}")


def check_template_arguments(names: Iterable[str]) -> None:
    """Raise ValueError for a name in `chat_template_kwargs` that the caller of the template sets itself."""
    from transformers import PreTrainedTokenizerBase

    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    if taken := sorted((arguments.keys() - {"self", "documents", "kwargs"}) & set(names)):
        raise ValueError(f"chat_template_kwargs may not set {taken[0]}: it is for what the template itself reads")
