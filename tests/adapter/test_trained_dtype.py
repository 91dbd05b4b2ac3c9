"""A base is taken in the dtype that it was loaded in for training, whatever dtype it is stored in: an adapter with one
changed entry has one, wherever it is measured or written anew."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models import build
from peft_onelayer import (
    SingleLayerConfig,
    analyze_change,
    combine_adapters,
    export_adapter,
    inspect_adapter,
    push_adapter,
)
from peft_onelayer.adapter.export import FLAT_WEIGHTS
from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.adapter.write_sparse import write_sparse

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MOVED = "model.layers.1.self_attn.q_proj.weight"


def load(root, dtype):
    return AutoModelForCausalLM.from_pretrained(root / "base", dtype=dtype)


def save(root, loaded, entries):
    """An adapter of the base loaded in `loaded`, with `entries` of one tensor moved, dense and sparse."""
    model = get_peft_model(load(root, loaded), SingleLayerConfig(layer=1, task_type="CAUSAL_LM"))
    weight = model.get_parameter(f"base_model.model.{MOVED[:-7]}.single_layer_params.default.weight")
    weight.data.view(-1)[entries] = 0.5
    model.save_pretrained(root / "dense")
    write_sparse(root / "dense", root / "sparse", model)
    return root


PAIRS = [(F32, BF16), (F16, BF16), (BF16, F32)]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
def made(request, tmp_path_factory):
    """(folder, dtype in training)."""
    stored, loaded = request.param
    root = tmp_path_factory.mktemp("made")
    build(dtype=stored).save_pretrained(root / "base")
    return save(root, loaded, [101]), loaded


def weights(root, adapter, dtype):
    return PeftModel.from_pretrained(load(root, dtype), adapter).merge_and_unload().state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_inspect_counts_the_entries_that_moved(made, form):
    root, _ = made
    found = inspect_adapter(root / form, root / "base")
    assert [(t.name, t.changed) for t in found.tensors if t.changed] == [(MOVED, 1)]
    assert found.density == inspect_adapter(root / "sparse").density
    assert found.change == pytest.approx(analyze_change(root / "base", root / form).total.norm, rel=1e-12)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_a_sparse_export_holds_the_entries_that_moved_and_loads_on_the_base_as_trained(made, tmp_path, form):
    root, loaded = made
    exported = export_adapter(root / form, tmp_path / "out", "sparse", base=root / "base")
    assert {t.name: t.changed for t in exported.tensors if t.changed} == {MOVED: 1}
    assert {t.dtype for t in open_adapter(tmp_path / "out").sparse.tensors.values()} == {str(loaded)[6:]}
    assert same(weights(root, tmp_path / "out", loaded), weights(root, root / "dense", loaded))
    mine, theirs = ((root / "sparse", tmp_path / "out"), "adapter_model.safetensors")
    assert (mine[0] / theirs).read_bytes() == (mine[1] / theirs).read_bytes()


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_other_forms_do_not_carry_the_bases_rounding(made, tmp_path, form):
    root, loaded = made
    lora = export_adapter(root / form, tmp_path / "lora", "lora", base=root / "base")
    assert {t.name: t.rank for t in lora.tensors if t.rank} == {MOVED: 1} and lora.left_out == 0
    flat = export_adapter(root / form, tmp_path / "flat", "flat", base=root / "base")
    assert {t.name: t.changed for t in flat.tensors if t.changed} == {MOVED: 1}
    values = load_file(tmp_path / "flat" / FLAT_WEIGHTS)[f"{MOVED}.values"]
    assert values.dtype == loaded and values.tolist() == [0.5]
    for kind in ("peft", "dense"):
        export_adapter(root / form, tmp_path / kind, kind, base=root / "base")
        assert same(weights(root, tmp_path / kind, loaded), weights(root, root / "dense", loaded))


def test_push_publishes_the_entries_that_moved(made):
    root, _ = made
    push = push_adapter(root / "dense", "me/adapter", dry_run=True)
    assert push.encoding == "sparse"
    assert push.files["adapter_model.safetensors"] == (root / "sparse" / "adapter_model.safetensors").stat().st_size


def test_with_another_base_too(tmp_path):
    """What is written for it, by `allow_other_base`, is in the dtype of the training and says so of its base."""
    build(dtype=F32).save_pretrained(tmp_path / "base")
    save(tmp_path, BF16, [101])
    build(dtype=F32, seed=1).save_pretrained(tmp_path / "other")
    options = {"base": tmp_path / "other", "allow_other_base": True}
    for form in ("dense", "sparse"):
        export_adapter(tmp_path / form, tmp_path / f"{form}-sparse", "sparse", **options)
        file = open_adapter(tmp_path / f"{form}-sparse")
        assert file.trained_on.block[MOVED].dtype == file.sparse.tensors[MOVED].dtype == "bfloat16"
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=BF16)
        PeftModel.from_pretrained(other, tmp_path / f"{form}-sparse")
    assert file.sparse.tensors[MOVED].changed == 1
    combine_adapters([tmp_path / "sparse"] * 2, tmp_path / "twice", "average", **options)
    assert open_adapter(tmp_path / "twice").trained_on.block[MOVED].dtype == "bfloat16"
    found = inspect_adapter(tmp_path / "twice", tmp_path / "other")
    assert {t.name: t.changed for t in found.tensors}[MOVED] == 1


def test_a_rounded_copy_of_a_wider_base_is_taken_as_it_is(tmp_path):
    """Widened again it is not what was trained on, and all of its rounding would count as change."""
    build(dtype=F32).save_pretrained(tmp_path / "base")
    save(tmp_path, F32, [101])
    load(tmp_path, BF16).save_pretrained(tmp_path / "copy")
    for measured in (
        inspect_adapter(tmp_path / "dense", tmp_path / "copy"),
        export_adapter(tmp_path / "dense", tmp_path / "out", "sparse", base=tmp_path / "copy"),
        analyze_change(tmp_path / "copy", tmp_path / "dense").movement,
    ):
        assert sum(t.changed for t in measured.tensors) == 1
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=BF16), tmp_path / "out")


def test_nothing_recorded_means_the_dtype_that_the_checkpoint_names(tmp_path):
    build(dtype=BF16).save_pretrained(tmp_path / "base")
    save(tmp_path, BF16, [101])
    config = json.loads((tmp_path / "dense" / "adapter_config.json").read_text())
    del config["trained_on"]
    (tmp_path / "dense" / "adapter_config.json").write_text(json.dumps(config))
    assert sum(t.changed for t in inspect_adapter(tmp_path / "dense", tmp_path / "base").tensors) == 1
    write_sparse(tmp_path / "dense", tmp_path / "again", tmp_path / "base")
    assert inspect_adapter(tmp_path / "again").density == inspect_adapter(tmp_path / "sparse").density
