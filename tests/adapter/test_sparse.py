"""The sparse adapter as a folder: every way to load it gives the trained model's bits, and a wrong base is refused."""

import json
import shutil
from itertools import product

import pytest
import torch
import transformers
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tuner.helpers import CASES, base_weights, logits, masters, move, same, train, wrap

from models import build, build_architecture
from peft_onelayer import SingleLayerConfig
from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.adapter.write_sparse import write_sparse
from peft_onelayer.records.files import CONFIG, WEIGHTS, TargetError
from peft_onelayer.sparse.digest import tensor_digest

BF16 = torch.bfloat16


def change_some(model, share: float = 0.1, adapter: str = "default") -> None:
    """Scale a share of the adapter's entries by 1.02, which no dtype rounds away."""
    generator = torch.Generator().manual_seed(3)
    for parameter in masters(model, adapter).values():
        parameter.data[torch.rand(parameter.shape, generator=generator) < share] *= 1.02


def effective(model, dtype: torch.dtype, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {name: p.detach().to(dtype) for name, p in masters(model, adapter).items()}


def edit(folder, change) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def published(tmp_path):
    """(folder of a sparse adapter, folder of its base, the trained model), in bfloat16."""
    build(dtype=BF16).save_pretrained(tmp_path / "base")
    model = wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), task_type="CAUSAL_LM")
    change_some(model)
    model.save_pretrained(tmp_path / "dense")
    write_sparse(tmp_path / "dense", tmp_path / "sparse", tmp_path / "base")
    return tmp_path / "sparse", tmp_path / "base", model


@pytest.mark.parametrize(
    ("family", "dtype", "share"),
    [
        *(pytest.param(*case.values, 0.1, id=case.id, marks=case.marks) for case in CASES),
        *(pytest.param(*case.values, 1.0, id=f"{case.id}-every-entry", marks=pytest.mark.more) for case in CASES[:3]),
    ],
)
def test_every_way_to_load_gives_the_same_bits(tmp_path, family, dtype, share):
    build(family, dtype=dtype).save_pretrained(tmp_path / "base")

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)

    model = wrap(base(), layer="mid-2", task_type="CAUSAL_LM")
    if share < 1:
        change_some(model, share)
    else:
        move(model)
    expected, tuned, folder = logits(model), effective(model, dtype), tmp_path / "sparse"
    model.save_pretrained(tmp_path / "dense")
    write_sparse(tmp_path / "dense", folder, base())

    def check(loaded, adapter="default"):
        assert {p.dtype for p in masters(loaded, adapter).values()} == {torch.float32}
        assert same(effective(loaded, dtype, adapter), tuned)
        assert torch.equal(logits(loaded), expected)

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
    assert torch.equal(logits(several.merge_and_unload(adapter_names=["second"])), expected)
    reader, weights = open_adapter(folder), base_weights(base())
    assert reader.encoding == "sparse" and set(reader.names) == set(tuned)
    assert same({name: reader.tensor(name, weights[name]) for name in reader.names}, tuned)


def test_a_mixture_of_experts_and_a_composite_block(tmp_path):
    model = wrap(build_architecture("mixtral", dtype=BF16))
    change_some(model)
    model.save_pretrained(tmp_path / "dense")
    write_sparse(tmp_path / "dense", tmp_path / "sparse", build_architecture("mixtral", dtype=BF16))
    loaded = PeftModel.from_pretrained(build_architecture("mixtral", dtype=BF16), tmp_path / "sparse")
    assert same(effective(loaded, BF16), effective(model, BF16))
    through_transformers = build_architecture("mixtral", dtype=BF16)
    through_transformers.load_adapter(tmp_path / "sparse")
    assert same(effective(through_transformers, BF16), effective(model, BF16))


def test_the_files(published):
    folder, base, model = published
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    config = json.loads((folder / CONFIG).read_text())
    dense = json.loads((folder.parent / "dense" / CONFIG).read_text())
    assert dense["encoding"] is None
    assert {**config, "encoding": None} == dense
    encoding = config["encoding"]
    assert encoding["format"] == "onelayer-sparse-1"
    assert encoding["base"]["name"] == str(base) and encoding["base"]["num_layers"] == 4
    plain = base_weights(AutoModelForCausalLM.from_pretrained(base))
    for name, tensor in effective(model, BF16).items():
        assert encoding["tensors"][name] == {
            "dtype": "bfloat16",
            "shape": list(tensor.shape),
            "changed": int((tensor != plain[name]).sum()),
            "base": tensor_digest(plain[name]),
            "result": tensor_digest(tensor),
        }
    stems = {key.rpartition(".")[0] for key in load_file(folder / WEIGHTS)}
    assert stems == set(load_file(folder.parent / "dense" / WEIGHTS))


def test_the_base_may_be_given_as_a_model_wrapped_or_not_or_a_folder(published, tmp_path):
    folder, base, model = published
    plain = AutoModelForCausalLM.from_pretrained(base)
    for i, given in enumerate([plain, model, str(base), wrap(AutoModelForCausalLM.from_pretrained(base), layer=1)]):
        write_sparse(folder, tmp_path / f"again{i}", given)
        for name in (CONFIG, WEIGHTS):
            assert (tmp_path / f"again{i}" / name).read_bytes() == (folder / name).read_bytes()
    model.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged into the base; call unmerge_adapter"):
        write_sparse(folder, tmp_path / "merged", model)
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.2"):
        write_sparse(folder, tmp_path / "shallow", build(num_layers=2, dtype=BF16))
    with pytest.raises(TargetError, match="holds other files"):
        write_sparse(folder, base, plain)
    assert not {"merged", "shallow"} & {path.name for path in tmp_path.iterdir()}


def other_weights(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] += 1
    return model


def other_commit(base):
    model = other_weights(base)
    model.config._commit_hash, model.config._name_or_path = "0123abc", "somebody/other"
    return model


WRONG = {
    "weights": (other_weights, r"its model\.layers\.2\.mlp\.up_proj\.weight holds other weights"),
    "name": (other_commit, r"other weights; name .*base there and somebody/other here\."),
    "config": (lambda base: build(dtype=BF16, rope_theta=3.0, seed=1), r"configuration \w+ there and \w+ here"),
    "float32": (
        lambda base: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        r"is float32 and was bfloat16 in training; load it with dtype='bfloat16'",
    ),
    "float16": (
        lambda base: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16),
        r"is float16 and was bfloat16 in training",
    ),
    "shape": (lambda base: build(dtype=BF16, intermediate_size=64), r"mlp\.\w+\.weight has shape \[\d+, \d+\], not"),
    "depth": (lambda base: build(dtype=BF16, num_layers=6), "made for a model of 4 blocks and this one has 6"),
    "family": (lambda base: build("Llama", dtype=BF16), r"differ in 2 tensor\(s\), for example .*k_norm"),
}
ENTRANCES = {
    "from_pretrained": lambda base, folder: PeftModel.from_pretrained(base, folder),
    "load_adapter": lambda base, folder: wrap(base, layer=0).load_adapter(folder, "second"),
    "transformers": lambda base, folder: base.load_adapter(folder),
}


def refusals():
    """By default every difference by one way to load, and every way with one difference."""
    for wrong, entrance in product(WRONG, ENTRANCES):
        marks = [] if entrance == "from_pretrained" or wrong == "weights" else [pytest.mark.more]
        yield pytest.param(wrong, entrance, id=f"{wrong}-{entrance}", marks=marks)


@pytest.mark.parametrize(("wrong", "entrance"), list(refusals()))
def test_another_base_is_refused_by_name_of_what_differs(published, wrong, entrance):
    folder, base, _ = published
    make, match = WRONG[wrong]
    model = make(base)
    before = base_weights(model)
    with pytest.raises(ValueError, match=match) as error:
        ENTRANCES[entrance](model, folder)
    assert "\n" not in str(error.value)
    assert same(base_weights(model), before)


def test_a_quantized_base_is_named_as_such(published):
    quantization = pytest.importorskip("torchao.quantization")
    folder, base, _ = published
    model = AutoModelForCausalLM.from_pretrained(base)
    quantization.quantize_(model.model.layers[2], quantization.Int8WeightOnlyConfig(version=2))
    with pytest.raises(ValueError, match=r"not the base that .*: it is quantized \(Int8Tensor"):
        PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("wrong", ["weights", "float32", "float16"])
def test_allow_other_base_applies_the_change_all_the_same(published, wrong):
    folder, base, model = published
    other = WRONG[wrong][0](base)
    weights = base_weights(other)
    loaded = PeftModel.from_pretrained(other, folder, allow_other_base=True)
    for name, tuned in effective(model, BF16).items():
        ours, trained_on = masters(loaded)[name], base_weights(model)[name]
        untouched = tuned == trained_on
        assert torch.equal(ours[untouched], weights[name].to(BF16).float()[untouched])
        if wrong == "float32":  # the same base, widened: the trained values
            assert torch.equal(ours, tuned.float())
    with pytest.raises(ValueError, match="has shape"):
        PeftModel.from_pretrained(build(dtype=BF16, intermediate_size=64), folder, allow_other_base=True)


def test_another_base_can_be_allowed_where_the_library_reads_the_configuration(published):
    folder, base, _ = published
    expected = effective(PeftModel.from_pretrained(other_weights(base), folder, allow_other_base=True), BF16)
    second = wrap(other_weights(base), layer=0)
    second.add_adapter("b", SingleLayerConfig.from_pretrained(folder, allow_other_base=True))
    second.load_adapter(folder, "b")
    assert same(effective(second, BF16, "b"), expected)
    through_transformers = other_weights(base)
    config = SingleLayerConfig.from_pretrained(folder, allow_other_base=True)
    through_transformers.load_adapter(folder, peft_config=config)
    assert same(effective(through_transformers, BF16), expected)


def test_a_sparse_file_is_not_taken_for_a_dense_one(published):
    folder, base, _ = published
    edit(folder, lambda config: config.pop("encoding"))
    with pytest.raises(ValueError, match=r"which adapter_config\.json does not record"):
        open_adapter(folder)
    for entrance in ENTRANCES.values():
        with pytest.raises(ValueError, match="the file is sparse"):
            entrance(AutoModelForCausalLM.from_pretrained(base), folder)


def test_a_file_cannot_allow_another_base(published):
    folder, base, _ = published
    edit(folder, lambda config: config.update(allow_other_base=True, _allow_other_base=True))
    for entrance in ENTRANCES.values():
        with pytest.warns(UserWarning, match="allow_other_base"), pytest.raises(ValueError, match="other weights"):
            entrance(other_weights(base), folder)


def test_what_is_loaded_from_sparse_saves_dense_and_trains_on(published, tmp_path):
    folder, base, model = published
    expected = logits(model)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["encoding"] is None
    assert set(load_file(tmp_path / "again" / WEIGHTS)) == set(load_file(folder.parent / "dense" / WEIGHTS))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again")
    assert torch.equal(logits(again), expected)
    train(loaded)
    trained = {name: p.detach().clone() for name, p in masters(loaded).items()}
    loaded.save_pretrained(tmp_path / "checkpoint")
    resumed = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True)
    resumed.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)  # as transformers' Trainer resumes
    assert same({name: p.detach() for name, p in masters(resumed).items()}, trained)
    resumed.load_adapter(folder, "default")
    assert torch.equal(logits(resumed.eval()), expected)
    through_transformers = AutoModelForCausalLM.from_pretrained(folder)
    through_transformers.save_pretrained(tmp_path / "from_transformers")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "from_transformers")), expected)


def test_a_sparse_adapter_can_be_weighted(published):
    folder, base, model = published
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    loaded.add_weighted_adapter(["default"], [1.0], "copy")
    loaded.set_adapter("copy")
    assert torch.equal(logits(loaded), logits(model)) and loaded.peft_config["copy"].encoding is None


def test_a_sparse_file_needs_its_own_configuration(published):
    folder, base, _ = published
    other = wrap(AutoModelForCausalLM.from_pretrained(base))
    with pytest.raises(
        ValueError, match="the file is sparse, and the configuration of the adapter 'default' says nothing of it"
    ):
        other.load_adapter(folder, "default")


def test_a_configuration_read_from_a_sparse_adapter_starts_a_new_one(published, tmp_path):
    folder, base, _ = published
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), PeftConfig.from_pretrained(folder))
    move(model)
    model.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / CONFIG).read_text())["encoding"] is None
    second = AutoModelForCausalLM.from_pretrained(base)
    second.add_adapter(PeftConfig.from_pretrained(folder), "one")
    second.load_adapter(tmp_path / "new", "two")  # dense, after a sparse configuration was injected
    assert torch.equal(logits(second), logits(model))


def test_trained_heads_stay_as_they_are(tmp_path):
    model = wrap(build(dtype=BF16), modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    head.data += 1
    change_some(model)
    model.save_pretrained(tmp_path / "dense")
    encoding = write_sparse(tmp_path / "dense", tmp_path / "sparse", build(dtype=BF16))
    assert not any("lm_head" in name for name in encoding.tensors)
    loaded = PeftModel.from_pretrained(build(dtype=BF16), tmp_path / "sparse")
    assert torch.equal(logits(loaded), logits(model))
    if Version(transformers.__version__) >= Version("5.18.0.dev0"):  # its own load_adapter left heads out before
        through_transformers = build(dtype=BF16)
        through_transformers.load_adapter(tmp_path / "sparse")
        assert torch.equal(logits(through_transformers), logits(model))
    reader = open_adapter(tmp_path / "sparse")
    assert torch.equal(reader.tensor("lm_head.weight"), head)


def test_a_value_that_overflows_the_base_dtype_is_refused(tmp_path):
    model = wrap(build(dtype=torch.float16))
    masters(model)["model.layers.2.mlp.up_proj.weight"].data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight holds NaN or Inf"):
        write_sparse(tmp_path / "dense", tmp_path / "sparse", build(dtype=torch.float16))
    assert not (tmp_path / "sparse").exists()


def test_records_and_profiles_go_along_but_no_links(published, tmp_path):
    folder, base, _ = published
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "run" / "layer_profile.json").symlink_to(tmp_path / "secret")
    write_sparse(tmp_path / "run", tmp_path / "out", base)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS, "README.md", "run.json"}


def test_the_reader_gives_a_dense_adapter_in_the_base_dtype(published):
    folder, base, model = published
    dense, weights = open_adapter(folder.parent / "dense"), base_weights(AutoModelForCausalLM.from_pretrained(base))
    assert dense.encoding == "dense" and dense.layers == [2]
    assert same({name: dense.tensor(name, weights[name]) for name in dense.names}, effective(model, BF16))
    sparse = open_adapter(folder)
    with pytest.raises(ValueError, match="its values need the base model"):
        sparse.tensor(sparse.names[0])


def test_the_hub_cache_may_link_to_its_blobs_and_nobody_elsewhere(published, tmp_path):
    folder, _, _ = published
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(folder / name, blobs / f"blob-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    assert open_adapter(snapshot).encoding == "sparse"
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(folder / WEIGHTS)
    with pytest.raises(ValueError, match="is not a plain file of its folder"):
        open_adapter(snapshot)


DAMAGED = {
    "format": (
        lambda e: e.update(format="onelayer-sparse-9"),
        "encoding is 'onelayer-sparse-9' and this version reads",
    ),
    "no_tensors": (lambda e: e.update(tensors={}), "lacks its base or its tensors"),
    "fewer_tensors": (lambda e: e["tensors"].popitem(), r"differ in 1 tensor\(s\)"),
    "count": (lambda e: first(e).update(changed=first(e)["changed"] + 1), "is damaged: it does not decode"),
    "result": (lambda e: first(e).update(result="0" * 64), "is damaged: it does not decode"),
    "base": (lambda e: first(e).update(base="0" * 64), "holds other weights"),
    "dtype": (lambda e: first(e).update(dtype="float16"), "is bfloat16 and was float16 in training"),
    "digest": (lambda e: first(e).update(base=7), "says no dtype, shape, count of changes and digests"),
    "shape": (lambda e: first(e).update(shape=[100]), r"has shape \[32\], not \[100\]"),
}


def first(encoding):
    return encoding["tensors"][min(encoding["tensors"])]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_record_is_refused(published, damage):
    folder, base, _ = published
    change, match = DAMAGED[damage]
    edit(folder, lambda config: change(config["encoding"]))
    with pytest.raises(ValueError, match=match) as error:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert "\n" not in str(error.value)


def test_a_changed_value_is_found_by_the_digest(published):
    folder, base, _ = published
    state = load_file(folder / WEIGHTS)
    key = next(key for key, tensor in state.items() if key.endswith(".values") and tensor.numel())
    state[key][0] += 1
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is damaged: it does not decode to the tensor that was published"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def test_the_method_is_what_its_configuration_says():
    assert SingleLayerConfig(layer=1, encoding={"format": "x"}).to_dict()["encoding"] is None
