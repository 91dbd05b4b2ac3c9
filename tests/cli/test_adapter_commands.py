"""`onelayer inspect`, `merge` and `export`: what they print is what the library does, and every mistake is one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import models
from peft_onelayer import SingleLayerConfig, inspect_adapter
from peft_onelayer.records.files import RUN, WEIGHTS
from peft_onelayer.records.run import RunRecord

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_RUN = Path(__file__).parents[1] / "records" / "old" / "train" / "run.json"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def save_adapter(folder, base, layer, share=0.1):
    model = get_peft_model(load(base), SingleLayerConfig(layer=layer, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter) * (torch.rand_like(parameter) < share)
    model.save_pretrained(folder)
    run = RunRecord.from_file(OLD_RUN)
    (folder / RUN).write_text(replace(run, command="\x1b[31mred", settings=replace(run.settings, seed=7)).to_json())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A sharded base and another one of the same shapes, and adapters of layers 1 and 3 of the first."""
    root = tmp_path_factory.mktemp("files")
    for name, seed in (("base", 0), ("other", 1)):
        models.build("Qwen2", dtype=torch.bfloat16, seed=seed).save_pretrained(root / name, max_shard_size="12KB")
    (root / "base" / "tokenizer.json").write_text("{}")
    save_adapter(root / "one", root / "base", 1)
    save_adapter(root / "three", root / "base", 3)
    return root


def merged_by_peft(files, *names):
    model = PeftModel.from_pretrained(load(files / "base"), files / names[0], adapter_name="0")
    for i, name in enumerate(names[1:], 1):
        model.load_adapter(files / name, str(i))
    return weights_of(model.merge_and_unload(adapter_names=[str(i) for i in range(len(names))]))


def test_inspect_tells_what_it_can_of_an_export_for_plain_peft(onelayer, files, tmp_path):
    assert onelayer("export", files / "one", tmp_path / "plain", "--format", "peft")[0] == 0
    code, lines, out = onelayer("inspect", tmp_path / "plain")
    size = (tmp_path / "plain" / WEIGHTS).stat().st_size
    assert (code, lines) == (0, [])
    assert "block 1, model.layers.1.*" in " ".join(out.split()) and "mlp.down_proj.weight" in out and "32 x 48" in out
    assert out.endswith(f"PEFT's LN_TUNING, {size:,} bytes\nbase: {files / 'base'}\n")
    own, export = inspect_adapter(files / "one"), inspect_adapter(tmp_path / "plain")
    assert [(t.name, t.shape) for t in export.tensors] == [(t.name, t.shape) for t in own.tensors]
    assert (export.layers, export.num_layers, export.base["name"]) == (own.layers, None, own.base["name"])
    code, lines, _ = onelayer("inspect", tmp_path / "plain", "--base", files / "base")
    assert code == 1 and "no single-layer adapter: its peft_type is 'LN_TUNING'" in lines[-1]


def test_inspect_without_and_with_the_base(onelayer, files):
    code, lines, out = onelayer("inspect", files / "one")
    assert (code, lines) == (0, [])
    assert (
        "block 1 of 4, model.layers.1.*" in " ".join(out.split()) and "mlp.down_proj.weight" in out and "32 x 48" in out
    )
    assert "? │" not in out and "density" not in out and "how much changed: onelayer inspect" in out
    assert "algorithm: grpo\n" in out and "task: arithmetic\n" in out and "seed: 7\n" in out
    assert f"base: {files / 'base'}\n" in out
    assert "\x1b" not in out  # nothing of a stranger's file steers the terminal

    code, lines, out = onelayer("inspect", files / "one", "--base", files / "base", "--json")
    assert (code, lines) == (0, [])
    found = json.loads(out)
    assert found == json.loads(json.dumps(inspect_adapter(files / "one", files / "base").to_json()))
    want, base = merged_by_peft(files, "one"), weights_of(load(files / "base"))
    assert [tensor["name"] for tensor in found["tensors"]] == [n for n in sorted(base) if ".layers.1." in n]
    changed = squares = entries = 0
    for tensor in found["tensors"]:
        new, old = want[tensor["name"]].double(), base[tensor["name"]].double()
        assert tensor["changed"] == int((new != old).sum()) and tensor["density"] == tensor["changed"] / new.numel()
        assert tensor["change"] == pytest.approx(float((new - old).norm()), rel=1e-12)
        assert tensor["relative"] == pytest.approx(tensor["change"] / float(old.norm()), rel=1e-12)
        assert (tensor["encoding"], tensor["dtype"], tensor["bytes"]) == ("dense", "float32", 4 * new.numel())
        changed, entries, squares = changed + tensor["changed"], entries + new.numel(), squares + tensor["change"] ** 2
    assert found["density"] == changed / entries and found["change"] == pytest.approx(squares**0.5)
    assert found["layers"] == [1] and found["num_layers"] == 4
    assert found["bytes"] == (files / "one" / WEIGHTS).stat().st_size


def test_inspect_a_sparse_adapter(onelayer, files, tmp_path):
    assert onelayer("export", files / "one", tmp_path / "sparse", "--format", "sparse")[0] == 0
    dense = json.loads(onelayer("inspect", files / "one", "--base", files / "base", "--json")[2])
    found = json.loads(onelayer("inspect", tmp_path / "sparse", "--json")[2])
    assert found["encoding"] == "sparse" and found["density"] == dense["density"]  # recorded: no base is needed
    assert [t["changed"] for t in found["tensors"]] == [t["changed"] for t in dense["tensors"]]
    assert found["change"] is None and {t["change"] for t in found["tensors"]} == {None}
    assert all(len(t["base_digest"]) == 64 for t in found["tensors"]) and len(found["base"]["config"]) == 64
    assert sum(t["bytes"] for t in found["tensors"]) == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "sparse" / WEIGHTS).values()
    )
    measured = json.loads(onelayer("inspect", tmp_path / "sparse", "--base", files / "base", "--json")[2])
    assert measured["change"] == dense["change"]


def test_merge_two_adapters(onelayer, files, tmp_path):
    adapters = (files / "one", files / "three")
    code, lines, out = onelayer("merge", files / "base", *adapters, tmp_path / "out")
    assert code == 0 and lines == [f"merging into {tmp_path / 'out'} ..."]
    assert f"blocks 1, 3 of {files / 'base'} replaced" in out
    assert same(weights_of(load(tmp_path / "out")), merged_by_peft(files, "one", "three"))
    names = {p.name for p in (files / "base").iterdir()}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names | {"README.md"}
    report = json.loads(onelayer("merge", files / "base", files / "one", tmp_path / "again", "--json")[2])
    assert (report["format"], report["layers"]) == ("onelayer-merge-1", [1])
    assert report["folder"] == str(tmp_path / "again")
    assert report["bytes"] == sum(p.stat().st_size for p in (tmp_path / "again").iterdir())


def test_names_on_the_hub(onelayer, files, tmp_path, monkeypatch):
    """Ids stand for what is in the Hub's cache, whose files are links; the loopback Hub's tests download them."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    for name in ("base", "one"):
        repo = tmp_path / "cache" / f"models--org--{name}"
        shutil.copytree(files / name, repo / "blobs")
        (repo / "snapshots" / COMMIT).mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT)
        if name == "one":
            edit(repo / "blobs" / "adapter_config.json", base_model_name_or_path="org/base", revision=COMMIT)
        for path in (repo / "blobs").iterdir():
            (repo / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{path.name}")
    code, lines, _ = onelayer("merge", "org/base", "org/one", tmp_path / "out")
    assert code == 0, lines
    assert same(weights_of(load(tmp_path / "out")), merged_by_peft(files, "one"))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    # the base is not even looked for
    shutil.rmtree(tmp_path / "cache" / "models--org--base")
    code, lines, out = onelayer("inspect", "org/one")
    assert (code, lines) == (0, []) and f"base: org/base at {COMMIT}" in out
    code, lines, out = onelayer("merge", "org/base", "org/one", tmp_path / "none")
    assert (code, len(lines), out) == (1, 1, "") and "org/base is neither a model folder here nor found" in lines[0]


@pytest.mark.parametrize("form", ["peft", "dense", "sparse"])
def test_exports_that_load_to_the_same_bits(onelayer, files, tmp_path, form):
    out = tmp_path / form
    report = json.loads(onelayer("export", files / "one", out, "--format", form, "--json")[2])
    assert (report["format"], report["encoding"]) == ("onelayer-export-1", form)
    assert report["bytes"] == (out / WEIGHTS).stat().st_size
    model = PeftModel.from_pretrained(load(files / "base"), out)
    assert same(weights_of(model.merge_and_unload()), merged_by_peft(files, "one"))


def test_export_sparse_of_a_sparse_adapter_on_another_base(onelayer, files, tmp_path):
    """What --allow-other-base promises: the changes put into the other base, and an adapter of that one."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert onelayer("export", files / "one", first, "--format", "sparse")[0] == 0
    on_other = ("export", first, second, "--format", "sparse", "--base", files / "other")
    code, lines, out = onelayer(*on_other)
    assert (code, len(lines), out) == (1, 1, "") and "--allow-other-base" in lines[0] and not second.exists()
    code, lines, _ = onelayer(*on_other, "--allow-other-base")
    assert (code, lines) == (0, [])
    found = json.loads(onelayer("inspect", second, "--json")[2])
    assert (found["base"]["name"], found["encoding"]) == (str(files / "other"), "sparse")
    merged = PeftModel.from_pretrained(load(files / "other"), second).merge_and_unload()
    allowed = PeftModel.from_pretrained(load(files / "other"), first, allow_other_base=True).merge_and_unload()
    assert same(weights_of(merged), weights_of(allowed))
    assert not same(weights_of(merged), weights_of(load(files / "other")))


@pytest.mark.parametrize("form", ["sparse", "peft", "dense", "lora"])
def test_an_export_for_another_base_names_that_base(onelayer, files, tmp_path, form):
    out, other = tmp_path / form, files / "other"
    options = ["--base", other, "--allow-other-base"]
    code, lines, _ = onelayer("export", files / "one", out, "--format", form, *options)
    assert code == 0, lines
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(other), None)
    PeftModel.from_pretrained(load(other), out)


def test_export_flat(onelayer, files, tmp_path):
    code, lines, out = onelayer("export", files / "one", tmp_path / "flat", "--format", "flat")
    assert (code, lines) == (0, []) and "flat, " in out
    weights = weights_of(load(files / "base"))
    tensors = load_file(tmp_path / "flat" / "sparse_weights.safetensors")
    for key in tensors:
        if key.endswith(".indices"):
            name = key.removesuffix(".indices")
            weights[name].view(-1)[tensors[key].long()] = tensors[f"{name}.values"]
    assert same(weights, merged_by_peft(files, "one"))


def test_export_lora_says_what_is_lost(onelayer, files, tmp_path):
    code, lines, out = onelayer("export", files / "one", tmp_path / "lora", "--format", "lora", "--rank", "4")
    assert code == 0 and len(lines) == 1 and lines[0].startswith("LoRA has no place for norms and biases: ")
    assert "left out" in out and "input_layernorm.weight" in out and "All in all 0." in out
    assert f"{tmp_path / 'lora'}: lora, {(tmp_path / 'lora' / WEIGHTS).stat().st_size:,} bytes" in out
    report = onelayer("export", files / "one", tmp_path / "half", "--format", "lora", "--energy", "0.5", "--json")[2]
    kept = [t for t in json.loads(report)["tensors"] if t["rank"]]
    assert len(kept) == 7 and all(0 < t["error"] <= 0.5**0.5 + 1e-6 for t in kept)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["merge"], 2, "Missing argument"),
        (["merge", "{base}", "{one}"], 2, "Missing argument"),
        (["merge", "{base}", "{one}", "{out}", "--alow-other-base"], 2, "No such option"),
        (["merge", "{base}", "{one}", "{base}"], 1, "exists and holds other files"),
        (["merge", "{base}", "{one}", "{one}"], 1, "exists and holds other files"),
        (["merge", "{base}", "{one}", "{base}/out"], 1, "is inside"),
        (["merge", "{base}", "{one}", "{one}/out"], 1, "is inside"),
        (["merge", "{base}", "{one}", "{one}/README.md/out"], 1, "is inside|is not a folder"),
        (["merge", "{base}", "{one}", "{one}", "{out}"], 1, "both train model.layers.1."),
        (["merge", "{other}", "{one}", "{out}"], 1, "--allow-other-base"),
        (["merge", "{one}", "{base}", "{out}"], 1, "a model; the base comes first: {base} {one} {out}"),
        (["merge", "{pickled}", "{one}", "{out}"], 1, "pickled weights"),
        (["merge", "./nowhere", "{one}", "{out}"], 1, "no model folder at nowhere"),
        (["merge", "{base}", "./nowhere", "{out}"], 1, "no adapter folder at nowhere"),
        (["merge", "{base}", "{truncated}", "{out}"], 1, "damaged"),
        (["inspect"], 2, "Missing argument"),
        (["inspect", "./nowhere"], 1, "no adapter folder at nowhere"),
        (["inspect", "{base}"], 1, "adapter_config.json"),
        (["inspect", "{truncated}"], 1, "damaged"),
        (["inspect", "{lora}", "--base", "{base}"], 1, "its peft_type is 'LORA'"),
        (["merge", "{base}", "{lora}", "{out}"], 1, "its peft_type is 'LORA'"),
        (["inspect", "{one}", "--base", "{other}"], 1, "--allow-other-base"),
        (["inspect", "{one}", "--base", "{one}"], 1, "is an adapter and not a base model"),
        (["export", "{one}", "{out}"], 2, "--format"),
        (["export", "{one}", "{out}", "--format", "gguf"], 2, "gguf"),
        (["export", "{one}", "{out}", "--format", "lora", "--rank", "0"], 2, "--rank"),
        (["export", "{one}", "{out}", "--format", "lora", "--energy", "2"], 2, "--energy"),
        (["export", "{one}", "{out}", "--format", "lora", "--energy", "0"], 1, "above 0 and up to 1"),
        (["export", "{one}", "{out}", "--format", "lora", "--rank", "1", "--energy", "1"], 1, "exclude each other"),
        (["export", "{one}", "{out}", "--format", "peft", "--rank", "4"], 1, "are those of the format lora"),
        (["export", "{one}", "{one}", "--format", "peft"], 1, "exists and holds other files"),
        (["export", "{one}", "{out}", "--format", "flat", "--base", "{other}"], 1, "--allow-other-base"),
        (["export", "{truncated}", "{out}", "--format", "dense"], 1, "damaged"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use(onelayer, files, tmp_path, arguments, code, message):
    shutil.copytree(files / "one", tmp_path / "truncated")
    (tmp_path / "truncated" / WEIGHTS).write_bytes((files / "one" / WEIGHTS).read_bytes()[:1000])
    shutil.copytree(files / "one", tmp_path / "lora")
    edit(tmp_path / "lora" / "adapter_config.json", peft_type="LORA")
    (tmp_path / "pickled").mkdir()
    shutil.copy(files / "base" / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    before = sorted(files.rglob("*")) + sorted(tmp_path.rglob("*"))
    places = {name: files / name for name in ("base", "other", "one")}
    places |= {name: tmp_path / name for name in ("truncated", "lora", "pickled", "out")} | {"root": tmp_path}
    ended, lines, out = onelayer(*(argument.format(**places) for argument in arguments))
    assert (ended, out) == (code, ""), lines
    assert len(lines) == 1 and lines[0].startswith("onelayer"), lines
    assert any(part.format(**places).lower() in lines[0].lower() for part in message.split("|")), lines
    assert sorted(files.rglob("*")) + sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "options", "needed"),
    [
        *(
            (["combine", "a", "b", "out", "--method", "cpi"], options, "--stage-four")
            for options in (["--steps", "20"], ["--learning-rate", "auto"], ["--chat"], ["--plain"])
        ),
        *(
            (["combine", "a", "b", "out"], options, "--method cpi")
            for options in (["--core", ".1"], ["--overlap", ".2"])
        ),
        (["combine", "a", "b", "out", "--method", "ties"], ["--seed", "0"], "--method dare and --stage-four"),
        (["combine", "a", "b", "out", "--method", "cpi"], ["--seed", "0"], "--method dare and --stage-four"),
        (
            ["combine", "a", "b", "out", "--method", "cpi", "--stage-four", "sort"],
            ["--density", ".2"],
            "--method ties and dare",
        ),
        (["eval", "base", "--task", "sort"], ["--allow-other-base"], "--adapter"),
        (["inspect", "a"], ["--allow-other-base"], "--base"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_without_effect_is_refused(onelayer, command, options, needed):
    code, lines, out = onelayer(*command, *options)
    assert (code, len(lines), out) == (1, 1, "")
    assert f"{options[0]} is of {needed}; give " in lines[0] and lines[0].endswith(", or leave it out"), lines


def test_options_that_have_an_effect_are_taken(onelayer, tmp_path):
    folders = tmp_path / "a", tmp_path / "b", tmp_path / "out"
    for method, options in (
        ("dare", ["--seed", "1"]),
        ("cpi", ["--core", ".1", "--overlap", ".2"]),
        ("cpi", ["--stage-four", "sort", "--seed", "1", "--steps", "2", "--learning-rate", "1e-4", "--plain"]),
    ):
        code, lines, _ = onelayer("combine", *folders, "--method", method, *options)
        assert code == 1 and "leave it out" not in lines[-1], lines
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    code, lines, _ = onelayer("eval", tmp_path / "adapter", "--task", "sort", "--allow-other-base")
    assert code == 1 and "leave it out" not in lines[-1], lines
