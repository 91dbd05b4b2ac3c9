"""Merging writes exactly the rounded masters, and unmerging gives back exactly the base."""

import copy
from itertools import product

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from models import build, build_architecture, token_batch
from peft_onelayer import SingleLayerConfig
from tuner.helpers import CASES, DTYPES, base_weights, logits, masters, move, same, tuner_layers, wrap

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged", "ignore:.*Unmerging the model")
PEFT_NAN = "NaNs detected in the merged weights. The adapter {} seems to be broken"


def with_adapters(dtype=torch.bfloat16, layers=(2, 2), **config):
    """A model with the adapters "default", "b", "c", ... moved apart, on the given layers."""
    names = ("default", "b", "c")[: len(layers)]
    model = wrap(build(dtype=dtype), layer=layers[0], **config)
    for name, layer in zip(names[1:], layers[1:], strict=True):
        model.add_adapter(name, SingleLayerConfig(layer=layer, **config))
    for seed, name in enumerate(names):
        move(model, name, seed=seed)
    return model


def summed(model, base: dict[str, torch.Tensor], *adapters: str) -> dict[str, torch.Tensor]:
    """W0 + sum(Wi - W0) in float32, rounded to the base's dtype; the base elsewhere."""
    result = dict(base)
    for name in base:
        tuned = [masters(model, adapter)[name] for adapter in adapters if name in masters(model, adapter)]
        if len(tuned) == 1:
            result[name] = tuned[0].detach().to(base[name].dtype)
        elif tuned:
            origin = base[name].float()
            result[name] = (origin + sum(w.detach() - origin for w in tuned)).to(base[name].dtype)
    return result


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_merge_and_unmerge_bit_for_bit(family, dtype):
    model = wrap(build(family, dtype=dtype), layer=-2)
    base, untouched, tuned = base_weights(model), logits(model), move(model)
    expected = logits(model)
    assert not torch.equal(expected, untouched)
    for safe_merge in (False, True, False):
        model.merge_adapter(safe_merge=safe_merge)
        assert same(base_weights(model), base | {n: w.to(dtype) for n, w in tuned.items()})
        assert torch.equal(logits(model), expected)
        model.unmerge_adapter()
        assert same(base_weights(model), base)
        assert torch.equal(logits(model), expected)
    assert same(masters(model), tuned)


def several():
    """By default two in bfloat16, and one of them in each dtype."""
    for layers, dtype in product([(2, 2), (1, 3), ("1-2", "2-3"), (2, 2, 2)], DTYPES):
        shown = layers == ("1-2", "2-3") or (layers == (2, 2, 2) and dtype == torch.bfloat16)
        yield pytest.param(layers, dtype, id=f"{layers}-{dtype}", marks=[] if shown else [pytest.mark.more])


@pytest.mark.parametrize(("layers", "dtype"), list(several()))
def test_several_adapters(dtype, layers):
    model = with_adapters(dtype, layers)
    names, base = list(model.peft_config), base_weights(model)
    model.base_model.set_adapter(names)
    expected = logits(model)
    model.merge_adapter()
    assert same(base_weights(model), summed(model, base, *names))
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert same(base_weights(model), base)
    model.merge_adapter([names[-1]])  # one that need not be active
    assert same(base_weights(model), summed(model, base, names[-1]))
    model.unmerge_adapter()
    for count in range(1, len(names) + 1):  # one after the other: rounded once, not once per merge
        model.merge_adapter([names[count - 1]])
        assert same(base_weights(model), summed(model, base, *names[:count]))
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert same(base_weights(model), summed(model, base, *names))
    model.unmerge_adapter()
    assert same(base_weights(model), base)


@pytest.mark.parametrize("adapters", [None, ["b"], ["default", "b"]], ids=str)
@pytest.mark.parametrize("layers", [(2, 2), (1, 3)], ids=str)
def test_merge_and_unload(layers, adapters):
    model = with_adapters(layers=layers)
    expected = summed(model, base_weights(model), *(adapters or ["default"]))
    plain = build(dtype=torch.bfloat16)
    plain.load_state_dict(expected, strict=False)  # lm_head is tied or not by the family
    unloaded = model.merge_and_unload(adapter_names=adapters)
    assert unloaded.state_dict().keys() == plain.state_dict().keys() and not tuner_layers(unloaded)
    assert same(dict(unloaded.state_dict()), dict(plain.state_dict()))
    assert torch.equal(logits(unloaded), logits(plain))
    assert not hasattr(unloaded, "peft_config")
    assert wrap(unloaded).peft_config["default"].layer_indices == [2]  # a second round needs no new model


@pytest.mark.parametrize("merged", [None, ["default"], ["default", "b"]], ids=str)
def test_unload_gives_back_the_base(merged):
    base = build(dtype=torch.bfloat16)
    before, expected = copy.deepcopy(base.state_dict()), logits(base)
    model = wrap(base)
    model.add_adapter("b", SingleLayerConfig(layer=1))
    move(model)
    move(model, "b")
    if merged:
        model.merge_adapter(merged)
    unloaded = model.unload()
    assert unloaded is base and not tuner_layers(unloaded)
    assert same(dict(unloaded.state_dict()), dict(before))
    assert torch.equal(logits(unloaded), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_nan_and_leaves_no_layer_merged(method, value):
    model = with_adapters(layers=("1-3", 2))
    base = base_weights(model)
    masters(model)["model.layers.3.mlp.down_proj.weight"].data[0, 0] = value  # in the last layer of three
    with pytest.raises(ValueError, match=PEFT_NAN.format("default")):
        getattr(model, method)(safe_merge=True)
    assert same(base_weights(model), base)
    assert not any(layer.merged for layer in tuner_layers(model)) and len(tuner_layers(model)) == 33
    model.merge_adapter(["b"], safe_merge=True)
    assert same(base_weights(model), summed(model, base, "b"))


def test_safe_merge_refuses_a_sum_that_overflows():
    model = with_adapters(torch.float16)
    base = base_weights(model)
    for adapter in ("default", "b"):
        masters(model, adapter)["model.layers.2.post_attention_layernorm.weight"].data.fill_(6e4)  # of 65504
    model.merge_adapter(["default"], safe_merge=True)
    with pytest.raises(ValueError, match=PEFT_NAN.format("default, b")):
        model.merge_adapter(["b"], safe_merge=True)
    assert {tuple(layer.merged_adapters) for layer in tuner_layers(model)} == {("default",)}
    assert same(base_weights(model), summed(model, base, "default"))


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_an_unknown_adapter_is_refused(method):
    model = with_adapters()
    base = base_weights(model)
    with pytest.raises(ValueError, match="no adapter named other; the model has default, b"):
        getattr(model, method)(adapter_names=["b", "other"])
    with pytest.raises(TypeError, match="list of strings"):
        getattr(model, method)(adapter_names="b")
    assert same(base_weights(model), base) and tuner_layers(model)


def test_a_merged_adapter_cannot_be_deleted():
    model = with_adapters()
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default", "b"]
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["b"]


def test_disabling_while_merged_gives_the_base():
    model = wrap(build(dtype=torch.bfloat16))
    untouched, _ = logits(model), move(model)
    expected, base = logits(model), build(dtype=torch.bfloat16).state_dict()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)
    assert torch.equal(logits(model), expected)
    assert same({n: w for n, w in base_weights(model).items() if n in base}, dict(base))


@pytest.mark.parametrize(
    ("family", "block"),
    [
        ("mamba2", 1),
        *(pytest.param(*c, marks=pytest.mark.more) for c in (("qwen3_5_text", 0), ("jamba", 0), ("lfm2", 0))),
    ],
)
def test_disabling_while_merged_gives_the_base_where_a_weight_is_read_and_not_called(family, block):
    """In generation, whose later steps take `conv1d.weight` from the module."""
    base, options = build_architecture(family).eval(), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = torch.stack(base.generate(token_batch(1, 6), **options).logits)
    model = wrap(base, layer=block).eval()
    move(model, scale=0.5)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(torch.stack(model.generate(input_ids=token_batch(1, 6), **options).logits), expected)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_what_is_merged_in_inference_mode_can_be_trained(method):
    model = wrap(build())
    move(model)
    with torch.inference_mode():
        merged = getattr(model, method)() or model.get_base_model()
    assert not any(parameter.is_inference() for parameter in merged.parameters())
    if method == "merge_and_unload":
        merged.requires_grad_(True)(input_ids=token_batch())[0].sum().backward()


def test_an_unloaded_model_loads_adapters_by_transformers_own_means(tmp_path):
    get_peft_model(build(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(tmp_path)
    expected = PeftModel.from_pretrained(build(), tmp_path)
    plain = wrap(build()).merge_and_unload()
    plain.load_adapter(str(tmp_path), adapter_name="x")
    assert torch.equal(logits(plain), logits(expected))


def test_an_adapter_added_while_another_is_merged_starts_from_the_base():
    model = wrap(build(dtype=torch.bfloat16))
    base = base_weights(model)
    move(model)
    model.merge_adapter()
    model.add_adapter("b", SingleLayerConfig(layer=2))
    assert same({n: p.detach() for n, p in masters(model, "b").items()}, {n: base[n].float() for n in masters(model)})
    model.unmerge_adapter()
    assert same(base_weights(model), base)


def test_switching_adapters_unmerges_with_pefts_warning():
    model = with_adapters()
    base = base_weights(model)
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("b")
    assert same(base_weights(model), base) and torch.equal(logits(model), expected)


def test_weights_read_directly_are_those_in_effect():
    """Some model code reads `module.weight` instead of calling the module."""
    model = wrap(build(dtype=torch.bfloat16))
    name = "model.layers.2.mlp.up_proj"
    projection = model.get_base_model().get_submodule(name)
    base, tuned = projection.weight.detach().clone(), move(model)[f"{name}.weight"].bfloat16()
    assert torch.equal(projection.weight, tuned) and projection.bias is None
    model.merge_adapter()
    assert torch.equal(projection.weight, tuned)
    with model.disable_adapter():
        model(token_batch())
        assert torch.equal(projection.weight, base)
    assert torch.equal(projection.weight, tuned)
    assert (projection.in_features, projection.out_features) == (32, 48)
