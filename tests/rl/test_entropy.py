"""The loss on high-entropy tokens divided by their number, against a reference written from the definition."""

import pytest
import torch
from corridor import TOKENIZER, Corridor, reward
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from models import build, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import GiGPOConfig, GiGPOTrainer, TopEntropyMixin

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental feature:UserWarning")
CLIP = 0.2


class TopEntropyTrainer(TopEntropyMixin, GRPOTrainer):
    pass


def make(tmp_path, trainer=TopEntropyTrainer, **options):
    arguments = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "max_steps": 2,
        "disable_tqdm": True,
        "top_k": 0,
        **options,
    }
    model = build(num_layers=2)
    model.lm_head.weight.data *= 20  # entropies far enough apart to be ranked the same from any logits
    made = trainer(
        model,
        lambda completions, **_: [float(sum(map(ord, text)) % 17) for text in completions],
        GRPOConfig(**arguments),
        train_dataset=Dataset.from_dict({"prompt": ["go", "done", "left", "right"]}),
        processing_class=TOKENIZER,
        peft_config=SingleLayerConfig(layer=0, task_type="CAUSAL_LM"),
    )
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps
    made.model.train()
    return made


def make_inputs(model, rows=4, length=20, per_token=False):
    """Completions of different lengths, with tokens of tools in two, and a policy that has moved since it sampled."""
    generator = torch.Generator().manual_seed(1)
    ids = token_batch(rows, 3 + length, seed=3)
    lengths = torch.tensor([length, 13, 7, 1])
    completion_mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[0, 4:9] = tool_mask[1, 2:5] = 0
    noise = lambda scale: scale * torch.randn(rows, length, generator=generator)  # noqa: E731
    with torch.no_grad():
        log_probs = model(ids).logits[:, 2:-1].log_softmax(-1)
    logps = log_probs.gather(-1, ids[:, 3:].unsqueeze(-1)).squeeze(-1) + noise(0.3)
    return {
        "prompt_ids": ids[:, :3],
        "prompt_mask": torch.ones(rows, 3, dtype=torch.long),
        "completion_ids": ids[:, 3:],
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": noise(1.0) if per_token else torch.tensor([1.0, -0.5, 0.7, -1.2]),
        "old_per_token_logps": logps,
        "ref_per_token_logps": logps + noise(0.3),
        "num_items_in_batch": (completion_mask * tool_mask).sum(),
    }


def reference(model, inputs, loss_type, quantile, beta, entropy_coef):
    """The objective, token by token from the logits: mean over selected tokens of the clipped term, and the rest."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    log_probs = model(ids).logits[:, 2:-1].log_softmax(-1)
    terms, kl, entropy, rows = [], [], [], []
    for i in range(len(ids)):
        for t in range(inputs["completion_ids"].shape[1]):
            if inputs["completion_mask"][i, t] * inputs["tool_mask"][i, t]:
                logp = log_probs[i, t, inputs["completion_ids"][i, t]]
                ratio = torch.exp(logp - inputs["old_per_token_logps"][i, t])
                advantage = inputs["advantages"][i] if inputs["advantages"].dim() == 1 else inputs["advantages"][i, t]
                terms.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage))
                away = inputs["ref_per_token_logps"][i, t] - logp
                kl.append((away.exp() - away - 1) * ratio)  # use_bias_correction_kl, TRL's default
                entropy.append(-(log_probs[i, t].exp() * log_probs[i, t]).sum())
                rows.append(i)
    terms, kl, entropy, rows = torch.stack(terms), torch.stack(kl), torch.stack(entropy), torch.tensor(rows)
    top = entropy >= torch.quantile(entropy.detach(), 1 - quantile)
    if loss_type == "grpo":
        per_row = []
        for i in range(len(ids)):
            here = rows == i
            policy = terms[here & top].mean() if (here & top).any() else 0.0
            per_row.append(policy + beta * kl[here].mean())
        loss = sum(per_row) / len(per_row)
    else:
        loss = terms[top].mean() + beta * kl.mean()
    return loss - entropy_coef * entropy[top].mean(), top


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("per_token", [False, True], ids=["sequence", "token"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_against_the_reference(tmp_path, loss_type, per_token):
    trainer = make(tmp_path, loss_type=loss_type, top_entropy_quantile=0.2, beta=0.1, entropy_coef=0.05)
    inputs = make_inputs(trainer.model, per_token=per_token)
    kept = {name: tensor.clone() for name, tensor in inputs.items()}
    loss = trainer._compute_loss(trainer.model, inputs)
    wanted, top = reference(trainer.model, inputs, loss_type, 0.2, 0.1, 0.05)
    assert 5 <= top.sum() <= 8 and len(top) == 33
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    found, expected = gradients(trainer, loss), gradients(trainer, wanted)
    assert len(found) == 11 and all(g.abs().max() > 0 for g in expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # TRL reuses the inputs in the next iteration.
    assert all(torch.equal(inputs[name], tensor) for name, tensor in kept.items())
    assert torch.equal(trainer._compute_loss(trainer.model, inputs), loss)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "cispo", "vespo"])
def test_trls_policy_term_times_active_over_selected(tmp_path, loss_type):
    options = {"loss_type": loss_type, "top_entropy_quantile": 0.2}
    if loss_type == "cispo":
        options["epsilon_high"] = 5.0
    ours, theirs = make(tmp_path, **options), make(tmp_path, GRPOTrainer, **options)
    inputs = make_inputs(ours.model)
    _, top = reference(ours.model, inputs, loss_type, 0.2, 0.0, 0.0)
    factor = len(top) / top.sum()
    loss = theirs._compute_loss(theirs.model, inputs) * factor
    assert loss.abs() > 0.01
    torch.testing.assert_close(ours._compute_loss(ours.model, inputs), loss)
    assert factor > 4


def test_sapo_divides_each_sequence_by_its_own(tmp_path):
    options = {"loss_type": "sapo", "top_entropy_quantile": 0.3}
    ours, theirs = make(tmp_path, **options), make(tmp_path, GRPOTrainer, **options)
    inputs = make_inputs(ours.model)
    _, top = reference(ours.model, inputs, "sapo", 0.3, 0.0, 0.0)
    active = (inputs["completion_mask"] * inputs["tool_mask"]).sum(1).tolist()
    selected = [part.sum().item() for part in top.split(active)]
    assert len({a / s for a, s in zip(active, selected, strict=True) if s}) > 1
    factors = torch.tensor([a / max(s, 1) for a, s in zip(active, selected, strict=True)])
    scaled = {**inputs, "advantages": inputs["advantages"] * factors}
    torch.testing.assert_close(ours._compute_loss(ours.model, inputs), theirs._compute_loss(theirs.model, scaled))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_micro_batches_are_averaged(tmp_path, loss_type):
    """Two micro-batches of a step: the mean of their means, for dapo weighed by their active tokens."""
    options = {"loss_type": loss_type, "top_entropy_quantile": 0.2, "beta": 0.0}
    trainer = make(tmp_path, **options, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    inputs = make_inputs(trainer.model)
    parts = [{k: v if v.dim() == 0 else v[i : i + 2] for k, v in inputs.items()} for i in (0, 2)]
    means = [reference(trainer.model, part, loss_type, 0.2, 0.0, 0.0)[0] for part in parts]
    active = [int((part["completion_mask"] * part["tool_mask"]).sum()) for part in parts]
    weights = [0.5, 0.5] if loss_type == "grpo" else [n / sum(active) for n in active]
    found = sum(trainer._compute_loss(trainer.model, part) for part in parts)
    torch.testing.assert_close(found, weights[0] * means[0] + weights[1] * means[1], rtol=1e-5, atol=1e-6)


def test_the_adaptive_bonus_sees_what_trl_sees(tmp_path):
    options = {"loss_type": "grpo", "top_entropy_quantile": 0.2, "use_adaptive_entropy": True, "entropy_target": 9.0}
    measured = []
    for trainer in (make(tmp_path, **options), make(tmp_path, GRPOTrainer, **options)):
        trainer._compute_loss(trainer.model, make_inputs(trainer.model))
        measured.append((trainer._last_world_entropy, trainer.entropy_coef))
    assert measured[0] == measured[1] and 0 < measured[0][0] < 9


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo"])
def test_all_tokens_are_trls_loss(tmp_path, loss_type):
    options = {"loss_type": loss_type, "top_entropy_quantile": 1.0, "beta": 0.1, "entropy_coef": 0.05}
    ours, theirs = make(tmp_path, **options), make(tmp_path, GRPOTrainer, **options)
    losses = [trainer._compute_loss(trainer.model, make_inputs(trainer.model)) for trainer in (ours, theirs)]
    assert torch.equal(*losses)
    assert all(map(torch.equal, gradients(ours, losses[0]), gradients(theirs, losses[1])))


@pytest.mark.parametrize("loss_type", ["dr_grpo", "luspo"])
def test_losses_that_divide_by_no_tokens_are_refused(tmp_path, loss_type):
    with pytest.raises(ValueError, match=f"loss_type='{loss_type}' divides by no number of tokens.*use one of grpo"):
        make(tmp_path, loss_type=loss_type, top_entropy_quantile=0.2)


def test_nothing_to_select(tmp_path):
    trainer = make(tmp_path, loss_type="grpo", top_entropy_quantile=0.2)
    inputs = make_inputs(trainer.model)
    inputs["completion_mask"].zero_()
    assert trainer._compute_loss(trainer.model, inputs) == 0


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


def test_a_run(tmp_path):
    """All tokens: TRL's run bit for bit. A fifth of them, divided by them or by all: two other runs."""
    runs = {}
    for trainer in (TopEntropyTrainer, GRPOTrainer):
        for quantile in (1.0, 0.2):
            made = make(tmp_path, trainer, loss_type="dapo", top_entropy_quantile=quantile, num_iterations=2)
            made.train()
            runs[trainer, quantile] = weights(made)
            assert made.state.global_step == 2 and all(p.isfinite().all() for p in weights(made))
    assert all(map(torch.equal, runs[TopEntropyTrainer, 1.0], runs[GRPOTrainer, 1.0]))
    assert not all(map(torch.equal, runs[TopEntropyTrainer, 0.2], runs[GRPOTrainer, 0.2]))
    assert not all(map(torch.equal, runs[TopEntropyTrainer, 0.2], runs[TopEntropyTrainer, 1.0]))


def test_with_gigpo(tmp_path):
    trainer = type("Trainer", (TopEntropyMixin, GiGPOTrainer), {})(
        build(num_layers=2, max_position_embeddings=512),
        reward,
        GiGPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", top_entropy_quantile=0.2, beta=0.0
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "go"}], "start": 0}] * 2),
        processing_class=TOKENIZER,
        environment_factory=Corridor,
    )
    trainer.current_gradient_accumulation_steps = 1
    inputs = make_inputs(trainer.model, per_token=True)
    loss = trainer._compute_loss(trainer.model, inputs)
    wanted, _ = reference(trainer.model, inputs, "grpo", 0.2, 0.0, 0.0)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
