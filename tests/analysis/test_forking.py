"""The learning signal by entropy: the gradients are those of autograd on the whole batch, the tokens those of TRL."""

import pytest
import torch
from demo_model import load
from tuner.helpers import wrap

from peft_onelayer.analysis.entropy import signal_by_entropy
from peft_onelayer.probe.batch import graded_batch
from peft_onelayer.probe.race import NothingToLearnError
from peft_onelayer.rollouts.sampling import sample_rollouts
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task, load_task


@pytest.fixture(scope="module")
def demo():
    base, tokenizer = load()
    task = load_task("arithmetic")
    return wrap(base, layer=5).eval(), tokenizer, task, task.rows("train", 6, 0)


def by_hand(model, batch, share):
    length = batch.generated.shape[1]
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = torch.log_softmax(logits[:, -length - 1 : -1].float(), -1)
    entropies = -(logps.exp() * logps).sum(-1)
    chosen = logps.gather(-1, batch.input_ids[:, -length:, None]).squeeze(-1)
    active = batch.generated
    high = active & (entropies >= torch.quantile(entropies[active], 1 - share))
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for mask in (high, active & ~high):
        loss = -(batch.advantages[:, None] * chosen * mask).sum() / active.sum()
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        gradients.append(torch.cat([g.flatten().double() for g in found]))
    return high, active, gradients


def test_the_parts_are_those_of_the_whole_gradient(demo):
    model, tokenizer, task, rows = demo
    sampling = Sampling(samples=6, seed=1)
    found = signal_by_entropy(model, tokenizer, task, rows, sampling, micro_batch=5)
    groups = sample_rollouts(model, tokenizer, task, rows, sampling)
    batch = graded_batch(groups, tokenizer.pad_token_id, model.device, whole=True)
    high, active, (a, b) = by_hand(model, batch, 0.2)
    assert found.completions == len(batch)
    assert (found.high.tokens, found.rest.tokens) == (int(high.sum()), int((active & ~high).sum()))
    assert 0.2 * int(active.sum()) - 1 <= found.high.tokens
    assert found.high.gradient_norm == pytest.approx(float(a.norm()), rel=1e-4)
    assert found.rest.gradient_norm == pytest.approx(float(b.norm()), rel=1e-4)
    assert found.gradient_norm == pytest.approx(float((a + b).norm()), rel=1e-4)
    assert found.high.signal == pytest.approx(float(a @ (a + b) / (a + b).norm() ** 2), rel=1e-3)
    assert found.high.signal + found.rest.signal == pytest.approx(1.0, rel=1e-9)
    assert found.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-4)
    assert found.high.entropy > found.threshold > found.rest.entropy
    assert found.first_tokens == pytest.approx(float(high[:, 0].float().mean()))
    assert sum(count for _, count, _ in found.common) == found.high.tokens
    assert all(p.grad is None for p in model.parameters())


def test_where_the_tokens_stand(demo):
    model, tokenizer, task, rows = demo
    found = signal_by_entropy(model, tokenizer, task, rows, Sampling(samples=6, seed=1), share=0.5)
    assert len(found.tenths) == 10 and all(part is None or 0 <= part <= 1 for part in found.tenths)
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_what_has_no_signal_is_refused(demo):
    model, tokenizer, task, rows = demo
    flat = Task("flat", task.rows, lambda completions, **_: [0.0] * len(completions), 4)
    with pytest.raises(NothingToLearnError, match="same reward"):
        signal_by_entropy(model, tokenizer, flat, rows, Sampling(samples=2))
    with pytest.raises(ValueError, match="no part of the tokens"):
        signal_by_entropy(model, tokenizer, task, rows, Sampling(samples=2), share=1.0)
    frozen = load()[0].requires_grad_(False)
    with pytest.raises(ValueError, match="requires gradients"):
        signal_by_entropy(frozen, tokenizer, task, rows, Sampling(samples=2))
