"""One-batch diagnostics of each block: cheap, often proposed, and no rankings. The study shows what they are worth.

All come from one batch of the base's completions, split in two halves A and B of different prompts, and the gradients
g of GRPO's objective by one block's parameters:

    norm        log |g|, minus its least-squares quadratic in depth
    snr         cosine of the gradients on A and on B
    fisher      sum g^2 / (f + mean f), f the mean square over minibatches: a natural-gradient gain per KL
    sign_step   mean of (ratio - 1) * advantage on B after one sign step along the gradient on A, over sqrt(KL) on B
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.probe.batch import Batch, graded_batch
from peft_onelayer.probe.updates import Candidate, log_probabilities, trainable_parameters, trained_candidate
from peft_onelayer.rollouts.sampling import sample_rollouts
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task

PROMPTS, MINIBATCHES, STEP = 128, 4, 1e-3
NAMES = ("norm", "snr", "fisher", "sign_step")


def diagnose(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, seed: int
) -> tuple[dict[str, list[float]], int, int]:
    """Each diagnostic's scores, one per block, higher is better; tokens generated, and tokens passed."""
    groups = sample_rollouts(
        model, tokenizer, task, task.rows("train", PROMPTS, seed + 1), Sampling(samples=8, seed=seed + 1)
    )
    half = PROMPTS // 2
    pad = tokenizer.pad_token_id
    parts = [graded_batch(g, pad, model.device) for g in (groups[:half], groups[half:])]
    a, b = (_with_old(model, part) for part in parts if part is not None)
    rows = []
    for layer in range(model.config.num_hidden_layers):
        with trained_candidate(model, Candidate(layer, STEP)) as wrapped:
            rows.append(_of_block(wrapped, a, b))
    scores = {name: [row[i] for row in rows] for i, name in enumerate(NAMES)}
    depth = np.arange(len(rows))
    norms = np.array(scores["norm"])
    scores["norm"] = [float(x) for x in norms - np.polyval(np.polyfit(depth, norms, 2), depth)]
    generated = sum(r.tokens for group in groups for r in group)
    return scores, generated, len(rows) * (a.tokens + 2 * b.tokens) + a.tokens + b.tokens


def _of_block(model, a: Batch, b: Batch) -> tuple[float, float, float, float]:
    parameters = trainable_parameters(model)

    assert a.old_logps is not None and b.old_logps is not None

    def gradient(batch: Batch) -> torch.Tensor:
        assert batch.old_logps is not None
        ratio = torch.exp(log_probabilities(model, batch) - batch.old_logps)
        objective = (_mean(ratio, batch) * batch.advantages).mean()
        found = torch.cat([g.flatten() for g in torch.autograd.grad(objective, parameters)])
        return found.double()

    pieces = torch.stack([gradient(part) for part in a.minibatches(math.ceil(len(a) / MINIBATCHES))])
    of_a, of_b = pieces.mean(0), gradient(b)
    squares = (pieces**2).mean(0)
    fisher = float((of_a**2 / (squares + squares.mean())).sum())
    offset = 0
    with torch.no_grad():
        for parameter in parameters:
            step = of_a[offset : offset + parameter.numel()].sign().reshape(parameter.shape)
            parameter.add_(STEP * step.to(parameter.dtype))
            offset += parameter.numel()
        change = log_probabilities(model, b) - b.old_logps
        gain = float((_mean(torch.exp(change) - 1, b) * b.advantages).mean())
        kl = float(_mean(torch.exp(change) - 1 - change, b).mean())
    snr = float(torch.nn.functional.cosine_similarity(of_a, of_b, dim=0))
    return math.log(float(of_a.norm())), snr, fisher, gain / math.sqrt(max(kl, 1e-12))


def _with_old(model: PreTrainedModel, batch: Batch) -> Batch:
    with torch.no_grad():
        return replace(batch, old_logps=log_probabilities(model, batch))


def _mean(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    return (values * batch.generated).sum(1) / batch.generated.sum(1)
