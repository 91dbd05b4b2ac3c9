"""`onelayer analyze` and `compare`: what they print is what the library measured, and every mistake is one line."""

import json

import pytest
import torch
from changes import save_adapter
from safetensors.torch import load_file, save_file

import models
from peft_onelayer import analyze_change, compare_adapters, compare_profiles, export_adapter, make_mask


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A bfloat16 base, adapters of it with a norm that did not move, and checkpoints of many blocks."""
    root = tmp_path_factory.mktemp("files")
    models.build(dtype=torch.bfloat16).save_pretrained(root / "base")
    for name, seed in (("one", 0), ("two", 1)):
        save_adapter(root / name, root / "base", 1, seed=seed, size=0.03, still=["input_layernorm"])
    save_adapter(root / "three", root / "base", 3, size=1e-5)
    export_adapter(root / "two", root / "sparse", "sparse")
    deep = models.build(dtype=torch.bfloat16, num_layers=8)
    deep.save_pretrained(root / "deep")
    for name, parameter in deep.named_parameters():
        if ".layers.6.mlp" in name:
            parameter.data *= 2
    deep.save_pretrained(root / "tuned")
    return root


def as_json(found):
    return json.loads(json.dumps(found.to_json()))


def test_an_adapter(onelayer, files):
    code, lines, out = onelayer("analyze", files / "base", files / "one")
    assert (code, lines) == (0, ["measuring ..."])
    found = analyze_change(files / "base", files / "one")
    assert f"{files / 'base'} to {files / 'one'}: model.layers.1.*" in out
    assert all(len(line) <= 100 for line in out.splitlines() if line[:1] in "┏┃│")
    still, *_ = [line for line in out.splitlines() if " input_layernorm.weight " in line and "│" in line]
    assert "NOTHING" in still
    moved = " ".join(line for line in out.splitlines() if "down_proj" in line)  # of the tables that a wide one becomes
    tensor = next(t for t in found.tensors if "down_proj" in t.name)
    assert f"{tensor.changed / tensor.entries:.2%}" in moved and f"{tensor.rank} of 32" in moved
    assert f"{tensor.unchanged_official['1e-05']:.2%}" in moved  # the masters are wider, so the definitions differ
    assert "the base's weights are bfloat16, the adapter's stored values float32" in out
    assert "1 of 11 tensors NEVER MOVED: input_layernorm.weight\n" in out
    code, lines, out = onelayer("analyze", files / "base", files / "one", "--json")
    assert (code, json.loads(out)) == (0, as_json(found))


def test_a_sparse_adapter_and_several(onelayer, files):
    code, _, out = onelayer("analyze", files / "base", files / "sparse", "--json", "--no-spectrum")
    assert (code, json.loads(out)) == (0, as_json(analyze_change(files / "base", files / "sparse", spectrum=False)))
    code, _, out = onelayer("analyze", files / "base", files / "one", files / "three")
    assert code == 0 and all(f"{layer}.mlp.up_proj.weight" in out for layer in (1, 3))
    code, _, out = onelayer("analyze", files / "base", files / "three")
    assert code == 0 and "note: a bfloat16 merge would lose" in out


def test_a_checkpoint_of_many_tensors_is_shown_by_block_and_kind(onelayer, files):
    code, _, out = onelayer("analyze", files / "deep", files / "tuned")
    out = " ".join(out.split())  # a title with long paths takes several lines
    assert code == 0 and "blocks, 7 of 8 equal the base's" in out and "kinds of tensors, " in out
    assert "model.layers.6 " in out and "model.layers.5 " not in out and "model.layers.*.mlp.up_proj.weight" in out
    assert "NEVER MOVED" in out and "7 of 8 blocks did not change at all" in out


@pytest.mark.more
def test_a_plot(onelayer, files, tmp_path):
    for name, pair in (("one.png", ("base", "one")), ("all.svg", ("deep", "tuned"))):
        code, lines, _ = onelayer("analyze", *(files / part for part in pair), "--plot", tmp_path / name)
        assert code == 0 and lines[-1] == f"drawn to {tmp_path / name}"
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    code, lines, out = onelayer("analyze", files / "base", files / "one", "--plot", tmp_path / "x.txt")
    assert (code, out, len(lines)) == (1, "", 1) and "is no image" in lines[0]
    (tmp_path / "folder.png").mkdir()
    code, lines, out = onelayer("analyze", files / "base", files / "one", "--plot", tmp_path / "folder.png")
    assert (code, out, len(lines)) == (1, "", 1) and "is a folder" in lines[0]


def test_runs(onelayer, files):
    code, lines, out = onelayer("compare", files / "one", files / "two")
    assert (code, lines) == (0, ["comparing ..."])
    found = compare_adapters([files / "one", files / "two"])
    (pair,) = found.pairs
    assert f"{pair.overlap_a:.2%}" in out and f"{pair.chance_a:.2%}" in out and f"Jaccard {pair.jaccard:.3f}" in out
    assert f"correlation of the changes {pair.correlation:.3f}" in out
    code, _, out = onelayer("compare", files / "one", files / "two", "--base", files / "base", "--json")
    assert code == 0 and json.loads(out)["pairs"] == as_json(found)["pairs"]
    code, _, out = onelayer("compare", files / "one", files / "three")
    assert code == 0 and "NO TENSOR IN COMMON (11 and 11 tensors)" in out


def test_profiles(onelayer, tmp_path):
    names = ["Qwen/Qwen3-1.7B-Base", "Qwen/Qwen2.5-1.5B-Instruct"]
    code, lines, out = onelayer("compare", "--profiles", *names)
    found = compare_profiles(names)
    assert (code, lines) == (0, []) and f"{found.pairs[0].spearman:.3f}" in out
    code, _, out = onelayer("compare", "--profiles", *names, "--json")
    assert code == 0 and json.loads(out) == as_json(found)
    from peft_onelayer import load_profile

    for i in range(2):
        (tmp_path / f"{i}.json").write_text(load_profile(names[0]).to_json())
    code, _, out = onelayer("compare", tmp_path / "0.json", tmp_path / "1.json", "--json")
    assert code == 0 and json.loads(out)["pairs"][0]["spearman"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["analyze", "{root}/base"], 2, "Missing argument"),
        (["analyze", "{root}/nowhere", "{root}/one"], 1, "no model folder at"),
        (["analyze", "{root}/base", "{root}/nowhere"], 1, "no folder at"),
        (["analyze", "{root}/one", "{root}/base"], 1, "a model; the base comes first: onelayer analyze"),
        (["analyze", "{root}/base", "{root}/deep", "{root}/one"], 1, "one checkpoint alone"),
        (["analyze", "{root}/deep", "{root}/one"], 1, "was made for a model of 4 blocks"),
        (["analyze", "{root}/base", "{root}/cut"], 1, "damaged"),
        (["analyze", "{root}/base", "{root}/nan"], 1, "holds NaN or Inf"),
        (["compare", "{root}/one"], 1, "takes two or more, and 1 was given"),
        (["compare", "{root}/one", "{root}/base"], 1, "give the base"),
        (["compare", "{root}/one", "{root}/one/adapter_config.json"], 1, "is a file and"),
        (["compare", "{root}/one/adapter_config.json", "{root}/two/adapter_config.json"], 1, "holds no layer profile"),
        (["compare", "--profiles", "{root}/one", "{root}/two", "--base", "{root}/base"], 1, "have no base"),
        (["compare", "--profiles", "{root}/one", "{root}/two"], 1, "no layer profile"),
    ],
    ids=lambda value: " ".join(value).replace("{root}/", "") if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(onelayer, files, arguments, code, message):
    if not (files / "nan").exists():
        for name in ("cut", "nan"):
            (files / name).mkdir()
            (files / name / "adapter_config.json").write_bytes((files / "one" / "adapter_config.json").read_bytes())
        weights = "adapter_model.safetensors"
        (files / "cut" / weights).write_bytes((files / "one" / weights).read_bytes()[:-5])
        tensors = load_file(files / "one" / weights)
        next(iter(tensors.values())).view(-1)[3] = float("inf")
        save_file(tensors, files / "nan" / weights)
    ended, lines, out = onelayer(*(argument.format(root=files) for argument in arguments))
    assert (ended, out) == (code, "") and message in lines[-1], lines
    assert lines[-1].startswith("onelayer") and len(lines) <= 2
    assert len(lines) == 1 or lines[0] in ("measuring ...", "comparing ...")


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        *(
            (
                ["analyze", "base", "full", "--transplant", "sort"],
                options,
                "{} is of a comparison of the tensors, and --transplant measures none; leave it out",
            )
            for options in (
                ["--no-spectrum"],
                ["--spectrum"],
                ["--plot", "a.png"],
                ["--mask-out", "m.safetensors"],
                ["--share", ".1"],
                ["--random", ".1"],
                ["--seed", "0"],
                ["--allow-other-base"],
            )
        ),
        *(
            (["analyze", "base", "run"], options, "{} is of --transplant; give that too, or leave it out")
            for options in (
                ["--problems", "256"],
                ["--samples", "4"],
                ["--chat"],
                ["--plain"],
                ["--system", "x"],
                ["--shots", "0"],
                ["--sampling", "top_p=.9"],
            )
        ),
        *(
            (["analyze", "base", "run"], options, "{} is of --mask-out; give that too, or leave it out")
            for options in (["--share", ".1"], ["--random", ".1"], ["--random", ".1", "--seed", "1"])
        ),
        (
            ["analyze", "base", "run", "--mask-out", "m.safetensors", "--share", ".1"],
            ["--seed", "1"],
            "{} is of --random; give that too, or leave it out",
        ),
        (["analyze", "base", "run"], ["--seed", "0"], "{} is of --random; give that too, or leave it out"),
        *(
            (
                ["compare", "--profiles", "a", "b"],
                options,
                "{} is of adapters and checkpoints, and layer profiles have no base; leave it out",
            )
            for options in (["--base", "x"], ["--revision", "x"], ["--allow-other-base"])
        ),
        (
            ["entropy", "base", "--task", "sort", "--adapter", "run"],
            ["--layer", "middle"],
            "{} is of a measurement without --adapter, which names its blocks; leave it out",
        ),
        (
            ["entropy", "base", "--task", "sort"],
            ["--allow-other-base"],
            "{} is of --adapter; give that too, or leave it out",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_without_effect_is_refused(onelayer, command, options, message):
    code, lines, out = onelayer(*command, *options)
    assert (code, len(lines), out) == (1, 1, "") and message.format(options[0]) in lines[0], lines


def test_a_mask_is_written_beside_the_analysis(onelayer, files, tmp_path):
    out = tmp_path / "mask.safetensors"
    code, lines, text = onelayer(
        "analyze", files / "base", files / "one", "--mask-out", out, "--share", ".1", "--no-spectrum", "--json"
    )
    assert code == 0 and any(f"written to {out}" in line and "(10.00%)" in line for line in lines)
    assert json.loads(text)["format"] == "onelayer-analysis-1"
    make_mask(files / "base", files / "one", tmp_path / "direct.safetensors", share=0.1)
    assert (tmp_path / "direct.safetensors").read_bytes() == out.read_bytes()
