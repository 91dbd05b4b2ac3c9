"""Whether training moved the weights: from the model in memory and from the files the same, tensor by tensor."""

import json

import pytest
import torch
from changes import save_adapter
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import models
from peft_onelayer import SingleLayerConfig, analyze_change, compare_adapters, export_adapter, make_mask
from peft_onelayer.adapter.write_sparse import write_sparse
from peft_onelayer.analysis.movement import movement_of_files, movement_of_model
from peft_onelayer.records.fields import read
from peft_onelayer.records.movement import Movement, TensorMovement
from peft_onelayer.records.run import RunResults


def wrapped(dtype=torch.bfloat16, size=0.03, still="layernorm", **config):
    model = get_peft_model(models.build(dtype=dtype), SingleLayerConfig(layer=1, task_type="CAUSAL_LM", **config))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and still not in name:
            parameter.data += size * torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.5)
    return model


def by_hand(base, master):
    rounded = master.to(base.dtype)
    change = master.double() - base.double()
    return (
        base.numel(),
        int((change != 0).sum()),
        int((rounded != base).sum()),
        int((master.bfloat16() != base.bfloat16()).sum()),
        pytest.approx(float(change.norm()), rel=1e-12),
        pytest.approx(float(change.norm() / base.double().norm()), rel=1e-12),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_the_model_in_memory(dtype):
    model, base = wrapped(dtype), models.build(dtype=dtype)
    found = movement_of_model(model)
    masters = {
        name.replace(".single_layer_params.default", "").removeprefix("base_model.model."): p
        for name, p in model.named_parameters()
        if "single_layer_params" in name
    }
    assert [t.name for t in found.tensors] == sorted(masters)
    for tensor in found.tensors:
        original = base.get_parameter(tensor.name)
        assert (tensor.dtype, tensor.master_dtype) == (str(dtype).removeprefix("torch."), "float32")
        got = (tensor.entries, tensor.moved, tensor.changed, tensor.changed_bfloat16, tensor.norm, tensor.relative)
        assert got == by_hand(original.detach(), masters[tensor.name].detach())
    norms = [f"model.layers.1.{part}_layernorm.weight" for part in ("input", "post_attention")]
    assert found.never_moved == norms
    assert found.summary().endswith(
        "2 of 11 tensors NEVER MOVED: input_layernorm.weight, post_attention_layernorm.weight"
    )
    for name, parameter in model.named_parameters():  # nothing of the model has changed
        if "single_layer_params" not in name:
            assert torch.equal(
                parameter, base.get_parameter(name.removeprefix("base_model.model.").replace(".base_layer", ""))
            )


@pytest.mark.parametrize("encoding", ["dense", "sparse"])
def test_the_files_say_the_same(tmp_path, encoding):
    models.build(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    folder = save_adapter(tmp_path / "dense", tmp_path / "base", 1, size=0.03)
    if encoding == "sparse":
        folder = tmp_path / "sparse"
        export_adapter(tmp_path / "dense", folder, "sparse")
    found = movement_of_files(tmp_path / "base", folder)
    assert found == analyze_change(tmp_path / "base", folder).movement
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(models.build(dtype=torch.bfloat16), folder)
    in_memory = movement_of_model(loaded)
    if encoding == "dense":
        assert found == in_memory
    assert [(t.name, t.changed) for t in found.tensors] == [(t.name, t.changed) for t in in_memory.tensors]


@pytest.mark.parametrize(
    ("stored", "loaded"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_a_base_that_was_loaded_in_another_dtype_for_training_is_compared_in_that_one(tmp_path, stored, loaded):
    base, moved = tmp_path / "base", "model.layers.1.self_attn.q_proj.weight"
    models.build(dtype=stored).save_pretrained(base)
    for name in ("still", "one"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=loaded)
        model = get_peft_model(model, SingleLayerConfig(layer=1, task_type="CAUSAL_LM"))
        if name == "one":
            model.get_parameter(f"base_model.model.{moved[:-7]}.single_layer_params.default.weight").data[3, 5] = 0.5
        model.save_pretrained(tmp_path / name)
        write_sparse(tmp_path / name, tmp_path / f"{name}-sparse", model)
        found = movement_of_files(base, tmp_path / name)
        assert found == analyze_change(base, tmp_path / name).movement == movement_of_model(model)
        assert [(t.name, t.moved, t.changed) for t in found.tensors if t.moved] == [(moved, 1, 1)] * (name == "one")
        sparse = movement_of_files(base, tmp_path / f"{name}-sparse")
        assert [(t.dtype, t.changed, t.norm) for t in sparse.tensors] == [
            (t.dtype, t.changed, t.norm) for t in found.tensors
        ]
    whole = analyze_change(base, tmp_path / "one")
    assert [t.rank for t in whole.tensors if t.moved] == [1]
    assert whole.dtypes.startswith(f"the base's weights are {str(loaded).removeprefix('torch.')}, ")
    for share in (None, 0.5):
        assert make_mask(base, tmp_path / "one", tmp_path / "mask.safetensors", share).trained == 1
    (mask,) = load_file(tmp_path / "mask.safetensors").values()
    assert mask.nonzero().tolist() == [[3, 5]]
    (pair,) = compare_adapters([tmp_path / "still", tmp_path / "one"], base).pairs
    assert (pair.changed_a, pair.changed_b, pair.both, pair.correlation) == (0, 1, 0, None)


def test_a_whole_checkpoint(tmp_path):
    models.build(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = models.build(dtype=torch.bfloat16)
    model.get_parameter("lm_head.weight").data[:7] *= 2
    model.save_pretrained(tmp_path / "full")
    found = movement_of_files(tmp_path / "base", tmp_path / "full")
    moved = [t for t in found.tensors if t.changed]
    assert [(t.name, t.changed) for t in moved] == [("lm_head.weight", 7 * 32)]
    assert len(found.never_moved) == len(model.state_dict()) - 1


def test_an_untrained_adapter_and_what_would_vanish():
    found = movement_of_model(wrapped(size=0.0))
    assert found.summary() == "NOTHING MOVED: in bfloat16 all 11 tensors equal the base's" and found.notes() == []
    found = movement_of_model(wrapped(size=1e-6, still="nothing"))  # the masters moved, less than a rounding step
    assert len(found.never_moved) >= 4 and found.never_moved[0].endswith("input_layernorm.weight")
    assert "would lose" in found.notes()[0] and "less than a rounding step of bfloat16" in found.notes()[0]
    assert "would vanish in a bfloat16 merge: input_layernorm.weight, " in found.notes()[1]
    found = movement_of_model(wrapped(torch.float32, size=1e-6, still="nothing"))
    assert found.never_moved == [] and "entries changed in float32" in found.summary()
    assert "a bfloat16 merge would lose" in found.notes()[0]
    assert movement_of_model(wrapped(torch.float32, size=1.0)).notes() == []


def test_several_adapters_and_wrong_use():
    model = wrapped()
    model.add_adapter("still", SingleLayerConfig(layer=2))
    assert movement_of_model(model).tensors[0].name.startswith("model.layers.1.")
    still = movement_of_model(model, "still")
    assert still.tensors[0].name.startswith("model.layers.2.") and still.share == 0
    with pytest.raises(ValueError, match="no single-layer adapter 'other'"):
        movement_of_model(model, "other")
    with pytest.raises(ValueError, match="no single-layer adapter"):
        movement_of_model(models.build())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        movement_of_model(model)


def test_the_meta_device_holds_nothing_to_measure():
    with torch.device("meta"):
        model = get_peft_model(models.build(), SingleLayerConfig(layer=1))
    assert movement_of_model(model) is None


def test_run_json_holds_it():
    results = RunResults(steps=1, movement=movement_of_model(wrapped()))
    from peft_onelayer.records.fields import without_missing_parts

    fields = json.loads(json.dumps(without_missing_parts(results)))
    assert read(RunResults, fields, "run.json") == results
    assert "movement" not in without_missing_parts(RunResults(steps=1))
    fields["movement"]["tensors"][0]["changed"] = "many"
    with pytest.raises(ValueError, match=r"movement.tensors\[0\].changed is many, expected an integer"):
        read(RunResults, fields, "run.json")


def test_a_long_list_is_cut():
    tensors = [TensorMovement(f"h.{i}.w", "float32", "float32", 4, 0, 0, 0, 0.0) for i in range(9)]
    tensors.append(TensorMovement("h.9.w", "float32", "float32", 4, 4, 4, 4, 1.0))
    assert Movement(tensors).summary() == (
        "10 % of the entries changed in float32; 9 of 10 tensors NEVER MOVED: 0.w, 1.w, 2.w, 3.w, 4.w, 5.w and 3 more"
    )
