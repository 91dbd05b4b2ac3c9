"""The agreement of layer profiles: Spearman's correlation by its definition, and depth taken out by least squares."""

import math

import numpy as np
import pytest

from peft_onelayer import LayerRanking, compare_profiles, load_profile, rank_correlation
from peft_onelayer.analysis.profiles import spearman_interval
from peft_onelayer.probe.prior import depth_prior
from peft_onelayer.records.ranking import NO_COST


def profile(scores, model="m"):
    order = sorted((k for k, s in enumerate(scores) if s is not None), key=lambda k: -scores[k])
    return LayerRanking(
        model=model,
        revision=None,
        num_layers=len(scores),
        method="race",
        scores=list(scores),
        errors=[None] * len(scores),
        order=order,
        tied=order[:1],
        pick=order[0],
        learning_rate=None,
        cost=dict(NO_COST),
        task="t",
        seed=0,
    )


def ranks(values):
    return np.argsort(np.argsort(values)).astype(float)


def test_every_number_is_numpys():
    rng = np.random.default_rng(0)
    depth = np.array(depth_prior(28))
    a, b = (depth + 0.1 * rng.normal(size=28) for _ in range(2))  # agree by depth alone
    (pair,) = compare_profiles([profile(a.tolist(), "a"), profile(b.tolist(), "b")]).pairs
    raw = np.corrcoef(ranks(a), ranks(b))[0, 1]
    design = np.stack([np.ones(28), depth], 1)
    rest = [v - design @ (np.linalg.inv(design.T @ design) @ design.T @ v) for v in (a, b)]
    removed = np.corrcoef(*(ranks(v) for v in rest))[0, 1]
    assert (pair.a, pair.b, pair.blocks) == ("a", "b", 28)
    assert pair.spearman == pytest.approx(raw, rel=1e-12) and raw > 0.7
    assert pair.spearman_without_depth == pytest.approx(removed, rel=1e-12) and abs(removed) < 0.4
    for r, freedom, interval in ((raw, 25, pair.interval), (removed, 24, pair.interval_without_depth)):
        half = 1.959964 * math.sqrt((1 + r * r / 2) / freedom)
        assert interval == pytest.approx([math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)], rel=1e-9)
    assert pair.depth_a == rank_correlation(a.tolist(), depth.tolist())
    assert pair.depth_b == rank_correlation(b.tolist(), depth.tolist())


def test_blocks_that_one_lacks_are_left_out():
    a, b = [1.0, None, 2.0, 3.0, 5.0, 4.0], [1.0, 9.0, 2.0, 3.0, None, 4.0]
    (pair,) = compare_profiles([profile(a), profile(b)]).pairs
    assert (pair.blocks, pair.spearman, pair.interval) == (4, 1.0, None)


def test_what_depth_explains_whole_leaves_nothing():
    prior = np.array(depth_prior(12))
    (pair,) = compare_profiles([profile((3 * prior - 1).tolist()), profile((prior + 7).tolist())]).pairs
    assert pair.spearman == 1 and pair.spearman_without_depth is None and pair.interval_without_depth is None


def test_shipped_profiles_files_and_folders(tmp_path):
    shipped = load_profile("Qwen/Qwen3-1.7B-Base")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "layer_profile.json").write_text(profile(depth_prior(28)).to_json())
    found = compare_profiles(["Qwen/Qwen3-1.7B-Base", tmp_path / "run", tmp_path / "run" / "layer_profile.json"])
    assert [pair.blocks for pair in found.pairs] == [28, 28, 28]
    assert found.pairs[0].spearman == rank_correlation(shipped.worth, depth_prior(28)) == found.pairs[0].depth_a
    assert found.pairs[2].spearman == 1
    assert found.to_json()["kind"] == "profiles"


def test_the_interval_covers_as_often_as_it_says():
    """4,000 draws of 28 pairs from a bivariate normal with Spearman's correlation .5: coverage .95, s.e. .0035."""
    rng = np.random.default_rng(0)
    rho = 2 * math.sin(math.pi * 0.5 / 6)
    x = rng.normal(size=(4000, 28))
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=(4000, 28))
    inside = 0
    for u, v in zip(x, y, strict=True):
        low, high = spearman_interval(float(np.corrcoef(ranks(u), ranks(v))[0, 1]), 28)
        inside += low <= 0.5 <= high
    assert inside / 4000 == pytest.approx(0.95, abs=0.02)


def test_what_cannot_work_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="two profiles or more, and 1 was given"):
        compare_profiles([profile([1.0, 2.0])])
    with pytest.raises(ValueError, match="a is of a model of 2 blocks and b of one of 3"):
        compare_profiles([profile([1.0, 2.0], "a"), profile([1.0, 2.0, 3.0], "b")])
    with pytest.raises(ValueError, match="no layer profile"):
        compare_profiles([tmp_path / "nowhere.json", profile([1.0])])
