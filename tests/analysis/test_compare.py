"""What runs have in common is what NumPy gives in float64."""

import itertools
import json

import numpy as np
import pytest
import torch
from changes import save_adapter, save_tensors

import models
from peft_onelayer import compare_adapters, export_adapter
from peft_onelayer.analysis import compare as compare_module

SHAPES = {"h.0.a": (30, 20), "h.0.b": (17,), "h.1.a": (30, 20)}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(compare_module, "PIECE", 128)


def runs(count, dtype=torch.bfloat16, other_dtype=torch.bfloat16):
    """A base and runs of which each changes a part of a common half of the entries and some elsewhere."""
    torch.manual_seed(0)
    base = {name: (0.02 * torch.randn(shape)).to(dtype) for name, shape in SHAPES.items()}
    favoured = {name: torch.rand(shape) < 0.5 for name, shape in SHAPES.items()}
    direction = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    others = []
    for _ in range(count):
        run = {}
        for name, tensor in base.items():
            chosen = torch.rand(tensor.shape) < torch.where(favoured[name], 0.7, 0.1)
            change = 1e-3 * (direction[name] + torch.randn(tensor.shape)) * chosen
            run[name] = (tensor.float() + change).to(other_dtype)
        others.append(run)
    return base, others


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2], ids=str
)
def test_every_number_is_numpys(tmp_path, dtypes):
    base, others = runs(3, *dtypes)
    save_tensors(tmp_path / "base", base)
    names = [str(save_tensors(tmp_path / f"run-{i}", run)) for i, run in enumerate(others)]
    found = compare_adapters(names, tmp_path / "base").to_json()
    assert found["format"] == "onelayer-comparison-1" and found["runs"] == names
    assert [(p["a"], p["b"]) for p in found["pairs"]] == list(itertools.combinations(names, 2))
    for pair in found["pairs"]:
        a, b = (others[names.index(pair[side])] for side in "ab")
        changed = [{n: (run[n].to(base[n].dtype) != base[n]).numpy() for n in SHAPES} for run in (a, b)]
        change = [{n: (run[n].double() - base[n].double()).numpy() for n in SHAPES} for run in (a, b)]
        x, y = (np.concatenate([c[n].ravel() for n in SHAPES]) for c in changed)
        u, v = (np.concatenate([c[n].ravel() for n in SHAPES]) for c in change)
        both = x & y
        assert (pair["entries"], pair["changed_a"], pair["changed_b"], pair["both"]) == (
            x.size,
            *(int(z.sum()) for z in (x, y, both)),
        )
        by_tensor = sum(changed[0][n].sum() * changed[1][n].sum() / changed[0][n].size for n in SHAPES)
        chance = x.sum() * y.sum() / x.size
        want = {
            "overlap_a": both.sum() / x.sum(),
            "overlap_b": both.sum() / y.sum(),
            "chance_a": y.mean(),
            "chance_b": x.mean(),
            "chance_a_by_tensor": by_tensor / x.sum(),
            "chance_b_by_tensor": by_tensor / y.sum(),
            "jaccard": both.sum() / (x | y).sum(),
            "chance_jaccard": chance / (x.sum() + y.sum() - chance),
            "correlation": np.corrcoef(u, v)[0, 1],
            "same_sign": (np.sign(u) == np.sign(v))[both].mean(),
        }
        for name, value in want.items():
            assert pair[name] == pytest.approx(value, rel=1e-12), name
        assert pair["overlap_a"] > pair["chance_a"] + 0.1 and pair["correlation"] > 0.2
        for tensor in pair["tensors"]:
            n = tensor["name"]
            assert (tensor["entries"], tensor["both"]) == (
                changed[0][n].size,
                int((changed[0][n] & changed[1][n]).sum()),
            )
            assert tensor["correlation"] == pytest.approx(np.corrcoef(*(c[n].ravel() for c in change))[0, 1], rel=1e-12)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    models.build(dtype=torch.bfloat16).save_pretrained(root / "base")
    models.build(dtype=torch.bfloat16, seed=1).save_pretrained(root / "base-2")
    for name, base, layer, seed in (
        ("a", "base", 1, 0),
        ("b", "base", 1, 1),
        ("c", "base", [1, 3], 2),
        ("d", "base-2", 1, 0),
        ("e", "base", 2, 0),
    ):
        save_adapter(root / name, root / base, layer, seed=seed, size=0.03)
    export_adapter(root / "b", root / "sparse", "sparse")
    return root


def test_adapters_know_their_base_and_may_be_sparse(adapters):
    (dense,) = compare_adapters([adapters / "a", adapters / "b"]).pairs
    (sparse,) = compare_adapters([adapters / "a", adapters / "sparse"], adapters / "base").pairs
    counts = ("entries", "changed_a", "changed_b", "both", "overlap_a", "chance_b_by_tensor", "jaccard", "same_sign")
    assert [getattr(dense, n) for n in counts[:-1]] == [getattr(sparse, n) for n in counts[:-1]]
    assert dense.correlation == pytest.approx(sparse.correlation, abs=0.02)
    (same,) = compare_adapters([adapters / "a", adapters / "a"]).pairs
    assert (same.overlap_a, same.overlap_b, same.jaccard, same.same_sign) == (1, 1, 1, 1)
    assert same.correlation == pytest.approx(1, abs=1e-12)


def test_tensors_of_one_run_alone_are_counted_apart(adapters):
    (pair,) = compare_adapters([adapters / "a", adapters / "c"]).pairs
    assert (len(pair.tensors), pair.only_a, pair.only_b) == (11, 0, 11)
    (none,) = compare_adapters([adapters / "a", adapters / "e"]).pairs
    assert (none.tensors, none.only_a, none.only_b, none.entries) == ([], 11, 11, 0)
    assert none.overlap_a is none.chance_a is none.jaccard is none.correlation is None


def test_a_run_that_changed_nothing_has_no_overlap(tmp_path):
    base, (one,) = runs(1)
    for name, tensors in (("base", base), ("one", one), ("none", base)):
        save_tensors(tmp_path / name, tensors)
    (pair,) = compare_adapters([tmp_path / "one", tmp_path / "none"], tmp_path / "base").pairs
    assert (pair.overlap_a, pair.chance_a, pair.jaccard) == (0, 0, 0)
    assert pair.overlap_b is pair.chance_b is pair.correlation is pair.same_sign is None


def test_a_change_that_is_everywhere_the_same_has_no_correlation(tmp_path):
    changes = {"one": torch.randn(37, 113, generator=torch.Generator().manual_seed(0))}
    changes |= {f"same-{value}": torch.full((37, 113), value) for value in (0.9861114621162415, 1.5449224710464478)}
    for name, change in changes.items():
        save_tensors(tmp_path / name, {"w": change})
    save_tensors(tmp_path / "base", {"w": torch.zeros(37, 113)})
    pairs = compare_adapters([tmp_path / name for name in changes], tmp_path / "base").pairs
    assert len(pairs) == 3
    assert all(pair.correlation is None and pair.tensors[0].correlation is None for pair in pairs)


def test_what_cannot_work_is_one_line(adapters, tmp_path):
    save_tensors(tmp_path / "nan", {"h.0.b": torch.full((17,), float("nan"))})
    save_tensors(tmp_path / "ones", {"h.0.b": torch.ones(17)})
    cases = [
        ([adapters / "a"], None, "two runs or more, and 1 was given"),
        ([adapters / "a", adapters / "d"], None, "several bases"),
        ([adapters / "a", adapters / "d"], adapters / "base", "was trained on"),
        ([adapters / "a", adapters / "base"], None, "is a checkpoint, which does not say"),
        ([adapters / "a", adapters / "nowhere"], None, "no folder at"),
        ([tmp_path / "ones", tmp_path / "nan"], tmp_path / "ones", "holds NaN or Inf"),
    ]
    for names, base, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            compare_adapters(names, base)
        assert "\n" not in str(error.value)
