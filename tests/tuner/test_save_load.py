"""The adapter on disk in PEFT's own format: every way to load it gives the same bits; a wrong file is refused."""

import json
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import build
from peft_onelayer import SingleLayerConfig
from tuner.helpers import CASES, base_weights, logits, masters, move, same, train, wrap

WEIGHTS = "adapter_model.safetensors"


def tensors(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in masters(model, adapter).items()}


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_every_way_to_load_gives_the_same_bits(tmp_path, family, dtype):
    build(family, dtype=dtype).save_pretrained(tmp_path / "base")

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)

    model = wrap(base(), layer="mid-2", task_type="CAUSAL_LM")
    move(model)
    train(model)
    tuned, expected, folder = tensors(model), logits(model.eval()), tmp_path / "adapter"
    model.save_pretrained(folder)

    def check(loaded, adapter="default"):
        assert same(tensors(loaded, adapter), tuned)
        assert torch.equal(logits(loaded), expected)
        return loaded

    check(PeftModel.from_pretrained(base(), folder))
    check(PeftModel.from_pretrained(base(), folder, adapter_name="other", low_cpu_mem_usage=True), "other")
    check(AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype))
    check(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    through_transformers = base()
    report = through_transformers.load_adapter(folder, "mine")
    assert not report.missing_keys and not report.unexpected_keys
    check(through_transformers, "mine")
    several = wrap(base(), layer=0)
    several.load_adapter(folder, "second")
    several.set_adapter("second")
    check(several, "second")
    merged = several.merge_and_unload(adapter_names=["second"])
    assert torch.equal(logits(merged), expected)


def test_transformers_saves_what_peft_loads(tmp_path):
    model = build(dtype=torch.bfloat16)
    model.add_adapter(SingleLayerConfig(layer=2))
    tuned, expected = move(model), logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(dtype=torch.bfloat16), tmp_path)
    assert same(tensors(loaded), tuned) and torch.equal(logits(loaded), expected)


def test_the_files(tmp_path):
    folder = tmp_path / "adapter"
    build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.config._commit_hash = "0123abc"  # as the Hub sets it
    model = wrap(base, layer=-1, task_type="CAUSAL_LM")
    model.add_adapter("other", SingleLayerConfig(layer=0))
    tuned = move(model)
    model.save_pretrained(folder, selected_adapters=["default"])
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", WEIGHTS, "README.md"}
    saved = load_file(folder / WEIGHTS)
    plain = {re.sub(r"^base_model\.model\.|single_layer_params\.", "", key): w for key, w in saved.items()}
    assert same(plain, tuned)
    assert all(re.fullmatch(r"base_model\.model\.model\.layers\.3\..*\.single_layer_params\.\w+", key) for key in saved)
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {
        "peft_type": "SINGLE_LAYER",
        "task_type": "CAUSAL_LM",
        "layer": -1,
        "layer_indices": [3],
        "num_layers": 4,
        "base_model_name_or_path": str(tmp_path / "base"),
        "revision": "0123abc",
        "inference_mode": True,
    }
    assert {name: config[name] for name in expected} == expected
    assert PeftConfig.from_pretrained(folder).layer_indices == [3]


def test_selected_adapters(tmp_path):
    model = wrap(layer=1)
    model.add_adapter("second", SingleLayerConfig(layer=[0, 2]))
    tuned = {name: move(model, name, seed=len(name)) for name in ("default", "second")}
    model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert not (tmp_path / "one" / WEIGHTS).exists()
    for folder, name in (("both", "default"), ("both/second", "second"), ("one/second", "second")):
        assert same(tensors(PeftModel.from_pretrained(build(), tmp_path / folder)), tuned[name])


@pytest.mark.parametrize("adapter", ["weight", "bias", "layers", "up_proj", "a-b", "layer"])
@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
def test_any_adapter_name_works(tmp_path, adapter):
    model = get_peft_model(build("Qwen2"), SingleLayerConfig(layer=1), adapter_name=adapter)
    for parameter in model.parameters():
        parameter.data += 0.05 * parameter.requires_grad
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / adapter / WEIGHTS)) == 12
    for name in (adapter, "other"):
        loaded = PeftModel.from_pretrained(build("Qwen2"), tmp_path / adapter, adapter_name=name)
        assert torch.equal(logits(loaded), expected)


def test_training_goes_on_after_loading(tmp_path):
    model = wrap(build(dtype=torch.bfloat16), layer=1)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(dtype=torch.bfloat16), tmp_path, is_trainable=True)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    frozen = base_weights(loaded)
    for m in (model, loaded):  # both with a fresh optimizer
        train(m)
    assert same(tensors(loaded), tensors(model)) and same(base_weights(loaded), frozen)
    assert not PeftModel.from_pretrained(build(), tmp_path).get_nb_trainable_parameters()[0]


def test_trained_heads_and_resized_embeddings_are_saved_too(tmp_path):
    model = wrap(build(), modules_to_save=["lm_head"])
    model.get_base_model().lm_head.modules_to_save["default"].weight.data += 1
    move(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(tmp_path / WEIGHTS))
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


KEY = "base_model.model.model.layers.2.mlp.up_proj.single_layer_params.weight"


def drop(state):
    del state[KEY]


def add(state):
    state[KEY.replace("up_proj", "new_proj")] = torch.ones(2)


def add_elsewhere(state):
    state["base_model.model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32)


def rename(state):
    state[KEY.replace("layers.2", "layers.1")] = state.pop(KEY)


def reshape(state):
    state[KEY] = state[KEY].T.contiguous()


def poison(value):
    def change(state):
        state[KEY][3, 5] = value

    return change


BROKEN = {
    "missing": (drop, rf"lacks 1 tensor\(s\), for example .*{re.escape('layers.2.mlp.up_proj')}"),
    "extra": (add, r"unknown 1 tensor\(s\), for example .*new_proj"),
    "extra_elsewhere": (add_elsewhere, r"unknown 1 tensor\(s\), for example .*layers\.0\.mlp\.up_proj\.weight"),
    "renamed": (rename, r"lacks 1 tensor\(s\)"),
    "empty": (dict.clear, r"lacks 11 tensor\(s\)"),
    "shape": (reshape, r"up_proj.* has shape \(32, 48\) and the model's \(48, 32\)"),
    "nan": (poison(float("nan")), "up_proj.* holds NaN or Inf"),
    "inf": (poison(float("-inf")), "up_proj.* holds NaN or Inf"),
}


@pytest.mark.parametrize("entrance", ["from_pretrained", "low_cpu_mem_usage", "load_adapter"])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_wrong_file_is_refused_before_anything_is_written(tmp_path, fault, entrance):
    wrap().save_pretrained(tmp_path)
    change, match = BROKEN[fault]
    state = load_file(tmp_path / WEIGHTS)
    change(state)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    base = build()
    model = wrap(base, layer=0) if entrance == "load_adapter" else None
    before = base_weights(base)
    with pytest.raises(ValueError, match=match) as error:
        if model is not None:
            model.load_adapter(tmp_path, "second")
        else:
            PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=entrance == "low_cpu_mem_usage")
    assert "\n" not in str(error.value)
    assert same(base_weights(base), before)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    wrap(build("Qwen3")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has unknown 2 tensor\(s\), for example .*k_norm"):
        PeftModel.from_pretrained(build("Llama"), tmp_path)
    with pytest.raises(ValueError, match=r"shape .* made for another base model"):
        PeftModel.from_pretrained(build("Qwen3", intermediate_size=64), tmp_path)
