"""`add_weighted_adapter`: W_0 + sum_i w_i (W_i - W_0)."""

import pytest
import torch

from models import build
from peft_onelayer import SingleLayerConfig
from tuner.helpers import DTYPES, base_weights, logits, masters, move, same, wrap


def three(dtype=torch.float32):
    model = wrap(build(dtype=dtype), layer=1)
    model.add_adapter("b", SingleLayerConfig(layer=[1, 3]))
    model.add_adapter("c", SingleLayerConfig(layer=3, target_modules="self_attn"))
    for seed, name in enumerate(("default", "b", "c")):
        move(model, name, seed=seed)
    return model


def detached(model, name):
    return {key: p.detach().clone() for key, p in masters(model, name).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_formula(dtype):
    model = three(dtype)
    start, given = base_weights(model), {"default": 0.5, "b": -1.25, "c": 2.0}
    parts = {name: detached(model, name) for name in given}
    model.add_weighted_adapter(list(given), list(given.values()), "sum")
    combined = masters(model, "sum")
    assert combined.keys() == set().union(*parts.values())
    for key, tensor in combined.items():
        origin = start[key].double()
        changes = [w * (parts[n][key].double() - origin) for n, w in given.items() if key in parts[n]]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, (origin + sum(changes)).float())
    assert same(base_weights(model), start) and all(same(detached(model, n), parts[n]) for n in given)


def test_weight_one_copies_and_weight_zero_is_the_base():
    model = three(torch.bfloat16)
    base = logits(build(dtype=torch.bfloat16))
    model.add_weighted_adapter(["b"], [1.0], "copy")
    assert same(detached(model, "copy"), detached(model, "b"))
    model.add_weighted_adapter(["b", "default"], [0.0, 0.0], "nothing")
    model.set_adapter("nothing")
    assert torch.equal(logits(model), base)


def test_it_is_neither_active_nor_trainable_until_chosen_and_saves_and_loads(tmp_path):
    from peft import PeftModel

    model = three()
    model.add_weighted_adapter(["default", "c"], [1.0, 1.0], "sum")
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for p in masters(model, "sum").values())
    assert all(p.requires_grad for p in masters(model, "default").values())
    assert model.peft_config["sum"].layer_indices == [1, 3]
    model.set_adapter("sum")
    assert all(p.requires_grad for p in masters(model, "sum").values())
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(build(), tmp_path / "sum")
    assert torch.equal(logits(loaded), expected)
    assert masters(loaded).keys() == masters(model, "sum").keys()
    model.delete_adapter("sum")
    assert "sum" not in model.peft_config and not masters(model, "sum")


def test_it_equals_the_sum_of_active_adapters():
    model = three()
    model.base_model.set_adapter(["default", "b", "c"])
    together = logits(model)
    model.add_weighted_adapter(["default", "b", "c"], [1.0, 1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert torch.allclose(logits(model), together, atol=1e-5)  # summed in float64 here, in float32 there


@pytest.mark.parametrize(
    "adapters, weights, name, options, message",
    [
        (["default", "x"], [1, 1], "new", {}, "no adapter named x; the model has default, b, c"),
        ([], [], "new", {}, "one or more adapters"),
        (["b", "b"], [1, 1], "new", {}, "each once"),
        (["b"], [1, 2], "new", {}, "one finite number for each"),
        (["b"], [float("nan")], "new", {}, "one finite number for each"),
        (["b"], [1], "c", {}, "an adapter named 'c' already"),
        (["b"], [1], "new", {"combination_type": "svd"}, 'expected "linear"'),
    ],
)
def test_wrong_calls_are_refused(adapters, weights, name, options, message):
    model = three()
    before = repr(model)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name, **options)
    assert repr(model) == before and set(model.peft_config) == {"default", "b", "c"}


def test_modules_to_save_are_refused():
    model = wrap(build(), layer=1, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["default"], [1.0], "new")
