"""An adapter that was trained on a base stored in bfloat16 and loaded quantized: it opens, loads, merges and is
evaluated, and what measures or writes a change of the unquantized weights says in one line why it does not."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from tuner.helpers import logits

import models
from peft_onelayer import SingleLayerConfig, inspect_adapter, push_adapter
from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.adapter.write_sparse import write_sparse
from peft_onelayer.runs.inputs import check_fit
from peft_onelayer.tuner.quantized import is_quantized

BF16 = torch.bfloat16
KINDS = {
    "bnb-int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16),
    "ao-int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """(folder with a base and an adapter, a function that loads the base quantized, names of what was quantized)."""
    root = tmp_path_factory.mktemp("trained")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # bitsandbytes packs 64 values to a scale
    models.build(dtype=BF16, **sizes).save_pretrained(root / "base")

    def load():
        return AutoModelForCausalLM.from_pretrained(
            root / "base", quantization_config=KINDS[request.param](), dtype=BF16, device_map={"": "cpu"}
        )

    base = load()
    names = {name for name, p in base.named_parameters() if ".layers.2." in name and is_quantized(p)}
    model = get_peft_model(base, SingleLayerConfig(layer=2, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(root / "run")
    return root, load, names


def test_it_opens_and_says_what_was_quantized(onelayer, trained):
    root, _, names = trained
    code, lines, out = onelayer("inspect", root / "run")
    assert (code, lines) == (0, []) and "7 of its 11 tensors were quantized in the base" in out
    assert "how much changed" not in out
    found = json.loads(onelayer("inspect", root / "run", "--json")[2])
    assert set(found["quantized"]) == names and len(names) == 7 and found["density"] is None
    record = open_adapter(root / "run").trained_on
    assert len(record.block) == 11 and record.rest["model.layers.0.mlp.up_proj.weight"].shape == (128, 64)
    check_fit(str(root / "run"), str(root / "base"))  # of eval, vote and train --init-adapter


def test_it_loads_on_the_base_as_trained_and_on_the_unquantized_one(trained, recwarn):
    root, load, _ = trained
    state = load_file(root / "run" / "adapter_model.safetensors")
    for base in (load(), AutoModelForCausalLM.from_pretrained(root / "base", dtype=BF16)):
        recwarn.clear()
        model = PeftModel.from_pretrained(base, root / "run")
        said = [str(w.message) for w in recwarn if "could not be compared" in str(w.message)]
        assert (
            len(said) == 1
            and said[0].startswith("28 tensor(s)")
            and said[0].endswith("(quantized in training)." if not any(map(is_quantized, base.parameters())) else ".")
        )
        for key, value in state.items():
            name = key.replace("single_layer_params.", "single_layer_params.default.")
            assert torch.equal(model.get_parameter(name), value)
    other = models.build(dtype=BF16, hidden_size=64, intermediate_size=128, head_dim=16, seed=1)
    with pytest.raises(ValueError, match="holds other weights"):
        PeftModel.from_pretrained(other, root / "run")


def test_it_merges_into_the_unquantized_checkpoint(onelayer, trained, tmp_path):
    root, _, _ = trained
    code, lines, _ = onelayer("merge", root / "base", root / "run", tmp_path / "out")
    assert code == 0, lines
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=BF16)
    want = PeftModel.from_pretrained(base, root / "run").merge_and_unload().state_dict()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=BF16).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)


@pytest.mark.parametrize("form", ["dense", "peft"])
def test_forms_that_hold_whole_tensors(onelayer, trained, tmp_path, form):
    root, _, _ = trained
    for i, base in enumerate(([], ["--base", root / "base"])):
        code, lines, _ = onelayer("export", root / "run", tmp_path / str(i), "--format", form, *base)
        assert code == 0, lines


OUT = "OUT"
OF_CHANGE = {
    "inspect": ["inspect", "run", "--base", "base"],
    "analyze": ["analyze", "base", "run"],
    "mask": ["analyze", "base", "run", "--mask-out", OUT],
    "compare": ["compare", "run", "run", "--base", "base"],
    "combine": ["combine", "run", "run", OUT, "--method", "sum"],
    **{form: ["export", "run", OUT, "--format", form] for form in ("sparse", "lora", "flat")},
}


@pytest.mark.parametrize("command", OF_CHANGE)
def test_a_change_of_the_unquantized_weights_is_taken_only_by_option(onelayer, trained, tmp_path, command):
    root, _, names = trained
    paths = {"run": root / "run", "base": root / "base", OUT: tmp_path / "out.safetensors"}
    name, *arguments = OF_CHANGE[command]
    arguments = [name, *(paths.get(argument, argument) for argument in arguments)]
    code, lines, out = onelayer(*arguments)
    assert (code, out) == (1, "") and lines[-1].endswith("--allow-other-base.") and not paths[OUT].exists()
    assert f"its {min(names)} and 6 more tensor(s) were quantized in training" in lines[-1]
    assert onelayer(*arguments, "--allow-other-base")[0] == 0


def test_what_is_written_by_option_loads_on_the_unquantized_base(onelayer, trained, tmp_path):
    root, load, _ = trained
    assert onelayer("export", root / "run", tmp_path / "sparse", "--format", "sparse", "--allow-other-base")[0] == 0
    states = []
    for adapter in (tmp_path / "sparse", root / "run"):
        base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=BF16)
        states.append(PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert inspect_adapter(tmp_path / "sparse", root / "base").quantized == []
    with pytest.raises(ValueError, match="it is quantized"):
        PeftModel.from_pretrained(load(), tmp_path / "sparse")
    with pytest.raises(ValueError, match="quantized; give the base in floating point"):
        write_sparse(root / "run", tmp_path / "out", load(), allow_other_base=True)


def test_push_sends_it_dense(trained):
    root, _, _ = trained
    with pytest.raises(ValueError, match=r"were quantized in training.* --dense publishes it"):
        push_adapter(root / "run", "me/run", dry_run=True)
    assert push_adapter(root / "run", "me/run", dense=True, dry_run=True).encoding == "dense"


def test_push_names_the_way_where_the_checkpoint_itself_is_quantized(trained, tmp_path):
    root, _, _ = trained
    for folder in ("base", "run"):
        shutil.copytree(root / folder, tmp_path / folder)
    for file, fields in (
        ("base/config.json", {"quantization_config": {"quant_method": "fp8"}}),
        ("run/adapter_config.json", {"base_model_name_or_path": str(tmp_path / "base")}),
    ):
        (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | fields))
    with pytest.raises(ValueError, match=r"/base is quantized.*--dense publishes the adapter"):
        push_adapter(tmp_path / "run", "me/run", dry_run=True)
    assert push_adapter(tmp_path / "run", "me/run", dense=True, dry_run=True).encoding == "dense"


def test_a_file_without_a_quantized_tensor_is_incomplete(trained, tmp_path):
    root, _, _ = trained
    shutil.copytree(root / "run", tmp_path / "run")
    file = tmp_path / "run" / "adapter_model.safetensors"
    state = load_file(file)
    lost = next(key for key in state if "up_proj" in key)
    save_file({key: value for key, value in state.items() if key != lost}, file)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight, .* it is incomplete"):
        open_adapter(tmp_path / "run")


def test_one_of_an_older_version_opens_once_it_was_loaded_and_saved_again(trained, tmp_path):
    """Whose record said nothing of quantized tensors."""
    root, load, names = trained
    shutil.copytree(root / "run", tmp_path / "old")
    file = tmp_path / "old" / "adapter_config.json"
    config = json.loads(file.read_text())
    for part in ("block", "rest"):
        record = config["trained_on"][part]
        config["trained_on"][part] = {n: text for n, text in record.items() if not text.startswith("quantized")}
    assert len(config["trained_on"]["block"]) == 4
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"load it on this with PeftModel\.from_pretrained and save it again"):
        open_adapter(tmp_path / "old")
    PeftModel.from_pretrained(load(), tmp_path / "old").save_pretrained(tmp_path / "new")
    assert set(open_adapter(tmp_path / "new").quantized) == names


def test_one_with_a_mask(trained, tmp_path):
    root, load, names = trained
    name = min(names)
    shape = open_adapter(root / "run").trained_on.block[name].shape
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    save_file({name: mask}, tmp_path / "mask.safetensors")
    config = SingleLayerConfig(layer=2, task_type="CAUSAL_LM", mask=str(tmp_path / "mask.safetensors"))
    model = get_peft_model(load(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01
    model.save_pretrained(tmp_path / "run")
    assert open_adapter(tmp_path / "run").quantized == [name]
    again = PeftModel.from_pretrained(load(), tmp_path / "run")
    assert torch.equal(logits(again), logits(model.eval()))
