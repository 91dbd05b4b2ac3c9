"""PEFT's mixed models and hot-swapping, which are not for this method: refused in a line that names it."""

import pytest
import torch
from peft import LoraConfig, get_layer_status, get_model_status, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from models import build
from peft_onelayer import SingleLayerConfig
from tuner.helpers import logits, masters, move, same, wrap


def test_a_mixed_model_is_refused():
    with pytest.raises(ValueError, match=r"SINGLE_LAYER|SingleLayerConfig") as error:
        get_peft_model(build(), SingleLayerConfig(layer=1), mixed=True)
    assert "\n" not in str(error.value)


def test_a_mixed_lora_model_refuses_the_adapter():
    model = get_peft_model(build(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ValueError, match=r"SingleLayerConfig|SINGLE_LAYER") as error:
        model.add_adapter("second", SingleLayerConfig(layer=1))
    assert "\n" not in str(error.value)


def test_hot_swapping_is_refused_and_loading_beside_works(tmp_path):
    other = wrap()
    move(other)
    other.save_pretrained(tmp_path)
    model = wrap()
    before = logits(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but SINGLE_LAYER was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="No adapter layers found on the model"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    model.load_adapter(str(tmp_path), "default-2")
    model.set_adapter("default-2")
    assert torch.equal(logits(model), logits(other))


def test_transformers_refuses_to_hot_swap(tmp_path):
    other = wrap()
    move(other)
    other.save_pretrained(tmp_path)
    model = build()
    model.load_adapter(str(tmp_path), "default")
    before = {name: p.detach().clone() for name, p in masters(model).items()}
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        model.load_adapter(str(tmp_path), "default", hotswap=True)
    assert all(torch.equal(p, before[name]) for name, p in masters(model).items())


def test_status_of_an_adapter_in_a_composite_model():
    model = get_peft_model(build("GptOss", num_local_experts=4, num_experts_per_tok=2), SingleLayerConfig(layer=1))
    status, layers = get_model_status(model), get_layer_status(model)
    assert status.peft_types == {"default": "SINGLE_LAYER"} and status.enabled and not status.merged_adapters
    assert status.trainable_params == sum(p.numel() for p in masters(model).values())
    assert len(layers) == status.num_adapter_layers and all(layer.requires_grad["default"] for layer in layers)


def test_transformers_own_adapter_methods():
    """`PeftAdapterMixin`, on a model without a PeftModel around it."""
    model = build()
    base = logits(model)
    model.add_adapter(SingleLayerConfig(layer=1), "a")
    model.add_adapter(SingleLayerConfig(layer=[1, 3]), "b")
    outputs = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in masters(model, name).values()}
        move(model, name)
        outputs[name] = logits(model)
    model.set_adapter("a")
    assert torch.equal(logits(model), outputs["a"]) and not torch.equal(outputs["a"], outputs["b"])
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), outputs["a"])
    assert same(
        {n.replace(".single_layer_params.", "."): p for n, p in model.get_adapter_state_dict("b").items()},
        {n: p.detach() for n, p in masters(model, "b").items()},
    )
    model.delete_adapter("a")
    assert not masters(model, "a")
    model.set_adapter("b")
    assert torch.equal(logits(model), outputs["b"])
