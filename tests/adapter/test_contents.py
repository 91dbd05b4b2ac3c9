"""An adapter's file holds exactly what its configuration says, or is refused, wherever it is opened."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tuner.helpers import base_weights, logits, move, same, wrap

from models import build
from peft_onelayer import export_adapter, inspect_adapter, merge_into_checkpoint
from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.adapter.validation import check_tensors
from peft_onelayer.adapter.write_sparse import write_sparse
from peft_onelayer.records.files import CONFIG, WEIGHTS
from peft_onelayer.runs.models import load_adapter

BF16 = torch.bfloat16
PREFIX = "base_model.model."
KEY = f"{PREFIX}model.layers.2.mlp.up_proj.single_layer_params.weight"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    build(dtype=BF16).save_pretrained(root / "base")
    model = wrap(AutoModelForCausalLM.from_pretrained(root / "base"))
    move(model)
    model.save_pretrained(root / "dense")
    write_sparse(root / "dense", root / "sparse", root / "base")
    return root


def head(state):
    state[f"{PREFIX}lm_head.weight"] = torch.zeros(64, 32)


def head_in_bfloat16(state):
    state[f"{PREFIX}lm_head.weight"] = torch.zeros(64, 32, dtype=BF16)


def head_of_another_shape(state):
    state[f"{PREFIX}lm_head.weight"] = torch.zeros(7, 32)


def embeddings(state):
    state[f"{PREFIX}model.embed_tokens.weight"] = torch.zeros(64, 32)


def without_the_prefix(state):
    state["lm_head.weight"] = torch.zeros(64, 32)


def other_block(state):
    state[f"{PREFIX}model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32)


def own_block(state):
    """The base's tensor below the trained one."""
    state[f"{PREFIX}model.layers.2.mlp.up_proj.base_layer.weight"] = torch.zeros(48, 32)


def other_block_trained(state):
    state[KEY.replace("layers.2", "layers.0")] = torch.zeros(48, 32)


def final_norm(state):
    state[f"{PREFIX}model.norm.weight"] = torch.zeros(32)


def nothing_of_the_model(state):
    state["x"] = torch.zeros(2)


def missing(state):
    for key in [key for key in state if "up_proj" in key]:
        del state[key]


def two_shapes(state):
    """A trained tensor of another shape, where the file holds one whole."""
    key = KEY if KEY in state else f"{KEY}.values"
    state[key] = torch.zeros(3, 5)


def float8(state):
    key = KEY if KEY in state else f"{KEY}.values"
    state[key] = state[key].float().to(torch.float8_e4m3fn)


def integers(state):
    key = KEY if KEY in state else f"{KEY}.values"
    state[key] = torch.zeros_like(state[key], dtype=torch.int32)


CHANGES = [head, head_in_bfloat16, head_of_another_shape, embeddings, without_the_prefix, other_block, own_block]
CHANGES += [other_block_trained, final_norm, nothing_of_the_model, missing, two_shapes, float8, integers]


def base_of(root):
    return AutoModelForCausalLM.from_pretrained(root / "base")


def through_an_adapter_that_is_there(root, adapter):
    model = wrap(base_of(root))
    before = base_weights(model)
    try:
        model.load_adapter(adapter, "default")
    finally:
        assert same(base_weights(model), before)


ENTRANCES = {
    "from_pretrained": lambda root, adapter: PeftModel.from_pretrained(base_of(root), adapter),
    "low_cpu_mem": lambda root, adapter: PeftModel.from_pretrained(base_of(root), adapter, low_cpu_mem_usage=True),
    "load_adapter": lambda root, adapter: wrap(base_of(root), layer=0).load_adapter(adapter, "second"),
    "transformers": lambda root, adapter: base_of(root).load_adapter(adapter),
    "eval": lambda root, adapter: load_adapter(base_of(root), adapter),
    "merge": lambda root, adapter: merge_into_checkpoint(root / "base", adapter, adapter / "out"),
    "export": lambda root, adapter: export_adapter(adapter, adapter / "out", "dense", base=root / "base"),
    "inspect": lambda root, adapter: inspect_adapter(adapter),
    "check": lambda root, adapter: check_tensors(open_adapter(adapter), None),
}


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize(
    "change",
    [change if change in (head, missing) else pytest.param(change, marks=pytest.mark.more) for change in CHANGES],
    ids=lambda change: change.__name__,
)
def test_what_the_configuration_does_not_say_is_refused(adapters, tmp_path, change, form, capfd):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters / form, folder)
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    entrances = dict(ENTRANCES)
    if form == "dense":
        entrances["there"] = through_an_adapter_that_is_there
    for name, enter in entrances.items():
        with pytest.raises(ValueError) as error:
            enter(adapters, folder)
        message = str(error.value)
        assert message.isprintable() and len(message) < 500 + 2 * len(str(folder)), (name, message)
    base, model = base_of(adapters), base_of(adapters)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(model, folder)
    assert same(base_weights(base), base_weights(model))


def test_set_peft_model_state_dict(adapters):
    """Also where the configuration is the model's own."""
    for form in ("dense", "sparse"):
        model = PeftModel.from_pretrained(base_of(adapters), adapters / form)
        state, before = load_file(adapters / form / WEIGHTS), base_weights(model)
        set_peft_model_state_dict(model, state)
        for change in CHANGES:
            wrong = dict(state)
            change(wrong)
            with pytest.raises(ValueError):
                set_peft_model_state_dict(model, wrong)
            assert same(base_weights(model), before)
    model = wrap(base_of(adapters))
    wrong = load_file(adapters / "dense" / WEIGHTS)
    head(wrong)
    with pytest.raises(ValueError, match=r"has unknown 1 tensor\(s\), for example .*lm_head\.weight"):
        set_peft_model_state_dict(model, wrong)


def test_a_tensor_under_two_names(adapters, tmp_path):
    """Both stand for the same parameter."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapters / "dense", folder)
    state = load_file(folder / WEIGHTS)
    state[KEY.removeprefix(PREFIX)] = torch.zeros(48, 32)
    save_file(state, folder / WEIGHTS)
    for enter in ENTRANCES.values():
        with pytest.raises(ValueError, match="twice"):
            enter(adapters, folder)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_what_it_says_is_loaded(tmp_path, form):
    """A trained head, and embeddings that were saved on request; without the embeddings' names it is refused."""
    build(dtype=BF16).save_pretrained(tmp_path / "base")
    model = wrap(base_of(tmp_path), modules_to_save=["lm_head"])
    model.get_base_model().lm_head.modules_to_save["default"].weight.data += 1
    move(model)
    model.save_pretrained(tmp_path / "dense", save_embedding_layers=True)
    if form == "sparse":
        write_sparse(tmp_path / "dense", tmp_path / "sparse", tmp_path / "base")
    config = json.loads((tmp_path / form / CONFIG).read_text())
    assert "model.embed_tokens.weight" in config["saved_embeddings"]
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(inspect_adapter(tmp_path / form).beside)
    loaded = load_adapter(base_of(tmp_path), tmp_path / form)
    assert torch.equal(logits(loaded), logits(model.eval()))
    config["saved_embeddings"] = None
    (tmp_path / form / CONFIG).write_text(json.dumps(config))
    for enter in (open_adapter, lambda folder: PeftModel.from_pretrained(base_of(tmp_path), folder)):
        with pytest.raises(ValueError, match=r"embed_tokens|has unknown 3 tensor"):
            enter(tmp_path / form)
    config["saved_embeddings"] = ["model.embed_tokens.weight", "lm_head.original_module.weight", "not.there"]
    (tmp_path / form / CONFIG).write_text(json.dumps(config))
    for enter in (open_adapter, lambda folder: PeftModel.from_pretrained(base_of(tmp_path), folder)):
        with pytest.raises(ValueError, match=r"not\.there"):
            enter(tmp_path / form)


def test_a_name_that_the_model_has_takes_files_with_embeddings_and_without(tmp_path):
    """PEFT reads only the weights then, whatever was saved or loaded under this name before."""
    model = wrap(build())
    for name, embeddings in (("with", True), ("without", False)):
        move(model)
        model.save_pretrained(tmp_path / name, save_embedding_layers=embeddings)
        assert model.peft_config["default"].saved_embeddings is None
    expected = logits(model)
    for name in ("with", "without", "with", "without"):
        model.load_adapter(tmp_path / name, "default")
    assert torch.equal(logits(model), expected)
    loaded = PeftModel.from_pretrained(build(), tmp_path / "with")
    loaded.load_adapter(tmp_path / "without", "default")
    assert torch.equal(logits(loaded), expected)


def test_a_resized_vocabulary_is_saved_loaded_and_resumed(tmp_path):
    """PEFT saves the embeddings by itself then."""
    build(dtype=BF16).save_pretrained(tmp_path / "base")

    def resized():
        model = base_of(tmp_path)
        torch.manual_seed(0)
        model.resize_token_embeddings(70)
        return model

    model = wrap(resized())
    move(model)
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path / "adapter")
    names = json.loads((tmp_path / "adapter" / CONFIG).read_text())["saved_embeddings"]
    assert names == ["lm_head.weight", "model.embed_tokens.weight"]
    other = resized()
    other.lm_head.weight.data[64:] = 3  # the file holds these rows itself
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path / "adapter")), logits(model))
    fresh = wrap(resized())
    fresh.load_adapter(tmp_path / "adapter", "default")  # as a run that resumes does
    assert torch.equal(logits(fresh), logits(model))
