"""The configuration: registration with PEFT, its file, and which parts of a block it selects."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from models import build, build_architecture
from peft_onelayer import SingleLayerConfig, SingleLayerModel
from peft_onelayer.tuner import SingleLayerPeftType
from tuner.helpers import masters, wrap


@pytest.mark.parametrize("key", ["SINGLE_LAYER", SingleLayerPeftType.SINGLE_LAYER])
def test_the_method_is_in_pefts_mappings(key):
    assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is SingleLayerConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[key] is SingleLayerModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "single_layer_"


def test_pefts_own_enum_is_untouched():
    assert "SINGLE_LAYER" not in peft.PeftType.__members__
    assert peft.PeftType.__module__ == "peft.utils.peft_types"
    assert get_peft_config({"peft_type": "LORA"}).peft_type is peft.PeftType.LORA


def test_the_type_behaves_like_its_name():
    kind = SingleLayerPeftType.SINGLE_LAYER
    assert kind == "SINGLE_LAYER" and hash(kind) == hash("SINGLE_LAYER")
    assert kind.value == kind.name == "SINGLE_LAYER"
    assert json.dumps(kind) == '"SINGLE_LAYER"'
    config = get_peft_config({"peft_type": "SINGLE_LAYER", "layer": 3})
    assert type(config) is SingleLayerConfig and config.peft_type is kind


FULL = {
    "layer": "mid-2",
    "target_modules": ["q_proj", "mlp"],
    "layers_pattern": "layers",
    "init_weights": False,
    "master_dtype": "base",
    "modules_to_save": ["lm_head"],
    "layer_indices": [1, 2],
    "num_layers": 4,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/name",
    "revision": "abc",
}


@pytest.mark.parametrize("fields", [{"layer": 3}, {"layer": [1, -1]}, {"layer": "8-13"}, FULL])
@pytest.mark.parametrize("loader", [SingleLayerConfig, PeftConfig])
def test_round_trip_through_a_file(tmp_path, fields, loader):
    config = SingleLayerConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(str(tmp_path))
    assert type(loaded) is SingleLayerConfig
    assert loaded == config and loaded.peft_type is SingleLayerPeftType.SINGLE_LAYER
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SINGLE_LAYER"
    assert {name: saved[name] for name in fields} == fields
    assert "allow_other_base" not in saved and not any(name.startswith("_") for name in saved)


@pytest.mark.parametrize(
    ("given", "kept"), [(np.int64(2), 2), ((1, 2), [1, 2]), (range(1, 3), [1, 2]), ([np.int64(1)], [1]), (" 2", " 2")]
)
def test_every_accepted_layer_can_be_saved(tmp_path, given, kept):
    model = wrap(layer=given)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layer"] == kept


@pytest.mark.parametrize(("layer", "match"), [(None, "needs the block"), ("x", "'x' is not understood"), ([], "empty")])
def test_a_wrong_layer_is_refused_at_once(layer, match):
    with pytest.raises(ValueError, match=match):
        SingleLayerConfig(layer=layer)


def test_layer_is_required():
    with pytest.raises(ValueError, match="layer=14"):
        SingleLayerConfig()


@pytest.mark.parametrize("dtype", ["bfloat16", "fp32", None, torch.float32])
def test_an_unknown_master_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=r'master_dtype=.* is not known; expected "float32" or "base"'):
        SingleLayerConfig(layer=1, master_dtype=dtype)


@pytest.mark.parametrize(
    ("layer", "match"), [(9, "0 to 3"), ("2-9", "0 to 3"), ("mid-9", "9 of 4"), ([1, -3], "names a block twice")]
)
def test_a_layer_the_model_lacks_is_refused_and_nothing_is_changed(layer, match):
    model = build()
    before = repr(model)
    with pytest.raises(ValueError, match=match):
        wrap(model, layer=layer)
    assert repr(model) == before and not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_config_object_serves_models_of_different_depth(tmp_path):
    config = SingleLayerConfig(layer="middle", target_modules="all-linear")
    before = copy.deepcopy(config)
    shallow, deep = get_peft_model(build(num_layers=4), config), get_peft_model(build(num_layers=7), config)
    for model, num_layers, index in ((shallow, 4, 2), (deep, 7, 3)):
        own = model.peft_config["default"]
        assert own is not config and (own.layer_indices, own.num_layers) == ([index], num_layers)
        assert {name.split(".")[2] for name in masters(model)} == {str(index)}
        model.save_pretrained(tmp_path / str(num_layers))
        assert PeftConfig.from_pretrained(tmp_path / str(num_layers)).layer_indices == [index]
    assert config == before


def test_a_saved_config_binds_to_its_depth_and_blocks(tmp_path):
    model = wrap(layer="middle")
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    for attempt in (
        lambda: PeftModel.from_pretrained(build(num_layers=5), tmp_path),
        lambda: get_peft_model(build(num_layers=5), config),
        lambda: get_peft_model(build(num_layers=5), model.peft_config["default"]),
    ):
        with pytest.raises(ValueError, match="made for a model of 4 blocks and this one has 5"):
            attempt()
    assert get_peft_model(build(num_layers=4), config).peft_config["default"].layer_indices == [2]


@pytest.mark.parametrize("layer", [3, [0, 1], "middle", "top-1@ranking.json", "all"])
def test_a_resolved_config_that_is_given_another_layer_is_refused(tmp_path, layer):
    wrap(layer=1).save_pretrained(tmp_path)
    config = SingleLayerConfig.from_pretrained(tmp_path)
    config.layer = layer
    with pytest.raises(ValueError, match=r"and layer_indices=\[1\], to which its layer was resolved before") as error:
        get_peft_model(build(), config)
    assert "\n" not in str(error.value)
    if layer == 3:
        config.layer_indices = None
        assert {name.split(".")[2] for name in masters(get_peft_model(build(), config))} == {"3"}


@pytest.mark.parametrize("layer", [1, -3, "0-1,3", "middle", "full_attention"])
def test_a_resolved_config_wraps_the_same_blocks_again(layer):
    config = wrap(build_architecture("qwen3_next"), layer=layer).peft_config["default"]
    again = get_peft_model(build_architecture("qwen3_next"), config).peft_config["default"]
    assert (again.layer, again.layer_indices) == (config.layer, config.layer_indices)


def through_transformers(model, config):
    model.add_adapter(config, "default")
    return model


def beside_another(model, config):
    model = wrap(model, layer=0)
    model.add_adapter("b", config)
    return model


def named(model) -> str:
    """The name of the last adapter."""
    return list(model.peft_config)[-1]


@pytest.mark.parametrize("wrapping", [get_peft_model, through_transformers, beside_another])
def test_wrapping_changes_nothing_in_the_callers_config(tmp_path, wrapping):
    build().save_pretrained(tmp_path)
    config = SingleLayerConfig(layer=-1, target_modules="all-linear", modules_to_save=["lm_head"])
    before = copy.deepcopy(config)
    models = []
    for commit in ("abc", "def"):
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        base.config._commit_hash = commit  # as the Hub sets it
        models.append(wrapping(base, config))
        config.base_model_name_or_path = None  # which PEFT and transformers write to it
    assert config == before
    owns = [model.peft_config[named(model)] for model in models]
    assert [own.revision for own in owns] == ["abc", "def"]
    assert [own.layer_indices for own in owns] == [[3], [3]] and len(owns[0].target_modules) == 7
    owns[0].modules_to_save.append("other")
    assert config == before and owns[1].modules_to_save == ["lm_head"]


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_config_given_to_from_pretrained_takes_the_place_of_the_files(tmp_path, is_trainable):
    wrap(layer=-1).save_pretrained(tmp_path)
    config = SingleLayerConfig(layer=3, master_dtype="base")
    own = PeftModel.from_pretrained(build(), tmp_path, is_trainable=is_trainable, config=config).peft_config["default"]
    assert (own.layer, own.layer_indices, own.master_dtype, own.inference_mode) == (3, [3], "base", not is_trainable)
    assert config.layer_indices is None


def test_a_models_own_config_makes_a_second_adapter_like_the_first():
    """As TRL makes its reference adapter."""
    model = wrap(layer="mid-2", target_modules="mlp", modules_to_save=["lm_head"])
    model.add_adapter("ref", model.peft_config["default"])
    first, second = model.peft_config["default"], model.peft_config["ref"]
    assert first == second and first is not second and first.modules_to_save is not second.modules_to_save
    assert masters(model, "ref").keys() == masters(model).keys()


@pytest.mark.parametrize(
    ("task_type", "model_class", "heads"),
    [
        ("SEQ_CLS", "Qwen3ForSequenceClassification", ["classifier", "score"]),
        ("TOKEN_CLS", "Qwen3ForTokenClassification", ["classifier", "score"]),
        ("QUESTION_ANS", "Qwen3ForQuestionAnswering", ["qa_outputs"]),
        ("CAUSAL_LM", "Qwen3ForCausalLM", []),
    ],
)
@pytest.mark.parametrize("given", [None, ["embed_tokens"]])
def test_heads_are_listed_as_peft_lists_them(task_type, model_class, heads, given):
    """In each model's own config once; through transformers, PEFT lists none."""

    def base():
        return getattr(transformers, model_class)(build().config)

    def lists(config):
        return [get_peft_model(base(), config).peft_config["default"].modules_to_save for _ in range(2)]

    ours = SingleLayerConfig(layer=1, task_type=task_type, modules_to_save=copy.copy(given))
    lora = LoraConfig(target_modules=["q_proj"], task_type=task_type, modules_to_save=copy.copy(given))
    expected = [*(given or []), *heads] or None
    assert lists(ours) == [expected, expected]
    assert get_peft_model(base(), lora).peft_config["default"].modules_to_save == expected
    injected = base()
    injected.add_adapter(SingleLayerConfig(layer=1, task_type=task_type, modules_to_save=copy.copy(given)))
    assert injected.peft_config["default"].modules_to_save == given
    for parameter in (p for n, p in injected.named_parameters() if n.startswith(tuple(heads or ["none"]))):
        assert not parameter.requires_grad


NORMS = {"input_layernorm", "post_attention_layernorm"}
ATTENTION = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
LINEAR = {name for name in ATTENTION | MLP if name.endswith("_proj")}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, NORMS | ATTENTION | MLP),
        ("self_attn", ATTENTION),
        ("mlp", MLP),
        (["self_attn", "mlp"], ATTENTION | MLP),
        (["q_proj", "v_proj"], {"self_attn.q_proj", "self_attn.v_proj"}),
        (("q_proj",), {"self_attn.q_proj"}),
        ({"q_proj", "input_layernorm"}, {"self_attn.q_proj", "input_layernorm"}),
        (["self_attn.q_proj"], {"self_attn.q_proj"}),
        (["model.layers.2.mlp.up_proj"], {"mlp.up_proj"}),
        (["layers.2.mlp"], MLP),
        ("model.layers.2.mlp", MLP),
        (r".*\.(q_proj|v_proj)", {"self_attn.q_proj", "self_attn.v_proj"}),
        (r"model\.layers\.\d+\.mlp\.(up|down)_proj", {"mlp.up_proj", "mlp.down_proj"}),
        (r"(self_attn|mlp)", ATTENTION | MLP),
        (r".*norm", NORMS | {"self_attn.q_norm", "self_attn.k_norm"}),
        ("all-linear", LINEAR),
    ],
)
def test_target_modules(tmp_path, targets, expected):
    model = wrap(layer=2, target_modules=targets)
    assert {n.removeprefix("model.layers.2.").rpartition(".")[0] for n in masters(model)} == expected
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == len(masters(model)) and all("single_layer_params" in name for name in trainable)
    # what was selected comes back from a file, and a second adapter selects the same on the wrapped block
    model.save_pretrained(tmp_path)
    assert masters(PeftModel.from_pretrained(build(), tmp_path)).keys() == masters(model).keys()
    model.add_adapter("again", SingleLayerConfig(layer=2, target_modules=targets))
    assert masters(model, "again").keys() == masters(model).keys()


@pytest.mark.parametrize(
    "targets",
    [
        ["q_porj"],
        ["q_proj", "v_porj"],
        "q_porj",
        r".*\.q_porj",
        ["model.layers.1.mlp"],
        ["_proj"],
        ["embed_tokens"],
        ["base_layer"],
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_target_that_matches_nothing_is_refused_with_what_is_there(targets, wrapped):
    model = wrap(layer=2) if wrapped else build()
    with pytest.raises(ValueError) as error:
        if wrapped:
            model.add_adapter("other", SingleLayerConfig(layer=2, target_modules=targets))
        else:
            wrap(model, layer=2, target_modules=targets)
    message, typo = str(error.value), targets if isinstance(targets, str) else targets[-1]
    assert f"entry {typo!r} matches nothing in block 2" in message
    assert "self_attn.q_proj, self_attn.k_proj" in message and "base_layer," not in message
    assert message.count("self_attn.q_proj") == 1


def test_all_linear_of_a_block_with_very_many(tmp_path):
    """PEFT shortens lists of twenty names and more."""

    def base():
        model = build()
        for block in model.model.layers:
            block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(30)])
        return model

    model = wrap(base(), layer=1, target_modules="all-linear")
    assert len(masters(model)) == 30 + len(LINEAR)
    model.save_pretrained(tmp_path)
    assert masters(PeftModel.from_pretrained(base(), tmp_path)).keys() == masters(model).keys()


@pytest.mark.parametrize("targets", [[], set(), ""])
def test_empty_target_modules_are_refused(targets):
    with pytest.raises(ValueError, match="target_modules is empty"):
        SingleLayerConfig(layer=1, target_modules=targets)


@pytest.mark.parametrize(
    ("task_type", "model_class", "heads"),
    [
        ("CAUSAL_LM", "Qwen3ForCausalLM", set()),
        ("SEQ_CLS", "Qwen3ForSequenceClassification", {"score.weight"}),
        ("TOKEN_CLS", "Qwen3ForTokenClassification", {"score.weight", "score.bias"}),
        ("QUESTION_ANS", "Qwen3ForQuestionAnswering", {"qa_outputs.weight", "qa_outputs.bias"}),
        ("FEATURE_EXTRACTION", "Qwen3Model", set()),
    ],
)
def test_task_types(tmp_path, task_type, model_class, heads):
    def base():
        torch.manual_seed(0)
        return getattr(transformers, model_class)(build().config)

    model = wrap(base(), layer=1, task_type=task_type)
    assert type(model).__name__ == peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task_type].__name__
    outside = {n for n, p in model.named_parameters() if p.requires_grad and "single_layer_params" not in n}
    marker = ".modules_to_save.default"
    assert {n.replace(marker, "").removeprefix("base_model.model.") for n in outside} == heads
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    tokens = torch.arange(3, 11)[None]
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("field", ["encoding", "trained_on"])
def test_a_saved_configuration_may_not_be_nested_without_end(tmp_path, field):
    """PEFT reads the file without a limit, and copies what it reads."""
    wrap(layer=1).save_pretrained(tmp_path)
    deep: object = {}
    for _ in range(900):
        deep = {"a": deep}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: deep}))
    with pytest.raises(ValueError, match="is nested more than 64 deep"):
        PeftModel.from_pretrained(build(), str(tmp_path))
