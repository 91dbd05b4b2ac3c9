"""Every form of an adapter is what it says: the same bits, or an approximation whose error is the one reported."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import models
from peft_onelayer import SingleLayerConfig, combine_adapters, export_adapter
from peft_onelayer.adapter.export import FLAT_WEIGHTS
from peft_onelayer.adapter.forms import low_rank
from peft_onelayer.adapter.write_sparse import write_sparse

WEIGHTS = "adapter_model.safetensors"
DTYPES = (torch.float32, torch.bfloat16)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def make(root, base, layer=1, seed=0, **config):
    """Save `base` and an adapter of it with a tenth of its weights moved."""
    base.save_pretrained(root / "base")
    model = get_peft_model(load(root / "base"), SingleLayerConfig(layer=layer, task_type="CAUSAL_LM", **config))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.1)
    model.save_pretrained(root / "adapter")
    return root


@pytest.mark.parametrize("command", ["export", "combine"])
def test_a_base_that_was_a_folder_elsewhere_is_asked_for(bases, tmp_path, command):
    """As after a pull of what was pushed from a run on a local model."""
    adapter = tmp_path / "got"
    shutil.copytree(bases[torch.float32] / "sparse", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/them/base"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    typed = (
        f"onelayer export {adapter} {tmp_path / 'out'} --format peft" if command == "export" else "onelayer combine ..."
    )
    with pytest.raises(ValueError, match="no such folder is here; name the model: ") as raised:
        if command == "export":
            export_adapter(adapter, tmp_path / "out", "peft")
        else:
            combine_adapters([adapter, adapter], tmp_path / "out", method="average")
    assert str(raised.value).endswith(f"{typed} --base PATH/TO/base")
    assert not (tmp_path / "out").exists()


def tuned(root, adapter="adapter"):
    return PeftModel.from_pretrained(load(root / "base"), root / adapter)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By dtype, a folder with a base, an adapter of it, and the same adapter in the sparse encoding."""
    roots = {}
    for dtype in DTYPES:
        roots[dtype] = make(tmp_path_factory.mktemp("export"), models.build("Qwen2", dtype=dtype))
        write_sparse(roots[dtype] / "adapter", roots[dtype] / "sparse", roots[dtype] / "base")
    return roots


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def made(request, bases):
    return bases[request.param]


PLAIN = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM, PeftModel
ids = torch.arange(3, 27).reshape(2, 12)

@torch.no_grad()
def outputs(base, adapter):
    def load():
        return AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    results = {}
    model = PeftModel.from_pretrained(load(), adapter).eval()
    results["peft"] = model(ids).logits
    with model.disable_adapter():
        results["off"] = model(ids).logits
    model.merge_adapter()
    results["merged in place"] = model(ids).logits
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    results["merged"] = merged(ids).logits
    weights = merged.state_dict()
    results["auto"] = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=merged.dtype).eval()(ids).logits
    model = load()
    report = model.load_adapter(adapter)
    assert not report.missing_keys and not report.unexpected_keys, report
    results["transformers"] = model.eval()(ids).logits
    if adapter.endswith("in_its_dtype"):
        model = PeftModel.from_pretrained(load(), adapter, low_cpu_mem_usage=True).eval()
        results["low memory"] = model(ids).logits
    return results, weights

for root in sys.argv[1:]:
    for name in ("peft", "of_sparse", "in_its_dtype"):
        torch.save(outputs(f"{root}/base", f"{root}/{name}"), f"{root}/{name}/outputs")
assert not any(name.startswith("peft_onelayer") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def in_plain_peft(bases):
    """What a process without this package computes with the `peft` exports; one process, because starting it is what
    takes the time."""
    for root in bases.values():
        for name, source, base in (
            ("peft", "adapter", None),
            ("of_sparse", "sparse", root / "base"),
            ("in_its_dtype", "adapter", root / "base"),
        ):
            exported = export_adapter(root / source, root / name, "peft", base=base)
            assert exported.bytes == (root / name / WEIGHTS).stat().st_size
    command = [sys.executable, "-W", "ignore", "-c", PLAIN, *map(str, bases.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.more
@pytest.mark.parametrize("name", ["peft", "of_sparse", "in_its_dtype"])
def test_peft_loads_it_without_this_package(made, in_plain_peft, name):
    results, weights = torch.load(made / name / "outputs")
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        want, off = tuned(made).eval()(ids).logits, load(made / "base").eval()(ids).logits
    assert torch.equal(results.pop("off"), off) and not torch.equal(want, off)
    assert all(torch.equal(logits, want) for logits in results.values()), results.keys()
    assert len(results) == 5 + (name == "in_its_dtype")
    assert same(weights, state(tuned(made).merge_and_unload()))
    stored = {tensor.dtype for tensor in load_file(made / name / WEIGHTS).values()}
    assert stored == {torch.float32 if name == "peft" else load(made / "base").dtype}


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3Text"])
def test_peft_of_other_families_and_several_layers(tmp_path, family):
    root = make(tmp_path, models.build(family, dtype=torch.bfloat16, num_layers=12), layer=[1, 11])
    export_adapter(root / "adapter", root / "peft", "peft")
    with pytest.warns(UserWarning, match="Unsupported layer type"):  # PEFT's word for a norm
        merged = PeftModel.from_pretrained(load(root / "base"), root / "peft").merge_and_unload()
    assert same(state(merged), state(tuned(root).merge_and_unload()))


def test_peft_refuses_what_ln_tuning_cannot_hold(tmp_path):
    root = make(tmp_path, models.build_architecture("qwen3_moe"))
    with pytest.raises(ValueError, match=r"experts\.down_proj of shape .* belongs to another kind of module") as error:
        export_adapter(root / "adapter", root / "out", "peft")
    assert "\n" not in str(error.value) and not (root / "out").exists()
    hybrid = make(tmp_path / "hybrid", models.build_architecture("qwen3_5_text"), layer=0)
    with pytest.raises(ValueError, match="belongs to another kind of module"):
        export_adapter(hybrid / "adapter", root / "out", "peft")


def test_dense_and_sparse_give_back_the_same_weights(made, tmp_path):
    want = state(tuned(made).merge_and_unload())
    for name, source, form, base in (
        ("dense", "adapter", "dense", None),
        ("from_sparse", "sparse", "dense", made / "base"),
        ("sparse", "adapter", "sparse", None),  # the base is the one that the adapter names
    ):
        exported = export_adapter(made / source, tmp_path / name, form, base=base)
        assert exported.bytes == (tmp_path / name / WEIGHTS).stat().st_size
        stored = load_file(tmp_path / name / WEIGHTS)
        assert sum(tensor.bytes for tensor in exported.tensors) == sum(tensor.nbytes for tensor in stored.values())
        model = PeftModel.from_pretrained(load(made / "base"), tmp_path / name)
        assert same(state(model.merge_and_unload()), want), name
    before, after = (load_file(folder / WEIGHTS) for folder in (made / "adapter", tmp_path / "dense"))
    assert same(before, after)  # the masters, not what is left of them in the base's dtype
    assert {tensor.dtype for tensor in load_file(tmp_path / "from_sparse" / WEIGHTS).values()} == {torch.float32}
    assert (tmp_path / "sparse" / WEIGHTS).stat().st_size < 0.5 * (made / "adapter" / WEIGHTS).stat().st_size


@pytest.mark.parametrize("source", ["adapter", "sparse"])
def test_flat_indices_and_values(made, tmp_path, source):
    exported = export_adapter(made / source, tmp_path / "flat", "flat")
    weights = load(made / "base").state_dict()
    want = state(tuned(made).merge_and_unload())
    tensors = load_file(tmp_path / "flat" / FLAT_WEIGHTS)
    changed = 0
    for key, indices in tensors.items():
        if key.endswith(".indices"):
            name = key.removesuffix(".indices")
            assert indices.dtype == torch.int32 and indices.dim() == 1
            values = tensors[f"{name}.values"]
            assert values.dtype == weights[name].dtype
            assert (values != weights[name].view(-1)[indices.long()]).all()
            weights[name].view(-1)[indices.long()] = values
            changed += len(indices)
    assert same(weights, want)
    with safe_open(tmp_path / "flat" / FLAT_WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert int(metadata["changed"]) == changed == sum(t.changed for t in exported.tensors)
    assert json.loads(metadata["shapes"])["model.layers.1.input_layernorm.weight"] == [32]


def lora_weights(root, folder):
    """(merged LoRA, merged adapter, base) in float64, by name."""
    lora = PeftModel.from_pretrained(load(root / "base"), folder).merge_and_unload()
    models_ = (lora, tuned(root).merge_and_unload(), load(root / "base"))
    return [{name: t.double() for name, t in model.state_dict().items()} for model in models_]


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.9}, {}], ids=str)
def test_lora(tmp_path, options):
    root = make(tmp_path, models.build("Qwen2"))  # float32, so that merging the LoRA rounds little
    exported = export_adapter(root / "adapter", root / "lora", "lora", **options)
    assert exported.bytes == (root / "lora" / WEIGHTS).stat().st_size
    lora, want, base = lora_weights(root, root / "lora")
    lost = whole = 0.0
    for tensor in exported.tensors:
        delta, error = want[tensor.name] - base[tensor.name], want[tensor.name] - lora[tensor.name]
        assert math.isclose(tensor.change, delta.norm(), rel_tol=1e-6)
        lost, whole = lost + float(error.norm() ** 2), whole + float(delta.norm() ** 2)
        if delta.dim() == 1:
            assert (tensor.rank, tensor.bytes) == (None, 0)
            assert torch.equal(lora[tensor.name], base[tensor.name])
            continue
        squares = torch.linalg.svdvals(delta) ** 2
        if "rank" in options:
            assert tensor.rank == 4
        else:
            share = options.get("energy", 0.99)
            assert squares[: tensor.rank].sum() >= share * squares.sum() > squares[: tensor.rank - 1].sum()
        best = float((squares[tensor.rank :].sum() / squares.sum()).sqrt())
        assert math.isclose(tensor.error, best, rel_tol=1e-4)  # Eckart and Young: no matrix of this rank is closer
        assert math.isclose(float(error.norm()), tensor.error * tensor.change, rel_tol=1e-2)
        assert tensor.bytes == 4 * tensor.rank * sum(delta.shape)
    assert math.isclose(exported.lost, (lost / whole) ** 0.5, rel_tol=1e-2)
    assert 0 < exported.left_out < exported.lost
    untouched = base.keys() - {tensor.name for tensor in exported.tensors}
    assert all(torch.equal(lora[name], base[name]) for name in untouched)


def test_a_lora_of_full_rank_is_exact_but_for_rounding(tmp_path):
    root = make(tmp_path, models.build("Qwen3"), target_modules=["self_attn"])
    exported = export_adapter(root / "adapter", root / "lora", "lora", rank=1000)
    assert max(t.error for t in exported.tensors if t.rank) < 1e-6
    lora, want, _ = lora_weights(root, root / "lora")
    assert max(float((lora[t.name] - want[t.name]).abs().max()) for t in exported.tensors if t.rank) < 1e-7


def test_the_lora_is_in_the_form_that_vllm_reads(tmp_path):
    """vLLM takes r, lora_alpha and target_modules from the config, scales every tensor by lora_alpha / r whatever the
    patterns say, and parses names (vllm/lora/peft_helper.py, lora_model.py and utils.py)."""
    root = make(tmp_path, models.build("Qwen3", dtype=torch.bfloat16))
    exported = export_adapter(root / "adapter", root / "lora", "lora", energy=0.9)
    config = json.loads((root / "lora" / "adapter_config.json").read_text())
    ranks = {t.name.removesuffix(".weight"): t.rank for t in exported.tensors if t.rank}
    assert len(set(ranks.values())) > 1
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["rank_pattern"] == config["alpha_pattern"] == {n: r for n, r in ranks.items() if r != config["r"]}
    assert config["modules_to_save"] is None and not config["use_dora"] and config["bias"] == "none"
    assert sorted(config["target_modules"]) == sorted(ranks)
    linears = {n.rpartition(".")[2] for n, m in load(root / "base").named_modules() if isinstance(m, torch.nn.Linear)}
    for key, tensor in load_file(root / "lora" / WEIGHTS).items():
        *module, kind, leaf = key.removeprefix("base_model.model.").split(".")
        assert kind in ("lora_A", "lora_B") and leaf == "weight" and module[-1] in linears
        assert tensor.shape[kind == "lora_B"] == ranks[".".join(module)]


def test_a_lora_of_layers_that_store_their_weights_transposed(tmp_path):
    root = make(tmp_path, models.build_architecture("gpt2"))
    export_adapter(root / "adapter", root / "lora", "lora", rank=32)
    lora, want, base = lora_weights(root, root / "lora")
    name = "transformer.h.1.mlp.c_fc.weight"
    assert float((lora[name] - want[name]).norm()) < 1e-5 * float((want[name] - base[name]).norm())


def test_low_rank_of_wide_and_tall():
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 9), (9, 5)):
        delta = torch.randn(shape, generator=generator, dtype=torch.float64)
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        b, a = low_rank(delta, 3)
        torch.testing.assert_close((b @ a).double(), u[:, :3] * s[:3] @ v[:3], atol=1e-6, rtol=1e-5)
    assert low_rank(torch.eye(4).double(), None, 0.5)[0].shape == (4, 2)
    assert low_rank(torch.eye(4).double(), None, 1.0)[0].shape == (4, 4)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("gguf", {}, "expected one of peft, lora, dense, sparse, flat"),
        ("peft", {"rank": 4}, "are those of the format lora"),
        ("lora", {"rank": 4, "energy": 0.5}, "exclude each other"),
        ("lora", {"rank": 0}, "keeps nothing"),
        ("lora", {"energy": 0.0}, "above 0 and up to 1"),
        ("lora", {"energy": math.nan}, "above 0 and up to 1"),
        ("lora", {"base": "./nowhere"}, "no model folder at nowhere"),
    ],
)
def test_wrong_use(made, tmp_path, form, options, message):
    with pytest.raises(ValueError, match=message):
        export_adapter(made / "adapter", tmp_path / "out", form, **options)
    assert not (tmp_path / "out").exists()


def test_another_base_and_an_untrained_adapter(made, tmp_path):
    models.build("Qwen2", seed=1, dtype=load(made / "base").dtype).save_pretrained(tmp_path / "other")
    for form in ("lora", "flat", "sparse"):
        with pytest.raises(ValueError, match="was trained on"):
            export_adapter(made / "adapter", tmp_path / "out", form, base=tmp_path / "other")
    export_adapter(made / "adapter", tmp_path / "out", "lora", base=tmp_path / "other", allow_other_base=True)
    with pytest.warns(UserWarning, match="changes nothing"):
        get_peft_model(load(made / "base"), SingleLayerConfig(layer=1)).save_pretrained(tmp_path / "untrained")
    with pytest.raises(ValueError, match="no linear layer differs"):
        export_adapter(tmp_path / "untrained", tmp_path / "none", "lora", base=made / "base")
