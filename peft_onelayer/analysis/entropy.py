"""How much of the learning signal comes from the tokens of high entropy, and where these stand in the text.

arXiv 2506.01939 trains on the 20 % of the tokens at which the model is least sure, the forking tokens. Here the
gradient of the policy loss is taken at one state of a model, once from these tokens and once from the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.probe.batch import Batch, graded_batch
from peft_onelayer.probe.race import NothingToLearnError
from peft_onelayer.rollouts.sampling import sample_rollouts
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task

TENTHS, LISTED = 10, 20


@dataclass(frozen=True)
class TokenPart:
    """The tokens of high entropy, or the rest.

    Attributes:
        tokens: their number.
        entropy: their mean entropy in nats.
        gradient_norm: of the part's gradient.
        signal: inner product of the part's gradient and the whole one over the squared norm of the whole one; the two
            parts add up to 1.
    """

    tokens: int
    entropy: float
    gradient_norm: float
    signal: float


@dataclass(frozen=True)
class EntropySignal:
    """The learning signal by token entropy; `to_json` is what `onelayer entropy --json` prints.

    Attributes:
        share: of the tokens, those of highest entropy.
        threshold: entropy in nats from which on a token counts among them.
        high: these tokens.
        rest: the others.
        gradient_norm: of the whole gradient.
        cosine: between the gradients of the two parts; None where one is 0.
        tenths: of each tenth of a completion the share of its tokens that are of high entropy; None where it has none.
        first_tokens: the share of completions whose first token is of high entropy.
        common: the tokens that are of high entropy most often: text, how often, and of how many occurrences.
        completions: that had an advantage other than 0 in their group.
        parameters: that the gradients are of.
    """

    share: float
    threshold: float
    high: TokenPart
    rest: TokenPart
    gradient_norm: float
    cosine: float | None
    tenths: list[float | None]
    first_tokens: float
    common: list[tuple[str, int, int]]
    completions: int
    parameters: int

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {"format": "onelayer-entropy-1", **asdict(self)}


def signal_by_entropy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[dict[str, Any]],
    sampling: Sampling,
    *,
    share: float = 0.2,
    micro_batch: int = 8,
    on_progress: Callable[[int], None] = lambda done: None,
) -> EntropySignal:
    """Sample completions and measure the gradient of GRPO's policy loss from the tokens of high entropy and the rest.

    The loss is that of a first update, -advantage x log-probability, summed over the part's tokens and divided by all
    tokens; advantages are normalised in each group of completions. Entropies are of the distribution at the sampling
    temperature. The model is left as it was, without gradients.

    Args:
        model: whose parameters that require gradients are measured: wrapped for a block, or whole.
        tokenizer: of the model.
        task: grades the completions.
        rows: of the task.
        sampling: how to sample, two or more samples of each row.
        share: of the tokens, those of highest entropy over all completions.
        micro_batch: completions of a pass.
        on_progress: as `sample_rollouts`.

    Returns:
        The two parts and where the first one's tokens stand.

    Raises:
        ValueError: a share that is none, a model without trainable parameters, or as `sample_rollouts`;
            `NothingToLearnError` where all rewards are equal within every group.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} is no part of the tokens; give a number between 0 and 1.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires gradients; wrap it for a block, or load it to be trained.")
    groups = sample_rollouts(model, tokenizer, task, rows, sampling, on_progress=on_progress)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = graded_batch(groups, int(pad), model.device, whole=True)
    if batch is None:
        rollouts = [rollout for group in groups for rollout in group]
        raise NothingToLearnError("all completions of each prompt got the same reward: there is no signal", rollouts)
    parts = batch.minibatches(micro_batch)
    with torch.no_grad():
        entropies = torch.cat([_measure(model, part, sampling.temperature)[1] for part in parts])
    active = batch.generated
    threshold = torch.quantile(entropies[active].float(), 1 - share)
    high = active & (entropies >= threshold)
    gradients = [torch.zeros_like(p, dtype=torch.float64) for _ in range(2) for p in parameters]
    done = 0
    for part in parts:
        logps, _ = _measure(model, part, sampling.temperature)
        chosen = high[done : done + len(part)]
        done += len(part)
        weighted = -part.advantages[:, None] * logps / active.sum()
        for k, mask in enumerate((chosen, part.generated & ~chosen)):
            found = torch.autograd.grad((weighted * mask).sum(), parameters, retain_graph=k == 0, allow_unused=True)
            own = gradients[k * len(parameters) : (k + 1) * len(parameters)]
            for total, gradient in zip(own, found, strict=True):
                if gradient is not None:
                    total += gradient
    first, second = gradients[: len(parameters)], gradients[len(parameters) :]
    whole = [a + b for a, b in zip(first, second, strict=True)]
    squared = _dot(whole, whole)
    norms = _dot(first, first) ** 0.5, _dot(second, second) ** 0.5
    rest = active & ~high

    def part_of(mask: torch.Tensor, gradient: list[torch.Tensor], norm: float) -> TokenPart:
        signal = _dot(gradient, whole) / squared if squared else 0.0
        mean = float(entropies[mask].double().mean()) if mask.any() else 0.0
        return TokenPart(int(mask.sum()), mean, norm, signal)

    return EntropySignal(
        share=share,
        threshold=float(threshold),
        high=part_of(high, first, norms[0]),
        rest=part_of(rest, second, norms[1]),
        gradient_norm=squared**0.5,
        cosine=_dot(first, second) / (norms[0] * norms[1]) if all(norms) else None,
        tenths=_tenths(active, high),
        first_tokens=float(high[:, 0].double().mean()),
        common=_common(tokenizer, batch, high),
        completions=len(batch),
        parameters=sum(p.numel() for p in parameters),
    )


def _measure(model: Any, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the tokens behind the prompts, (B, T) float32 both."""
    length = batch.generated.shape[1]
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=length + 1, use_cache=False
    ).logits[:, :-1]
    logps = torch.log_softmax(logits.float() / temperature, -1)
    entropies = -(logps.detach().exp() * logps.detach()).sum(-1)
    return logps.gather(-1, batch.input_ids[:, -length:, None]).squeeze(-1), entropies


def _dot(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def _tenths(active: torch.Tensor, high: torch.Tensor) -> list[float | None]:
    """Of each tenth of a completion the share of its tokens that are of high entropy."""
    place = active.cumsum(1) - 1
    tenth = (place * TENTHS // active.sum(1, keepdim=True).clamp(min=1)).clamp(max=TENTHS - 1)
    counts = [(active & (tenth == k), high & (tenth == k)) for k in range(TENTHS)]
    return [float(h.sum() / a.sum()) if a.any() else None for a, h in counts]


def _common(tokenizer: PreTrainedTokenizerBase, batch: Batch, high: torch.Tensor) -> list[tuple[str, int, int]]:
    ids = batch.input_ids[:, -high.shape[1] :]
    often, every = Counter(ids[high].tolist()), Counter(ids[batch.generated].tolist())
    return [(tokenizer.decode([token]), count, every[token]) for token, count in often.most_common(LISTED)]
