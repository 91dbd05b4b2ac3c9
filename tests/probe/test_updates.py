"""The race's updates, against plain PyTorch; and passes that start at a block, against whole ones."""

from dataclasses import replace
from itertools import product

import demo_model
import pytest
import torch

from models import FAMILIES, build
from peft_onelayer.probe.batch import Batch, graded_batch
from peft_onelayer.probe.updates import (
    LEAST_KL,
    MOST_KL,
    Candidate,
    batch_starting_at,
    log_probabilities,
    measure_noise,
    most_tokens,
    trainable_parameters,
    trained_candidate,
    update,
)
from peft_onelayer.rollouts.sampling import Rollout


def rollout(reward, prompt=(5, 6), ids=(7, 8)):
    return Rollout("", "", reward, len(ids), True, list(prompt), list(ids), [True] * len(ids))


@pytest.fixture
def batch():
    """Random completions of different lengths for the demo model."""
    draw = torch.Generator().manual_seed(0)
    groups = []
    for g in range(8):
        prompt = torch.randint(4, 14, (3 + g % 3,), generator=draw).tolist()
        ids = [torch.randint(4, 14, (2 + i % 4,), generator=draw).tolist() for i in range(4)]
        groups.append([rollout(float(i % 2), prompt, x) for i, x in enumerate(ids)])
    found = graded_batch(groups, 0, torch.device("cpu"))
    assert found is not None
    return found


def test_the_half_of_greatest_variance_is_kept_and_equal_rewards_are_not():
    groups = [
        [rollout(r) for r in (0, 0, 0, 0, 0, 0, 0, 1)],
        [rollout(r) for r in (1, 1, 1, 1, 1, 1, 1, 1)],
        [rollout(r) for r in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.5, 0.5)],
    ]
    found = graded_batch(groups, 0, torch.device("cpu"))
    assert len(found) == 8
    first, last = found.advantages[:4], found.advantages[4:]
    assert first.sum() == pytest.approx(0, abs=1e-5) and sorted(first.tolist())[-1] == pytest.approx(1.5, abs=1e-3)
    assert last.tolist() == pytest.approx([-1.05, -0.63, 0.63, 1.05], abs=0.01)  # 0, .2, .8, 1
    assert graded_batch(groups[1:2], 0, torch.device("cpu")) is None


def test_padding_is_masked_and_changes_nothing(batch):
    model, _ = demo_model.load()
    together = log_probabilities(model, batch)
    assert batch.tokens == int(batch.attention_mask.sum())
    i = int(batch.generated.sum(1).argmin())
    alone = replace(
        batch.part(slice(i, i + 1)),
        input_ids=batch.input_ids[i : i + 1][:, batch.attention_mask[i].bool()],
        attention_mask=batch.attention_mask[i : i + 1][:, batch.attention_mask[i].bool()],
        generated=batch.generated[i : i + 1][:, batch.generated[i]],
    )
    here = together[i][batch.generated[i]]
    torch.testing.assert_close(log_probabilities(model, alone)[0], here, rtol=0, atol=1e-5)


def test_updates_are_clipped_adamw_steps(batch):
    """Two steps, the first scaled to the KL allowed, equal the same in a plain loop bit for bit."""
    model, _ = demo_model.load()
    old = log_probabilities(model, batch).detach()
    given = replace(batch, old_logps=old)
    candidate = Candidate(5, 1e-3)
    with trained_candidate(model, candidate) as wrapped:
        tokens = update(wrapped, candidate, given, steps=2, size=len(batch), micro_batch=len(batch))
    # the KL is measured twice: it was too large at first
    assert tokens == 2 * batch.tokens + 2 * batch.part(slice(0, 16)).tokens
    assert candidate.learning_rate < 1e-3
    assert tokens <= most_tokens(Candidate(5, 1e-3), given, steps=2, size=len(batch))

    plain, _ = demo_model.load()
    plain.requires_grad_(False)
    block = plain.model.layers[5].requires_grad_(True)
    parameters = list(block.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    start = [p.detach().clone() for p in parameters]
    for step in range(2):
        ratio = torch.exp(log_probabilities(plain, batch) - old)
        a = batch.advantages[:, None]
        loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
        loss = (loss * batch.generated).sum(1) / batch.generated.sum(1)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if step == 0:
            optimizer.step()
            scale = candidate.learning_rate / 1e-3
            with torch.no_grad():
                for p, s in zip(parameters, start, strict=True):
                    p.copy_(s + scale * (p - s))
            for group in optimizer.param_groups:
                group["lr"] = candidate.learning_rate
        else:
            optimizer.step()
        optimizer.zero_grad()
    by_name = dict(zip((n for n, _ in block.named_parameters()), candidate.weights, strict=True))
    assert candidate.updates == 2
    for name, p in block.named_parameters():
        torch.testing.assert_close(by_name[name], p.detach(), rtol=0, atol=2e-7)


def first_updates():
    """By default every rate in float32, and one in bfloat16, of the last block."""
    for layer, rate, dtype in product((0, 11), (1e-7, 5e-6, 3e-3, 0.3), (torch.float32, torch.bfloat16, torch.float16)):
        shown = layer == 11 and (dtype == torch.float32 or (rate, dtype) == (5e-6, torch.bfloat16))
        marks = [] if shown else [pytest.mark.more]
        yield pytest.param(layer, rate, dtype, id=f"{layer}-{rate}-{dtype}", marks=marks)


@pytest.mark.parametrize(("layer", "rate", "dtype"), list(first_updates()))
def test_the_first_update_moves_the_policy_by_neither_too_much_nor_too_little(batch, layer, rate, dtype):
    model, _ = demo_model.load()
    model.to(dtype)
    with torch.no_grad():
        given = replace(batch, old_logps=log_probabilities(model, batch))
    noise = measure_noise(model, given)
    candidate = Candidate(layer, rate, kl_noise=noise)
    few = given.part(slice(0, 16))
    with trained_candidate(model, candidate) as wrapped:
        update(wrapped, candidate, given, steps=1, size=len(batch), micro_batch=len(batch))
        with torch.no_grad():
            change = few.old_logps - log_probabilities(wrapped, few)
    kl = (((torch.exp(-change) - 1 + change) * few.generated).sum(1) / few.generated.sum(1)).mean().item()
    assert candidate.kl == kl - noise
    assert LEAST_KL <= candidate.kl <= MOST_KL
    assert 0 <= noise < LEAST_KL


def test_what_the_same_policy_gives_twice_is_taken_off_as_noise(batch, monkeypatch):
    model, _ = demo_model.load()
    with torch.no_grad():
        given = replace(batch, old_logps=log_probabilities(model, batch))
    noise = torch.Generator().manual_seed(0)

    def noisy(model, part, temperature=1.0):
        exact = log_probabilities(model, part, temperature)
        return exact + 0.05 * torch.randn(exact.shape, generator=noise)

    monkeypatch.setattr("peft_onelayer.probe.updates.log_probabilities", noisy)
    candidate = Candidate(6, 1e-7, kl_noise=measure_noise(model, given))
    few = given.part(slice(0, 16))
    with trained_candidate(model, candidate) as wrapped:
        update(wrapped, candidate, given, steps=1, size=len(batch), micro_batch=len(batch))
        with torch.no_grad():
            change = few.old_logps - log_probabilities(wrapped, few)
    kl = (((torch.exp(-change) - 1 + change) * few.generated).sum(1) / few.generated.sum(1)).mean().item()
    assert candidate.kl_noise == pytest.approx(0.05**2 / 2, rel=0.3)
    assert candidate.kl == pytest.approx(kl, rel=0.3)  # the true one
    assert LEAST_KL <= candidate.kl <= MOST_KL


def test_a_turn_leaves_the_model_as_it_was_and_the_next_goes_on(batch):
    model, _ = demo_model.load()
    before = {name: p.clone() for name, p in model.named_parameters()}
    given = replace(batch, old_logps=log_probabilities(model, batch).detach())
    once, twice = Candidate(3, 1e-3), Candidate(3, 1e-3)
    with trained_candidate(model, once) as wrapped:
        update(wrapped, once, given, steps=2, size=len(batch), micro_batch=len(batch))
    for _ in range(2):
        with trained_candidate(model, twice) as wrapped:
            update(wrapped, twice, given, steps=1, size=len(batch), micro_batch=len(batch))
    assert all(torch.equal(a, b) for a, b in zip(once.weights, twice.weights, strict=True))
    assert {name for name, _ in model.named_parameters()} == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_micro_batches_add_up(batch):
    steps = []
    for micro in (len(batch), 5):
        model, _ = demo_model.load()
        before = [p.detach().clone() for p in model.model.layers[4].parameters()]
        candidate = Candidate(4, 1e-3)
        with trained_candidate(model, candidate) as wrapped:
            update(wrapped, candidate, batch, steps=1, size=len(batch), micro_batch=micro)
        changes = [after - p for after, p in zip(candidate.weights, before, strict=True)]
        steps.append(torch.cat([c.flatten() for c in changes]) / candidate.learning_rate)
    # Adam's first step is the gradient's sign, and of entries near zero the sign may differ
    assert ((steps[0] - steps[1]).abs() < 0.01).float().mean() > 0.98


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_from_a_block_equals_a_whole_one(family):
    """Log-probabilities and gradients bit for bit, from one block on to the next."""
    model = build(family)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 60, (6, 9), generator=draw)
    batch = Batch(ids, torch.ones_like(ids), torch.ones(6, 4, dtype=torch.bool), torch.randn(6, generator=draw))
    started = batch
    for layer in (1, 2, 3):
        whole_passes = 0 if started.start else batch.tokens
        started, tokens = batch_starting_at(model, started, layer, micro_batch=6)
        assert tokens <= most_tokens(Candidate(layer, 1e-3), batch, steps=1, size=6)
        assert tokens == whole_passes + 2 * batch.part(slice(0, 2)).tokens
        assert started.start is not None and started.start.layer == layer
        candidate = Candidate(layer, 1e-3)
        with trained_candidate(model, candidate) as wrapped:
            gradients = []
            for given in (batch, started):
                logps = log_probabilities(wrapped, given)
                gradients.append((logps, torch.autograd.grad(logps.sum(), trainable_parameters(wrapped))))
        (whole, a), (part, b) = gradients
        assert torch.equal(whole, part)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all("forward" not in vars(block) for block in model.modules())
