"""Every number of an analysis is the one that NumPy gives in float64, or the official code in bfloat16."""

import json
import math

import numpy as np
import pytest
import torch
from changes import TOLERANCES, load_tensors, save_adapter, save_tensors
from safetensors.torch import load_file, save_file

import models
from peft_onelayer import analyze_change, export_adapter
from peft_onelayer.analysis import measure as measure_module
from peft_onelayer.analysis import spectrum
from peft_onelayer.analysis.change import block_of
from peft_onelayer.analysis.sources import Pair, held_values
from peft_onelayer.sparse.names import base_name

SHAPES = {
    "model.embed_tokens.weight": (40, 12),
    "model.layers.0.mlp.weight": (12, 20),
    "model.layers.0.norm.weight": (12,),
    "model.layers.1.experts.weight": (3, 4, 5),
    "model.layers.1.mlp.weight": (20, 12),
    "model.layers.1.norm.weight": (12,),
    "model.layers.1.scale": (),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(measure_module, "PIECE", 64)  # several pieces of a tensor, as in a large one


def pair(dtype, other_dtype, seed=0):
    """A base and a checkpoint whose changes lie on both sides of every tolerance; a norm that stays, and a low rank."""
    torch.manual_seed(seed)
    base = {name: (0.02 * torch.randn(shape)).to(dtype) for name, shape in SHAPES.items()}
    other = {}
    for name, tensor in base.items():
        size = 10.0 ** torch.empty(tensor.shape).uniform_(-9, -3)
        change = size * torch.sign(torch.randn(tensor.shape)) * (torch.rand(tensor.shape) < 0.6)
        other[name] = (tensor.float() + change).to(other_dtype)
    other["model.layers.0.norm.weight"] = base["model.layers.0.norm.weight"].to(other_dtype)
    other["model.layers.1.scale"] = (base["model.layers.1.scale"].float() * 2).to(other_dtype)
    low = torch.outer(torch.arange(1.0, 21), torch.arange(1.0, 13)) / 64  # whole steps of every dtype here
    base["model.layers.1.mlp.weight"] = torch.zeros(20, 12, dtype=dtype)
    other["model.layers.1.mlp.weight"] = low.to(other_dtype)
    return base, other


def f64(tensor):
    return tensor.double().numpy()


def by_hand(base, other):
    """The fields of a tensor that NumPy can give, from the definitions."""
    b, o = f64(base), f64(other)
    d, rounded = o - b, f64(other.to(base.dtype)) - b
    official = other.bfloat16() - base.bfloat16()
    found = {
        "shape": list(base.shape),
        "dtype": str(base.dtype).removeprefix("torch."),
        "other_dtype": str(other.dtype).removeprefix("torch."),
        "unchanged": {key: float((np.abs(d) <= tolerance).mean()) for key, tolerance in TOLERANCES.items()},
        "unchanged_official": {
            key: float(torch.isclose(official, torch.zeros_like(official), atol=tolerance).double().mean())
            for key, tolerance in TOLERANCES.items()
        },
        "changed": int((rounded != 0).sum()),
        "changed_bfloat16": int((official != 0).sum()),
        "norm": float(np.sqrt((d**2).sum())),
        "norm_rounded": float(np.sqrt((rounded**2).sum())),
        "base_norm": float(np.sqrt((b**2).sum())),
    }
    if d.ndim == 2:
        values = np.linalg.svd(d, compute_uv=False)
        shares = values[values > 1e-12 * max(values[0], 1e-300)]
        shares = shares / shares.sum()
        found |= {
            "rows": int((d != 0).any(1).sum()),
            "columns": int((d != 0).any(0).sum()),
            "rank": int(np.linalg.matrix_rank(d, rtol=max(d.shape) * np.finfo(np.float32).eps)),
            "rank_official": int(torch.linalg.matrix_rank(official.float())),
            "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
            "largest_rank": min(d.shape),
            "singular_values": values[:16].tolist(),
        }
    return found


def check(tensor, want):
    assert tensor.keys() >= want.keys()
    for name, value in want.items():
        if isinstance(value, float):
            assert tensor[name] == pytest.approx(value, rel=1e-12), name
        elif name == "singular_values":
            assert tensor[name] == pytest.approx(value, rel=1e-9, abs=1e-12 * value[0]), name
        elif name.startswith("unchanged"):
            assert tensor[name] == pytest.approx(value, abs=1e-15), name
        else:
            assert tensor[name] == value, name


DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
]


@pytest.mark.parametrize(("dtype", "other_dtype"), DTYPES, ids=str)
def test_every_number_of_a_tensor_is_numpys(tmp_path, dtype, other_dtype):
    base, other = pair(dtype, other_dtype)
    found = analyze_change(save_tensors(tmp_path / "base", base), save_tensors(tmp_path / "other", other)).to_json()
    assert [tensor["name"] for tensor in found["tensors"]] == sorted(SHAPES)
    for tensor in found["tensors"]:
        check(tensor, by_hand(base[tensor["name"]], other[tensor["name"]]))
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert by_name["model.layers.1.mlp.weight"]["rank"] == 1
    assert by_name["model.layers.1.mlp.weight"]["effective_rank"] == pytest.approx(1, abs=1e-9)
    assert by_name["model.embed_tokens.weight"]["rank"] == 12
    assert "rank" not in by_name["model.layers.1.experts.weight"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_larger_matrices_go_by_the_gram_matrix_to_the_same_ranks(tmp_path, monkeypatch, dtypes):
    base, other = pair(*dtypes)
    save_tensors(tmp_path / "base", base)
    save_tensors(tmp_path / "other", other)
    direct = analyze_change(tmp_path / "base", tmp_path / "other")
    monkeypatch.setattr(spectrum, "DIRECT", 0)
    monkeypatch.setattr(spectrum, "BLOCK", 64)
    gram = analyze_change(tmp_path / "base", tmp_path / "other")
    for a, b in zip(direct.tensors, gram.tensors, strict=True):
        assert (a.rank, a.rank_official, a.measured) == (b.rank, b.rank_official, b.measured)
        if a.rank is not None:
            assert b.effective_rank == pytest.approx(a.effective_rank, rel=1e-5)
            assert b.singular_values == pytest.approx(a.singular_values, rel=1e-9, abs=1e-6 * a.singular_values[0])


def test_the_definitions_differ_where_the_other_is_wider(tmp_path):
    base, other = pair(torch.bfloat16, torch.float32)
    found = analyze_change(save_tensors(tmp_path / "base", base), save_tensors(tmp_path / "other", other)).to_json()
    total = found["total"]
    assert total["unchanged"]["0"] < 0.6 < total["unchanged_official"]["0"]
    assert "the base's weights are bfloat16, the other's weights float32" in found["dtypes"]


def test_blocks_kinds_and_the_total(tmp_path):
    base, other = pair(torch.bfloat16, torch.float32)
    found = analyze_change(save_tensors(tmp_path / "base", base), save_tensors(tmp_path / "other", other)).to_json()
    assert [(layer["layer"], layer["name"]) for layer in found["layers"]] == [
        (0, "model.layers.0"),
        (1, "model.layers.1"),
    ]
    assert [kind["name"] for kind in found["kinds"]] == [
        "model.embed_tokens.weight",
        "model.layers.*.experts.weight",
        "model.layers.*.mlp.weight",
        "model.layers.*.norm.weight",
        "model.layers.*.scale",
    ]
    groups = {group["name"]: group for group in (*found["layers"], *found["kinds"], found["total"])}
    members = {
        "model.layers.1": [name for name in SHAPES if ".1." in name],
        "model.layers.*.mlp.weight": [name for name in SHAPES if "mlp" in name],
        "all": list(SHAPES),
    }
    hand = {name: by_hand(base[name], other[name]) for name in SHAPES}
    for group, names in members.items():
        sizes = [math.prod(SHAPES[name]) for name in names]
        for field in ("unchanged", "unchanged_official"):
            for key in TOLERANCES:
                shares = [hand[name][field][key] for name in names]
                assert groups[group][field][key] == pytest.approx(np.average(shares, weights=sizes), abs=1e-14)
                assert groups[group][f"mean_{field}"][key] == pytest.approx(np.mean(shares), abs=1e-14)
        assert groups[group]["norm"] == pytest.approx(np.linalg.norm([hand[n]["norm"] for n in names]), rel=1e-12)
        ranks = [(hand[n]["rank"], hand[n]["largest_rank"]) for n in names if "rank" in hand[n]]
        assert groups[group]["rank_share"] == pytest.approx(np.mean([a / b for a, b in ranks]))
        assert (groups[group]["tensors"], groups[group]["entries"]) == (len(names), sum(sizes))
        assert groups[group]["never_moved"] == [n for n in sorted(names) if not hand[n]["changed"]]
    assert groups["model.layers.0"]["never_moved"] == ["model.layers.0.norm.weight"]
    assert "; 1 of 7 tensors NEVER MOVED: layers.0.norm.weight" in found["summary"]


def parts(matrix):
    """How its rows and its columns are read."""
    return lambda a, b: matrix[a:b], lambda a, b: matrix[:, a:b]


def test_a_gram_matrix_gives_the_same_as_a_decomposition(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(spectrum, "DIRECT", 0)
    monkeypatch.setattr(spectrum, "BLOCK", 100)
    for shape in ((60, 13), (13, 60), (20, 20)):
        for rank in (1, 5, min(shape)):
            change = torch.randn(shape[0], rank).double() @ torch.randn(rank, shape[1]).double()
            values, measured = spectrum.singular_values(*parts(change), shape)
            want = np.linalg.svd(change.numpy(), compute_uv=False)
            assert measured == shape
            assert values[:rank] == pytest.approx(want[:rank], rel=1e-9)
            assert spectrum.numerical_rank(values, shape) == rank
            shares = want[:rank] / want[:rank].sum()
            assert spectrum.effective_rank(values) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)


@pytest.mark.parametrize("shape", [(60, 33), (33, 60), (40, 40)])
@pytest.mark.parametrize("direct", [0, 2**20])
def test_a_part_of_a_large_matrix_gives_lower_bounds(monkeypatch, shape, direct):
    torch.manual_seed(0)
    monkeypatch.setattr(spectrum, "DIRECT", direct)
    monkeypatch.setattr(spectrum, "BLOCK", 200)
    change = torch.randn(shape).double()
    values, measured = spectrum.singular_values(*parts(change), shape, limit=10)
    kept = np.linspace(0, min(shape) - 1, 10).astype(int)
    part = change.numpy()[:, kept] if shape[0] >= shape[1] else change.numpy()[kept]
    assert measured == part.shape and len(set(kept)) == 10
    assert values == pytest.approx(np.linalg.svd(part, compute_uv=False), rel=1e-9)
    assert (values <= np.linalg.svd(change.numpy(), compute_uv=False)[:10] * (1 + 1e-9)).all()


def test_what_is_measured_of_a_part_says_so():
    base, other = torch.zeros(8, 9), torch.randn(8, 9)
    found = measure_module.measure(Pair("w", held_values(base), held_values(other)), limit=5)
    assert (found.rank, found.largest_rank, found.measured) == (5, 5, [5, 9])
    whole = measure_module.measure(Pair("w", held_values(base), held_values(other)))
    assert (whole.rank, whole.largest_rank, whole.measured) == (8, 8, None)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A bfloat16 base and adapters of blocks 1 and 3, the first dense and sparse."""
    root = tmp_path_factory.mktemp("adapters")
    models.build(dtype=torch.bfloat16).save_pretrained(root / "base", max_shard_size="12KB")
    models.build(dtype=torch.bfloat16, seed=1).save_pretrained(root / "other-base")
    save_adapter(root / "dense", root / "base", 1, still=["input_layernorm"], size=0.03)
    save_adapter(root / "three", root / "base", 3, seed=1)
    export_adapter(root / "dense", root / "sparse", "sparse")
    return root


def masters(folder):
    return {base_name(key): t for key, t in load_file(folder / "adapter_model.safetensors").items()}


def test_a_dense_adapter_is_measured_by_its_masters(adapters):
    base = models.build(dtype=torch.bfloat16).state_dict()
    found = analyze_change(adapters / "base", adapters / "dense").to_json()
    kept = masters(adapters / "dense")
    assert found["kind"] == "adapter" and [t["name"] for t in found["tensors"]] == sorted(kept)
    for tensor in found["tensors"]:
        assert (tensor["dtype"], tensor["other_dtype"]) == ("bfloat16", "float32")
        check(tensor, by_hand(base[tensor["name"]], kept[tensor["name"]]))
    (layer,) = found["layers"]
    assert layer["layer"] == 1 and layer["never_moved"] == ["model.layers.1.input_layernorm.weight"]
    assert "NEVER MOVED: input_layernorm.weight" in found["summary"]
    assert "the adapter's stored values float32" in found["dtypes"]


def test_a_sparse_adapter_is_measured_by_its_rounded_values(adapters):
    base = models.build(dtype=torch.bfloat16).state_dict()
    found = analyze_change(adapters / "base", adapters / "sparse").to_json()
    kept = masters(adapters / "dense")
    for tensor in found["tensors"]:
        assert (tensor["dtype"], tensor["other_dtype"]) == ("bfloat16", "bfloat16")
        check(tensor, by_hand(base[tensor["name"]], kept[tensor["name"]].bfloat16()))


def test_several_adapters_are_taken_together(adapters):
    both = analyze_change(adapters / "base", [adapters / "sparse", adapters / "three"])
    one, three = (analyze_change(adapters / "base", adapters / name) for name in ("sparse", "three"))
    assert both.tensors == [*one.tensors, *three.tensors] and [g.layer for g in both.layers] == [1, 3]
    with pytest.raises(ValueError, match=r"both train model\.layers\.1\..* `onelayer compare`"):
        analyze_change(adapters / "base", [adapters / "sparse", adapters / "dense"])


def test_without_the_spectrum_there_are_no_ranks_and_all_else_is_the_same(adapters):
    with_ranks = analyze_change(adapters / "base", adapters / "dense").to_json()["tensors"]
    without = analyze_change(adapters / "base", adapters / "dense", spectrum=False).to_json()["tensors"]
    ranks = {"rank", "rank_official", "effective_rank", "largest_rank", "singular_values"}
    assert [{k: v for k, v in t.items() if k not in ranks} for t in with_ranks] == without


def test_blocks_that_did_not_change_are_not_listed_tensor_by_tensor(tmp_path):
    base = {f"h.{i}.{part}.weight": torch.ones(4, 4) for i in range(9) for part in ("a", "b")}
    other = base | {"h.4.a.weight": torch.ones(4, 4) + 1}
    found = analyze_change(save_tensors(tmp_path / "base", base), save_tensors(tmp_path / "other", other))
    assert found.summary() == (
        "50 % of the entries changed in float32; 1 of 2 tensors NEVER MOVED: b.weight; "
        "8 of 9 blocks did not change at all (shares and counts are of the other tensors)"
    )
    same = analyze_change(tmp_path / "base", tmp_path / "base")
    assert same.summary() == "NOTHING MOVED: in float32 all 18 tensors equal the base's"
    assert same.total.rank_share == 0 and same.total.norm == 0


def test_minus_zero_is_zero(tmp_path):
    base, other = {"w": torch.zeros(2, 2)}, {"w": -torch.zeros(2, 2)}
    (tensor,) = analyze_change(save_tensors(tmp_path / "a", base), save_tensors(tmp_path / "b", other)).tensors
    assert (tensor.changed, tensor.unchanged["0"], tensor.rank) == (0, 1.0, 0)


def test_tensors_that_cannot_be_compared_are_named(tmp_path):
    base = {"w": torch.ones(2, 2), "gone": torch.ones(2), "wide": torch.ones(2, 3), "n": torch.tensor([1])}
    other = {"w": torch.ones(2, 2), "new": torch.ones(2), "wide": torch.ones(2, 4), "n": torch.tensor([1])}
    base["empty"] = other["empty"] = torch.ones(0, 3)
    found = analyze_change(save_tensors(tmp_path / "base", base), save_tensors(tmp_path / "other", other))
    assert [t.name for t in found.tensors] == ["w"]
    assert found.skipped == {
        "gone": "only in the base",
        "new": "not in the base",
        "wide": "shape [2, 3] in the base, [2, 4] in the other",
        "n": "stored as I64, no floating-point numbers of 16 to 64 bits",
        "empty": "holds no entries",
    }


def test_names_that_differ_only_in_the_files_are_the_same(tmp_path):
    """GPT-2's first checkpoints lack the prefix that its class gives."""
    model = models.build(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    other = {name.removeprefix("model."): tensor + 1 for name, tensor in load_tensors(tmp_path / "base").items()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    save_file(other, tmp_path / "other" / "model.safetensors")
    found = analyze_change(tmp_path / "base", tmp_path / "other")
    assert not found.skipped and found.total.unchanged["0"] == 0
    assert {t.name for t in found.tensors} == set(load_tensors(tmp_path / "base"))


def test_what_cannot_work_is_one_line(tmp_path, adapters):
    nan = load_tensors(save_tensors(tmp_path / "base", {"w": torch.ones(2)}))
    nan["w"][0] = float("nan")
    save_tensors(tmp_path / "nan", nan)
    save_tensors(tmp_path / "inf", {"w": torch.tensor([1.0, -float("inf")])})
    save_tensors(tmp_path / "strange", {"v": torch.ones(2)})
    cases = {
        (tmp_path / "base", tmp_path / "nan"): "w of the other holds NaN or Inf",
        (tmp_path / "nan", tmp_path / "nan"): "w of the base holds NaN or Inf",
        (tmp_path / "inf", tmp_path / "inf"): "w of the base holds NaN or Inf",
        (tmp_path / "base", tmp_path / "strange"): "no tensor in common",
        (tmp_path / "base", tmp_path / "nowhere"): "no folder at",
        (tmp_path / "nowhere", tmp_path / "base"): "no model folder at",
        (adapters / "dense", adapters / "dense"): "is an adapter and not a base model",
        (adapters / "other-base", adapters / "dense"): "was trained on",
        (adapters / "other-base", adapters / "sparse"): "not the base that the adapter was trained on",
    }
    for (base, other), message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            analyze_change(base, other)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="nothing was given"):
        analyze_change(tmp_path / "base", [])
    with pytest.raises(ValueError, match="one checkpoint alone"):
        analyze_change(tmp_path / "base", [tmp_path / "base", adapters / "dense"])
    allowed = analyze_change(adapters / "other-base", adapters / "dense", allow_other_base=True)
    assert allowed.total.tensors == 11


@pytest.mark.parametrize(
    ("name", "block", "layer", "kind"),
    [
        ("h.0.attn.weight", "h.0", 0, "h.*.attn.weight"),
        ("0.weight", "0", 0, "*.weight"),
        ("a.2.b.10.c", "a.2", 2, "a.*.b.*.c"),
        ("layer1.conv.weight", None, None, "layer1.conv.weight"),
        ("model.norm.weight", None, None, "model.norm.weight"),
    ],
)
def test_the_block_that_a_name_is_in(name, block, layer, kind):
    assert block_of(name) == (block, layer, kind)
