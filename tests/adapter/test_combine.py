"""Adapters made of several: every formula is that of NumPy in float64, rounded once to the base's dtype."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from changes import save_adapter
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils.merge_utils import dare_linear, ties
from safetensors.torch import load_file
from tuner.helpers import logits

import models
from peft_onelayer import combine_adapters, export_adapter, inspect_adapter, merge_into_checkpoint
from peft_onelayer.adapter import parts as parts_of_adapters
from peft_onelayer.adapter.fusion import slerp
from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.sparse.names import base_name

FORMULAS = ("sum", "average", "slerp", "ties", "dare")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bfloat16 base; adapters one, two and three of block 1, sparse two, and four of block 3."""
    root = tmp_path_factory.mktemp("combine")
    models.build(dtype=torch.bfloat16).save_pretrained(root / "base")
    for seed, name in enumerate(("one", "two", "three")):
        save_adapter(root / name, root / "base", 1, seed=seed, size=0.02, share=0.4)
    save_adapter(root / "four", root / "base", 3, seed=9, size=0.02)
    export_adapter(root / "two", root / "sparse", "sparse")
    return root


def base_of(folder):
    return load_file(folder / "base" / "model.safetensors")


def values(folder):
    return {base_name(key): tensor for key, tensor in load_file(folder / "adapter_model.safetensors").items()}


def by_hand(method, base, found, index, density):
    """A weight in float64 from those of the adapters."""
    w, stack = base.double().numpy(), [v.double().numpy() for v in found]
    changes = [v - w for v in stack]
    if method == "sum":
        return w + np.sum(changes, axis=0)
    if method == "average":
        return w + np.sum(changes, axis=0) / len(changes)
    if method == "slerp":
        result = stack[0]
        for count, other in enumerate(stack[1:], 2):
            cos = (result * other).sum() / np.linalg.norm(result) / np.linalg.norm(other)
            omega, t = np.arccos(np.clip(cos, -1, 1)), 1 / count
            result = (np.sin((1 - t) * omega) * result + np.sin(t * omega) * other) / np.sin(omega)
        return result
    tensors, ones = [torch.from_numpy(c) for c in changes], torch.ones(len(changes)).double()
    if method == "ties":
        return w + ties(tensors, ones, density).numpy()
    torch.manual_seed(4 + index)
    return w + dare_linear(tensors, ones, density).numpy()


@pytest.mark.parametrize("other", [True, False])
def test_a_combination_names_the_base_that_it_was_made_for(folder, tmp_path, other):
    base = folder / "base"
    if other:
        models.build(dtype=torch.bfloat16, seed=7).save_pretrained(base := tmp_path / "other")
    names = [folder / "one", folder / "two"]
    combine_adapters(names, tmp_path / "out", "sum", base=base, allow_other_base=True)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("names", [("one", "two", "three"), pytest.param(("one", "two"), marks=pytest.mark.more)])
def test_one_block_by_a_formula(folder, tmp_path, method, names):
    density = 0.3 if method in ("ties", "dare") else None
    found = combine_adapters([folder / n for n in names], tmp_path / "out", method, density=density, seed=4)
    base, made = base_of(folder), values(tmp_path / "out")
    parts = [values(folder / n) for n in names]
    assert made.keys() == parts[0].keys()
    for index, name in enumerate(sorted(made)):
        assert made[name].dtype == torch.bfloat16
        hand = torch.from_numpy(by_hand(method, base[name], [p[name] for p in parts], index, density)).bfloat16()
        if method == "slerp":  # the arc cosine of NumPy is good to 1e-8
            assert torch.allclose(made[name].float(), hand.float(), rtol=2**-7, atol=1e-6)
            assert (made[name] == hand).float().mean() > 0.99
        else:
            assert torch.equal(made[name], hand), name
    moved = [{n: (p[n].bfloat16().double() - base[n].double()).sign() for n in p} for p in parts]
    assert found.changed == [sum(int((m[n] != 0).sum()) for n in m) for m in moved]
    signs = {n: torch.stack([m[n] for m in moved]) for n in made}
    assert found.changed_by_several == sum(int(((s != 0).sum(0) > 1).sum()) for s in signs.values())
    conflicts = sum(int(((s > 0).any(0) & (s < 0).any(0)).sum()) for s in signs.values())
    assert found.conflicts == conflicts > 0 and found.conflict_share == conflicts / found.changed_by_several


def note(found, done, total):
    found.append((done, total))


@pytest.mark.parametrize("method", [*FORMULAS, "stack", "cpi"])
def test_the_result_does_not_depend_on_the_size_of_the_pieces(folder, tmp_path, monkeypatch, method):
    adapters = [folder / n for n in (("one", "four") if method == "stack" else ("one", "sparse", "three"))]
    found, made, seen = [], [], []
    for size in (2**20, 101):  # the last piece of a tensor is shorter
        monkeypatch.setattr(parts_of_adapters, "PIECE", size)
        out = tmp_path / str(size)
        options = {"core": 0.3, "mask_out": tmp_path / f"{size}.safetensors"} if method == "cpi" else {}
        progress: list[tuple[int, int]] = []
        one = combine_adapters(adapters, out, method, seed=4, **options, on_progress=partial(note, progress))
        found.append({name: value for name, value in one.to_json().items() if name != "folder"})
        made.append(values(out))
        seen.append((len(progress), progress[-1]))
    assert found[0] == found[1] and made[0].keys() == made[1].keys()
    assert seen[1][0] > 3 * seen[0][0]  # more pieces than tensors
    assert seen[0][1][0] == seen[0][1][1] == seen[1][1][0]  # the passes that were announced
    if method == "cpi":
        masks = [load_file(tmp_path / f"{size}.safetensors") for size in (2**20, 101)]
        assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    for name, value in made[0].items():
        if method in ("slerp", "cpi"):  # the order in which the norms are summed up may change the last bit of an angle
            bits = [made[i][name].view(torch.int16).int() for i in (0, 1)]
            assert (bits[0] - bits[1]).abs().max() <= 1, name
        else:
            assert torch.equal(value, made[1][name]), name


def test_a_sparse_adapter_is_its_rounded_values(folder, tmp_path):
    combine_adapters([folder / "one", folder / "sparse"], tmp_path / "out", "sum")
    base, one, two = base_of(folder), values(folder / "one"), values(folder / "two")
    for name, made in values(tmp_path / "out").items():
        w = base[name].double()
        assert torch.equal(made, (w + ((one[name].double() - w) + (two[name].bfloat16().double() - w))).bfloat16())


def test_the_result_is_an_adapter_like_any_other(folder, tmp_path):
    combine_adapters([folder / "one", folder / "two"], tmp_path / "out", "average")
    model = PeftModel.from_pretrained(models.build(dtype=torch.bfloat16), str(tmp_path / "out"))
    made = values(tmp_path / "out")
    plain = models.build(dtype=torch.bfloat16)
    plain.load_state_dict(made, strict=False)
    assert torch.equal(logits(model), logits(plain))
    merge_into_checkpoint(folder / "base", tmp_path / "out", tmp_path / "merged")
    assert all(torch.equal(v, load_file(tmp_path / "merged" / "model.safetensors")[n]) for n, v in made.items())
    export_adapter(tmp_path / "out", tmp_path / "sparse", "sparse")
    again = PeftModel.from_pretrained(models.build(dtype=torch.bfloat16), str(tmp_path / "sparse"))
    assert torch.equal(logits(again), logits(plain))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["combined"]["method"] == "average"
    assert [part["name"] for part in config["combined"]["parts"]] == ["one", "two"]
    assert str(tmp_path) not in json.dumps(config["combined"]) and "encoding" not in config
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["combined"] == config["combined"]
    assert inspect_adapter(tmp_path / "out", folder / "base").layers == [1]


def test_blocks_stack(folder, tmp_path):
    found = combine_adapters([folder / "one", folder / "four"], tmp_path / "out")
    assert found.layers == [1, 3] and found.conflict_share is None and found.changed_by_several == 0
    expected = {n: v.bfloat16() for part in ("one", "four") for n, v in values(folder / part).items()}
    made = values(tmp_path / "out")
    assert made.keys() == expected.keys() and all(torch.equal(made[n], expected[n]) for n in made)
    model = PeftModel.from_pretrained(models.build(dtype=torch.bfloat16), str(tmp_path / "out"))
    assert model.peft_config["default"].layer_indices == [1, 3]
    both = models.build(dtype=torch.bfloat16)
    both.load_state_dict(expected, strict=False)
    assert torch.equal(logits(model), logits(both))


def test_parts_of_a_block_stack(folder, tmp_path):
    for name, parts in (("attention", ["self_attn"]), ("mlp", ["mlp"])):
        save_adapter(tmp_path / name, folder / "base", 2, size=0.02, target_modules=parts)
    combine_adapters([tmp_path / "attention", tmp_path / "mlp"], tmp_path / "out", "stack")
    model = PeftModel.from_pretrained(models.build(dtype=torch.bfloat16), str(tmp_path / "out"))
    expected = {n: v.bfloat16() for part in ("attention", "mlp") for n, v in values(tmp_path / part).items()}
    assert len(open_adapter(tmp_path / "out").names) == len(expected) == 9
    both = models.build(dtype=torch.bfloat16)
    both.load_state_dict(expected, strict=False)
    assert torch.equal(logits(model), logits(both))


def test_formulas_over_different_blocks_leave_what_one_does_not_train(folder, tmp_path):
    combine_adapters([folder / "one", folder / "four"], tmp_path / "out", "average")
    base = base_of(folder)
    for part in ("one", "four"):
        for name, value in values(folder / part).items():
            w = base[name].double()
            assert torch.equal(values(tmp_path / "out")[name], (w + (value.double() - w) / 2).bfloat16())


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_cpi(folder, tmp_path, share):
    names = ("one", "two", "three")
    found = combine_adapters(
        [folder / n for n in names],
        tmp_path / "out",
        "cpi",
        core=share,
        overlap=0.17,
        mask_out=tmp_path / "new" / "mask.safetensors",
    )
    base, parts = base_of(folder), [values(folder / n) for n in names]
    order = sorted(parts[0])
    sizes = [
        np.concatenate([(p[n].double() - base[n].double()).abs().numpy().reshape(-1) for n in order]) for p in parts
    ]
    wanted = round(share * len(sizes[0]))
    cores = []
    for size in sizes:
        core = np.zeros(len(size), bool)
        core[np.argsort(-size, kind="stable")[:wanted]] = True
        cores.append(core)
    jaccard = [[(a & b).sum() / (a | b).sum() for b in cores] for a in cores]
    assert found.cores == [wanted] * 3 and np.allclose(found.overlaps, jaccard)
    groups = [[0], [1], [2]] if share == 0.01 else [[0, 1, 2]]
    assert (np.array(jaccard)[np.triu_indices(3, 1)] >= 0.17).all() == (share == 0.3)
    assert found.groups == groups
    start = 0
    for name in order:
        w, n = [p[name].double() for p in parts], parts[0][name].numel()
        of = [torch.from_numpy(c[start : start + n]).view(w[0].shape) for c in cores]
        start += n
        rest = ~(of[0] | of[1] | of[2])
        hand = w[2].clone()
        if rest.any():
            hand[rest] = slerp(slerp(w[2][rest], w[0][rest], 1 / 2), w[1][rest], 1 / 3)
        for value, core in zip(w, of, strict=True):
            hand[core] = value[core]
        assert torch.equal(values(tmp_path / "out")[name], hand.bfloat16()), name
        assert torch.equal(load_file(tmp_path / "new" / "mask.safetensors")[name], rest)


def test_slerp_is_linear_where_the_angle_is_tiny_and_on_the_sphere_elsewhere():
    a = torch.tensor([3.0, 4.0]).double()
    assert torch.equal(slerp(a, 2 * a, 0.25), 0.75 * a + 0.25 * (2 * a))
    assert torch.equal(slerp(a, torch.zeros(2).double(), 0.5), 0.5 * a)
    b = torch.tensor([-4.0, 3.0]).double()
    assert float(slerp(a, b, 0.3).norm()) == pytest.approx(5.0, rel=1e-14)


def test_what_cannot_be_combined_is_refused_in_one_line(folder, tmp_path):
    other = models.build(dtype=torch.bfloat16, seed=5)
    other.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "foreign", tmp_path / "base", 1)
    models.build().save_pretrained(tmp_path / "wide")
    save_adapter(tmp_path / "float", tmp_path / "wide", 1)
    get_peft_model(models.build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    shutil.copytree(folder / "two", tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"no file")
    (tmp_path / "notes").write_text("mine")
    one = folder / "one"
    cases = [
        ([one, folder / "two"], {"method": "stack"}, "both train .* so they do not stack"),
        ([one, tmp_path / "foreign"], {"method": "sum"}, "not the base that the adapter was trained on"),
        ([one, tmp_path / "float"], {"method": "sum", "base": folder / "base"}, "not the base|was trained on"),
        ([one, tmp_path / "lora"], {"method": "sum"}, "describes no single-layer adapter"),
        ([one, tmp_path / "damaged"], {"method": "sum"}, "damaged"),
        ([one], {"method": "sum"}, "two adapters or more, and 1"),
        ([one, folder / "two"], {"method": "mean"}, "'mean' is not known; expected one of stack, sum"),
        ([one, folder / "two"], {"method": "sum", "density": 0.5}, "density is of ties and dare"),
        ([one, folder / "two"], {"method": "ties", "density": 0.0}, "density=0.0 is no share"),
        ([one, folder / "two"], {"method": "cpi", "core": 1.5}, "core=1.5 is no share"),
        ([one, folder / "two"], {"method": "sum", "mask_out": tmp_path / "m"}, "is of cpi, not of sum"),
        ([one, folder / "two"], {"method": "cpi", "mask_out": tmp_path / "notes"}, "notes exists and is another file"),
    ]
    for adapters, options, match in cases:
        with pytest.raises(ValueError, match=match) as error:
            combine_adapters(adapters, tmp_path / "out", **options)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    assert (tmp_path / "notes").read_text() == "mine"
