"""Merging leaves no trace: after a thousand cycles, and whatever is thrown while, or before, the model is merged."""

import copy

import pytest
import torch

from models import build, build_architecture, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner import merging
from tuner.helpers import base_weights, logits, masters, move, same, tuner_layers, wrap

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged")


def two_adapters(family: str = "qwen3", layers=(2, 2), dtype: torch.dtype = torch.bfloat16):
    """A model with the adapters "default" and "b", moved apart."""
    model = wrap(build_architecture(family, dtype=dtype), layer=layers[0])
    model.add_adapter("b", SingleLayerConfig(layer=layers[1]))
    for seed, name in enumerate(("default", "b")):
        move(model, name, seed=seed)
    return model


def storages(model) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        pytest.param("qwen3", (2, 2), marks=pytest.mark.more),
        pytest.param(
            "gpt_oss", (1, [0, 3]), marks=pytest.mark.more
        ),  # fused experts, and attention with parameters of its own beside its children
        *(pytest.param(name, (1, [0, 3]), marks=pytest.mark.slow) for name in ("qwen3", "gemma3_text", "qwen3_moe")),
        *(pytest.param(name, (2, 2), marks=pytest.mark.slow) for name in ("gpt_oss", "qwen3_moe", "gpt2")),
    ],
    ids=str,
)
def test_a_thousand_cycles(family, layers):
    model = two_adapters(family, layers)
    base, expected, where = base_weights(model), logits(model), storages(model)
    for cycle in range(1000):
        names = [["default"], ["b"], ["default", "b"]][cycle % 3]
        model.merge_adapter(names)
        if cycle < 3:
            assert not same(base_weights(model), base)
        if len(names) == 1 and cycle > 990:
            tuned = {n: p.detach().bfloat16() for n, p in masters(model, names[0]).items()}
            assert same(base_weights(model), base | tuned)
        model.unmerge_adapter()
    assert same(base_weights(model), base)
    assert torch.equal(logits(model), expected)
    assert storages(model) == where
    assert not any(layer.merged or layer._unmerged for layer in tuner_layers(model))


class Interruption(BaseException):
    """Neither an Exception nor expected anywhere, like KeyboardInterrupt."""


def interrupt(monkeypatch, after: int) -> None:
    """Make the write of one parameter fail, the one after `after` others."""
    put, count = merging._set_data, iter(range(10**6))

    def failing(parameter, value):
        if next(count) == after:
            raise Interruption
        put(parameter, value)

    monkeypatch.setattr(merging, "_set_data", failing)


@pytest.mark.parametrize("error", [Interruption, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["user", "hook", "disabled"])
def test_an_exception_while_merged(place, error):
    model = two_adapters()
    base, expected = base_weights(model), logits(model)

    def hook(*_):
        raise error

    model.merge_adapter()
    with pytest.raises(error):
        if place == "user":
            raise error
        handle = model.get_submodule("base_model.model.model.layers.3").register_forward_hook(hook)
        if place == "hook":
            logits(model)
        else:  # the forward pass has unmerged block 2 before it gets to the hook
            with model.disable_adapter():
                logits(model)
    if place != "user":
        handle.remove()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert same(base_weights(model), base)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("merged", [[], ["b"]], ids=["nothing_merged", "b_merged"])
@pytest.mark.parametrize("after", [0, 1, 10, 11, 21])
def test_an_interrupted_merge_is_undone(monkeypatch, merged, after):
    """On every layer, down to what was merged before."""
    model = two_adapters(layers=([1, 2], 2))
    unmerged = base_weights(model)
    if merged:
        model.merge_adapter(merged)
    base, expected = base_weights(model), logits(model)
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        interrupt(patch, after)
        model.merge_adapter(["default"])
    assert same(base_weights(model), base)
    assert torch.equal(logits(model), expected)
    assert {tuple(layer.merged_adapters) for layer in tuner_layers(model)} <= {(), tuple(merged)}
    model.unmerge_adapter()
    assert same(base_weights(model), unmerged)


@pytest.mark.parametrize("after", [0, 1, 10, 11, 21])
def test_an_interrupted_unmerge_can_be_repeated(monkeypatch, after):
    model = two_adapters(layers=([1, 2], 2))
    base, expected = base_weights(model), logits(model)
    model.merge_adapter()
    with monkeypatch.context() as patch, pytest.raises(Interruption):
        interrupt(patch, after)
        model.unmerge_adapter()
    assert not same(base_weights(model), base)
    model.unmerge_adapter()
    assert same(base_weights(model), base)
    assert torch.equal(logits(model), expected)


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens = token_batch()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in masters(model).items()}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
def test_a_model_left_merged_trains_all_the_same(checkpointing):
    model = wrap(build(dtype=torch.bfloat16)).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    base, _ = base_weights(model), move(model)
    expected = gradients(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged while it trains"):
        assert same(gradients(model), expected)
    assert same(base_weights(model), base)
    assert all(gradient.any() for gradient in expected.values())


@pytest.mark.parametrize("training", [False, True])
def test_inference_leaves_a_merged_model_merged(training):
    model = wrap(build()).train(training)
    move(model)
    model.merge_adapter()
    base = base_weights(model)
    logits(model)
    if not training:
        model(token_batch())  # with gradients on, as an evaluation without no_grad has them
    assert same(base_weights(model), base) and all(layer.merged for layer in tuner_layers(model))


def test_what_was_handed_out_while_merged_stays_merged():
    """vLLM's `pack_tensors` reads the tensors of TRL's generator after the generator has unmerged the model."""
    model = wrap(build())
    tuned = move(model)
    model.merge_adapter()
    handed_out = {
        n: p.data for n, p in model.named_parameters() if n.endswith("layers.2.mlp.up_proj.base_layer.weight")
    }
    model.unmerge_adapter()
    assert torch.equal(*handed_out.values(), tuned["model.layers.2.mlp.up_proj.weight"])


def test_masters_and_the_merged_base_share_no_memory():
    """In float32 rounding to the base's dtype copies nothing by itself."""
    model = wrap(build())
    tuned = move(model)
    model.merge_adapter()
    move(model, seed=2)
    assert same({n: base_weights(model)[n] for n in tuned}, tuned)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()  # again: brought up to date
    assert same({n: base_weights(model)[n] for n in tuned}, {n: p.detach() for n, p in masters(model).items()})


def test_a_copy_of_a_merged_model_unmerges_by_itself():
    model = two_adapters()
    base = base_weights(model)
    model.merge_adapter()
    merged = base_weights(model)
    other = copy.deepcopy(model)
    other.unmerge_adapter()
    assert same(base_weights(other), base) and same(base_weights(model), merged)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_model_converted_while_merged_unmerges_in_the_new_dtype(dtype):
    model = two_adapters(dtype=torch.float32)
    base = base_weights(model)
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    assert same(base_weights(model), {name: weight.to(dtype) for name, weight in base.items()})
