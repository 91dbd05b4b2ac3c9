"""Training: only the chosen block moves, and its gradients are those of full fine-tuning of that block."""

import copy

import pytest
import torch
from peft import get_peft_model

from models import FAMILIES, block_parameters, build, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner import resolve_layers
from tuner.helpers import CASES, DTYPES, base_weights, masters, same, train, wrap

CHECKPOINTING = [None, False, True]  # off, use_reentrant=False, use_reentrant=True
CHECKPOINTING_IDS = ["plain", "non_reentrant", "reentrant"]


def prepare(model, use_reentrant: bool | None):
    """Turn checkpointing on as trainers do, with the hook on the embeddings."""
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.get_base_model().enable_input_require_grads()
    return model.train()


def backward(model, seed: int = 0) -> torch.Tensor:
    tokens = token_batch(seed=seed)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach()


def full_fine_tuning(base, layer, targets=None):
    """Train the blocks of an unwrapped copy in place: the parameters that train, by name, and the copy."""
    model = copy.deepcopy(base).requires_grad_(False).train()
    trained = {}
    for index in resolve_layers(layer, len(model.model.layers)):
        for name, parameter in block_parameters(model, index).items():
            if targets is None or any(target in name.split(".") for target in targets):
                trained[f"model.layers.{index}.{name}"] = parameter.requires_grad_()
    return trained, model


def assert_gradients_equal(model, reference):
    got = {name: parameter.grad for name, parameter in masters(model).items()}
    assert got.keys() == reference.keys()
    for name, parameter in reference.items():
        assert parameter.grad.abs().sum() > 0, name
        assert got[name].dtype == torch.promote_types(parameter.dtype, torch.float32)
        assert torch.equal(got[name], parameter.grad.to(got[name].dtype)), name


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING, ids=CHECKPOINTING_IDS)
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_gradients_equal_full_fine_tuning_bit_for_bit(family, dtype, use_reentrant):
    base = build(family, dtype=dtype)
    for layer in (0, "middle", -1, "mid-2"):
        reference, reference_model = full_fine_tuning(base, layer)
        model = prepare(wrap(copy.deepcopy(base), layer=layer), use_reentrant)
        assert torch.equal(backward(model), backward(reference_model))
        assert_gradients_equal(model, reference)


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING, ids=CHECKPOINTING_IDS)
@pytest.mark.parametrize("targets", [["self_attn"], ["mlp"], ["q_proj", "v_proj"], ["input_layernorm"]])
def test_gradients_with_target_modules(targets, use_reentrant):
    base = build(dtype=torch.bfloat16)
    reference, reference_model = full_fine_tuning(base, 1, targets)
    model = prepare(wrap(copy.deepcopy(base), layer=1, target_modules=targets), use_reentrant)
    assert torch.equal(backward(model), backward(reference_model))
    assert_gradients_equal(model, reference)


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING, ids=CHECKPOINTING_IDS)
def test_gradients_with_input_dependent_routing_and_fused_experts(use_reentrant):
    base = build("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    reference, reference_model = full_fine_tuning(base, 2)
    model = prepare(wrap(copy.deepcopy(base), layer=2), use_reentrant)
    assert torch.equal(backward(model), backward(reference_model))
    assert any("experts.gate_up_proj" in name for name in reference)
    assert_gradients_equal(model, reference)


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING, ids=CHECKPOINTING_IDS)
@pytest.mark.parametrize("layer", [0, 3, "mid-2"])
def test_a_float32_model_trains_exactly_like_full_fine_tuning(layer, use_reentrant):
    base = build()
    reference, reference_model = full_fine_tuning(base, layer)
    model = prepare(wrap(copy.deepcopy(base), layer=layer), use_reentrant)
    train(model)
    train(reference_model)
    assert same(masters(model), reference)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, -2, "1-2"])
def test_exactly_the_block_requires_grad(family, layer):
    base = build(family)
    names = {f"model.layers.{i}.{n}" for i in resolve_layers(layer, 4) for n in block_parameters(base, i)}
    block = sum(base.get_parameter(name).numel() for name in names)
    whole = sum(parameter.numel() for parameter in base.parameters())
    model = get_peft_model(base, SingleLayerConfig(layer=layer))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert masters(model).keys() == names and len(trainable) == len(names)
    assert {id(p) for p in trainable.values()} == {id(p) for p in masters(model).values()}
    # PEFT counts an adapter on top of the base model, as with LoRA
    assert model.get_nb_trainable_parameters() == (block, whole + block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_changes_the_block_and_nothing_else(family, dtype):
    model = wrap(build(family, dtype=dtype), layer=1)
    frozen, start = base_weights(model), {n: p.detach().clone() for n, p in masters(model).items()}
    prepare(model, False)
    train(model)
    assert same(base_weights(model), frozen)
    assert all(not torch.equal(p, start[name]) for name, p in masters(model).items())


@pytest.mark.parametrize(("master_dtype", "moves"), [("float32", True), ("base", False)])
def test_float32_masters_keep_updates_that_bfloat16_loses(master_dtype, moves):
    model = wrap(build(dtype=torch.bfloat16), layer=1, master_dtype=master_dtype)
    start = {n: p.detach().clone() for n, p in masters(model).items()}
    train(model, learning_rate=1e-4)
    norms = [name for name in start if "norm" in name]  # near 1, where bfloat16 has steps of 1/256 and 1/128
    assert len(norms) == 4
    for name in norms:
        assert ((masters(model)[name] != start[name]) == moves).all(), name
