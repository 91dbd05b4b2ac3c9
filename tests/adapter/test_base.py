"""The whole base is guarded: another one is refused by the names of the tensors that differ, the same one never is."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from tuner.helpers import same

from models import build
from peft_onelayer import SingleLayerConfig, export_adapter, inspect_adapter, merge_into_checkpoint
from peft_onelayer.adapter.checkpoint import Checkpoint
from peft_onelayer.adapter.write_sparse import write_sparse
from peft_onelayer.records.files import CONFIG
from peft_onelayer.runs.models import load_adapter
from peft_onelayer.sparse.base import QUANTIZED, RUN, RUNS, BaseRecord, Entries, Sampled, compare, positions
from peft_onelayer.tuner.base import base_entries

BF16 = torch.bfloat16
HEAD = "lm_head.weight"


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **kwargs})


def train(model, layer, seed=0, **config):
    """Wrap `model` and move a tenth of the block's weights."""
    model = get_peft_model(model, SingleLayerConfig(layer=layer, task_type="CAUSAL_LM", **config))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.1)
    return model


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A base, the adapters of two stages trained in memory, dense and sparse, and the weights after both."""
    root = tmp_path_factory.mktemp("chain")
    build(dtype=BF16).save_pretrained(root / "base", max_shard_size="12KB")
    first = train(load(root / "base"), 1)
    first.save_pretrained(root / "first")
    write_sparse(root / "first", root / "first-sparse", root / "base")
    merged = first.merge_and_unload()
    second = train(merged, 2, seed=1)
    second.save_pretrained(root / "second")
    write_sparse(root / "second", root / "second-sparse", second)
    return root, {name: tensor.clone() for name, tensor in second.merge_and_unload().state_dict().items()}


ENTRANCES = {
    "from_pretrained": lambda root, adapter: PeftModel.from_pretrained(load(root / "base"), adapter),
    "load_adapter": lambda root, adapter: train(load(root / "base"), 0).load_adapter(adapter, "second"),
    "transformers": lambda root, adapter: load(root / "base").load_adapter(adapter),
    "eval": lambda root, adapter: load_adapter(load(root / "base"), adapter),
    "merge": lambda root, adapter: merge_into_checkpoint(root / "base", adapter, root / "out"),
    "export": lambda root, adapter: export_adapter(adapter, root / "out", "flat", base=root / "base"),
    "inspect": lambda root, adapter: inspect_adapter(adapter, root / "base"),
    "write_sparse": lambda root, adapter: write_sparse(adapter, root / "out", root / "base"),
    "write_sparse_of_a_model": lambda root, adapter: write_sparse(adapter, root / "out", load(root / "base")),
}


@pytest.mark.parametrize("form", ["second", "second-sparse"])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_later_stage_is_refused_on_the_first_base(chain, entrance, form):
    root, _ = chain
    with pytest.raises(ValueError, match="is not the base that the adapter was trained on") as error:
        ENTRANCES[entrance](root, root / form)
    message = str(error.value)
    assert "its model.layers.1.input_layernorm.weight holds other weights, and 9 more tensor(s) differ" in message
    assert "\n" not in message and message.endswith("or --allow-other-base.") and not (root / "out").exists()
    assert "model.layers.2" not in message and "model.layers.0" not in message and len(message) < 700


def test_allow_other_base_takes_it(chain):
    root, _ = chain
    for form in ("second", "second-sparse"):
        loaded = PeftModel.from_pretrained(load(root / "base"), root / form, allow_other_base=True)
        assert loaded.peft_config["default"].layer_indices == [2]
        assert load_adapter(load(root / "base"), root / form, allow_other_base=True).active_adapters == ["default"]
    report = export_adapter(root / "second", root / "flat", "flat", base=root / "base", allow_other_base=True)
    assert report.encoding == "flat"


def test_the_name_of_a_base_that_was_merged_into_is_not_recorded(chain):
    root, _ = chain
    for form in ("second", "second-sparse"):
        config = config_of(root / form)
        assert (config["base_model_name_or_path"], config["revision"]) == (None, None)
        assert config["trained_on"]["stages"] == [{"base": str(root / "base"), "revision": None, "blocks": [1]}]
    assert inspect_adapter(root / "second").stages == f"block 1 of {root / 'base'}"
    first = config_of(root / "first")
    assert (first["base_model_name_or_path"], first["trained_on"]["stages"]) == (str(root / "base"), [])


@pytest.mark.parametrize("forms", [("first", "second"), ("first-sparse", "second-sparse"), ("first", "second-sparse")])
def test_stages_merge_in_their_order(chain, tmp_path, forms):
    root, want = chain
    merged = merge_into_checkpoint(root / "base", [root / form for form in forms], tmp_path / "out")
    got = load(tmp_path / "out").state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert merged.layers == [1, 2] and merged.unchecked == {}


def test_wrong_orders_and_missing_stages_are_named(chain, tmp_path):
    root, _ = chain
    base, first, second = root / "base", root / "first", root / "second"
    for adapters, match in (
        ([second, first], f"it was trained after block 1: give {first} before {second}"),
        ([second], f"if block 1 was trained before, give that adapter too, before {second}"),
        ([first, first], "neither on the result of the other"),
        ([first, second, second], "neither on the result of the other"),
        ([first, second, first], "neither on the result of the other|is not the base"),
    ):
        with pytest.raises(ValueError, match=match):
            merge_into_checkpoint(base, adapters, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_stage_trained_on_a_merged_folder(chain, tmp_path):
    """And a third one that trains the first one's block again."""
    root, _ = chain
    merge_into_checkpoint(root / "base", root / "first", tmp_path / "merged")
    train(load(tmp_path / "merged"), 2, seed=1).save_pretrained(tmp_path / "second")
    assert config_of(tmp_path / "second")["base_model_name_or_path"] == str(tmp_path / "merged")
    merge_into_checkpoint(tmp_path / "merged", tmp_path / "second", tmp_path / "twice")
    third = train(load(tmp_path / "twice"), 1, seed=2)
    third.save_pretrained(tmp_path / "third")
    stages = [root / "first-sparse", tmp_path / "second", tmp_path / "third"]
    merge_into_checkpoint(root / "base", stages, tmp_path / "out")
    got, want = load(tmp_path / "out").state_dict(), third.merge_and_unload().state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)
    with pytest.raises(ValueError, match=r"is not the base|neither on the result"):
        merge_into_checkpoint(root / "base", [root / "first", tmp_path / "third"], tmp_path / "no")


def test_the_wrong_base_of_the_same_shape(tmp_path):
    build(dtype=BF16).save_pretrained(tmp_path / "base")
    train(load(tmp_path / "base"), 1).save_pretrained(tmp_path / "adapter")
    for change in (lambda m: m.lm_head, lambda m: m.model.norm, lambda m: m.model.layers[1].mlp.up_proj):
        other = load(tmp_path / "base")
        weight = change(other).weight
        weight.data.view(-1)[-1] += 1
        name = next(n for n, p in other.named_parameters() if p is weight)
        with pytest.raises(ValueError, match=f"its {name} holds other weights; name|its {name} holds other weights\\."):
            PeftModel.from_pretrained(other, tmp_path / "adapter")
        assert not any("single_layer" in name for name, _ in other.named_parameters())  # nothing has been changed


SAME = {
    "float32": lambda folder: load(folder, dtype=torch.float32),
    "float16": lambda folder: load(folder, dtype=torch.float16),
    "eager": lambda folder: load(folder, attn_implementation="eager"),
    "device_map": lambda folder: load(folder, device_map="cpu"),
    "checkpointing": lambda folder: load(folder).train(),
}


@pytest.mark.parametrize("dtype", [BF16, pytest.param(torch.float32, marks=pytest.mark.more)], ids=str)
@pytest.mark.parametrize("way", SAME)
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.more)])
def test_the_same_base_is_never_refused(tmp_path, way, dtype, tied, recwarn):
    build(dtype=dtype, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    train(load(tmp_path / "base"), 1).save_pretrained(tmp_path / "adapter")
    recwarn.clear()
    PeftModel.from_pretrained(SAME[way](tmp_path / "base"), tmp_path / "adapter")
    assert not [w for w in recwarn if "compared" in str(w.message)]
    other = SAME[way](tmp_path / "base")
    other.model.norm.weight.data[3] = -2
    with pytest.raises(ValueError, match=r"its model\.norm\.weight holds other weights"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")


def test_a_base_that_was_tied_and_is_not_any_more(tmp_path, recwarn):
    build(dtype=BF16, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    train(load(tmp_path / "base"), 1).save_pretrained(tmp_path / "adapter")
    recwarn.clear()
    other = load(tmp_path / "base")
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "adapter")
    assert not [w for w in recwarn if "compared" in str(w.message)]
    other.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=rf"its {HEAD} holds other weights"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")


def test_what_cannot_be_compared_is_named(tmp_path):
    build(dtype=BF16).save_pretrained(tmp_path / "base")
    train(load(tmp_path / "base"), 1).save_pretrained(tmp_path / "adapter")
    resized = load(tmp_path / "base")
    resized.resize_token_embeddings(80)
    with pytest.warns(UserWarning, match=r"2 tensor\(s\) could not be compared.*resized: shape \[80, 32\], not \[64,"):
        PeftModel.from_pretrained(resized, tmp_path / "adapter")
    meta = load(tmp_path / "base")
    meta.lm_head.to("meta")
    with pytest.warns(
        UserWarning, match=r"1 tensor\(s\) could not .*lm_head\.weight \(on the meta device or offloaded"
    ):
        PeftModel.from_pretrained(meta, tmp_path / "adapter")
    more = load(tmp_path / "base")
    more.model.norm.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.warns(UserWarning, match=r"model\.norm\.bias \(not in the base of the training"):
        PeftModel.from_pretrained(more, tmp_path / "adapter")
    again = train(load(tmp_path / "base"), 1)
    again.base_model.model.lm_head.to("meta")
    # what was known before stays known where it cannot be read
    with pytest.warns(UserWarning, match="could not be compared"):
        loaded = PeftModel.from_pretrained(meta, tmp_path / "adapter", adapter_name="second")
    loaded.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again" / "second")["trained_on"]["rest"].keys() >= {HEAD}


def test_a_quantized_base_is_named(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    build(dtype=BF16).save_pretrained(tmp_path / "base")
    train(load(tmp_path / "base"), 1).save_pretrained(tmp_path / "adapter")
    model = load(tmp_path / "base")
    quantization.quantize_(model.model.layers[1], quantization.Int8WeightOnlyConfig(version=2))
    with pytest.warns(UserWarning, match=r"7 tensor\(s\) could not be compared.*quantized"):
        PeftModel.from_pretrained(model, tmp_path / "adapter")


def test_old_adapters_load_as_before(chain, tmp_path):
    root, _ = chain
    model = PeftModel.from_pretrained(load(root / "base"), root / "first")
    model.save_pretrained(tmp_path / "old")
    config = config_of(tmp_path / "old")
    del config["trained_on"]
    (tmp_path / "old" / CONFIG).write_text(json.dumps(config))
    PeftModel.from_pretrained(load(root / "base"), tmp_path / "old")
    PeftModel.from_pretrained(build(dtype=BF16, seed=5), tmp_path / "old")
    merge_into_checkpoint(root / "base", tmp_path / "old", tmp_path / "out")


def test_modules_to_save_are_not_of_the_base(tmp_path, recwarn):
    build(dtype=BF16).save_pretrained(tmp_path / "base")
    train(load(tmp_path / "base"), 1, modules_to_save=["lm_head"]).save_pretrained(tmp_path / "adapter")
    assert HEAD not in config_of(tmp_path / "adapter")["trained_on"]["rest"]
    other = load(tmp_path / "base")
    other.lm_head.weight.data += 1
    recwarn.clear()
    PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert not [w for w in recwarn if "compared" in str(w.message)]


def test_a_config_in_memory_serves_another_base():
    """The model's own configuration, used once more, does not tie the new model to the old base."""
    first = train(build(dtype=BF16), 1)
    second = get_peft_model(build(dtype=BF16, seed=3), first.peft_config["default"])
    ours, other = (m.peft_config["default"].trained_on["rest"][HEAD] for m in (first, second))
    assert ours != other


def test_files_and_memory_give_the_same_record(tmp_path):
    for family, tied in (("Qwen3", False), ("Gemma3Text", True)):
        build(family, dtype=BF16, tie_word_embeddings=tied, vocab_size=600).save_pretrained(tmp_path / family)
        found, unavailable = base_entries(load(tmp_path / family))
        files = Checkpoint(tmp_path / family).entries
        assert not unavailable and files.keys() == found.keys()
        assert all(files[name].sampled == found[name].sampled for name in found)
        assert max(len(entries.values) for entries in found.values()) == RUN * RUNS  # not all of a large one


def test_what_is_sampled():
    assert positions(3) == [0, 1, 2] and positions(RUN * RUNS) == list(range(RUN * RUNS))
    large = positions(10**9)
    assert len(large) == len(set(large)) == RUN * RUNS and large == sorted(large)
    assert (large[0], large[-1]) == (0, 10**9 - 1)


def test_dtypes_that_tell():
    exact = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forms = {d: Entries(exact.to(d), (50,)) for d in (torch.float64, torch.float32, torch.float16, BF16)}
    for there, record in forms.items():
        for here, entries in forms.items():
            # bfloat16 and float16 of their own do not tell; all others do
            want = None if {here, there} == {torch.float16, BF16} else True
            assert entries.equals(record.sampled) in (want, True if want is None else want)
            if here != there:
                continue
            changed = Entries(entries.values.clone().index_fill_(0, torch.tensor([7]), 9), (50,))
            assert changed.equals(record.sampled) is False
    wide = Entries(exact.to(BF16).float(), (50,))  # loaded in another dtype than the checkpoint's
    assert wide.equals(forms[BF16].sampled) and forms[BF16].equals(wide.sampled)
    half = Entries(exact.to(BF16).half(), (50,))
    assert half.equals(forms[BF16].sampled) and forms[BF16].equals(half.sampled) is True


def test_a_record_is_read_back_exactly():
    entries = {n: Entries(torch.ones(s).flatten(), s) for n, s in (("a", (2, 3)), ("b", ()), ("c", (0,)))}
    samples = {name: e.sampled for name, e in entries.items()}
    samples["d"] = Sampled(QUANTIZED, (2, 3), {})
    record = BaseRecord({"a": samples["a"], "d": samples["d"]}, {"b": samples["b"], "c": samples["c"]})
    assert BaseRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert compare(record.tensors, entries, {}).other == {}
    text = samples["a"].to_json()
    for wrong in (
        "",
        text[:-1],
        text + "0",
        text.replace("float32", "floot32"),
        text.replace("2x3", "2x-3"),
        text.replace("float32", "quantized"),
        "float32 2x3",
        "x" * 10**6,
    ):
        assert Sampled.from_json(wrong) is None
    fields = record.to_json()
    for change in ({"format": "x"}, {"block": {}}, {"block": 3}, {"rest": {"a": text}}, {"rest": {"b": 3}}):
        with pytest.raises(ValueError, match=r"trained_on|record of its base"):
            BaseRecord.from_json(fields | change)
    with pytest.raises(ValueError, match=r"trained_on\.stages\[0\]"):
        BaseRecord.from_json(fields | {"stages": [{"base": 3, "revision": None, "blocks": []}]})
    with pytest.raises(ValueError, match="record of its base is 'list'"):
        BaseRecord.from_json([])


def test_merging_in_effect_does_not_change_the_record(tmp_path):
    model = train(build(dtype=BF16), 1)
    before, _ = base_entries(model.get_base_model())
    model.merge_adapter()
    after, _ = base_entries(model.get_base_model())
    assert before.keys() == after.keys() and all(before[n].sampled == after[n].sampled for n in before)
    model.unmerge_adapter()
    assert same({n: e.values for n, e in before.items()}, {n: e.values for n, e in after.items()})


def test_a_plain_module_is_warned_of(tmp_path):
    """It has no checkpoint that it could be loaded from again; PEFT's own tests load adapters on another one."""

    def plain(seed):
        torch.manual_seed(seed)
        module = torch.nn.Module()
        module.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))
        return module

    get_peft_model(plain(0), SingleLayerConfig(layer=1)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(plain(0), tmp_path)
    with pytest.warns(UserWarning, match=r"is not the base .* its layers\.0\.0\.bias holds other weights"):
        PeftModel.from_pretrained(plain(1), tmp_path)
