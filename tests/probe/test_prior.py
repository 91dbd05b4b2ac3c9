"""The depth prior against the published profiles: FACTS about arXiv 2607.01232 (1)."""

from dataclasses import replace
from functools import partial

import demo_model
import numpy as np
import pytest

import peft_onelayer
from onelayer_cli.probe import _mark
from peft_onelayer.probe.prior import depth_prior, fitted
from peft_onelayer.probe.probe import probe_layers
from peft_onelayer.records.ranking import LayerRanking, Sweep
from peft_onelayer.runs.ranking import describe
from peft_onelayer.statistics import rank_correlation

WHOLE = "Qwen/Qwen3-1.7B-Base"


def test_it_is_fitted_to_the_published_profiles():
    centre, width = fitted()
    # The seven best relative depths are .37 .46 .46 .52 .52 .51 .59.
    assert centre == pytest.approx(np.mean([0.37, 0.46, 0.46, 0.52, 0.52, 0.51, 0.59]), abs=0.005)
    scores = peft_onelayer.load_profile(WHOLE).scores
    depth = np.linspace(0, 1, 28)

    def residual(w):
        bump = np.exp(-((depth - centre) ** 2) / (2 * w**2))
        design = np.stack([np.ones(28), bump], axis=1)
        return np.linalg.lstsq(design, np.array(scores), rcond=None)[1][0]

    assert residual(width) == min(residual(w / 100) for w in range(10, 61))
    assert 0.10 < width < 0.60


@pytest.mark.parametrize(("centre", "published"), [(0.35, 0.76), (0.40, 0.76), (0.50, 0.47)])
def test_the_published_correlations_with_depth(centre, published):
    scores = peft_onelayer.load_profile(WHOLE).scores
    nearness = [-abs(k / 27 - centre) for k in range(28)]
    assert rank_correlation(nearness, scores) == pytest.approx(published, abs=0.006)
    if centre == 0.50:  # every two blocks are at one distance; the .47 comes from rounding, which breaks these ties
        assert rank_correlation([round(x, 9) for x in nearness], scores) == pytest.approx(0.49, abs=0.006)


def test_its_own_correlation_lies_between():
    scores = peft_onelayer.load_profile(WHOLE).scores
    assert rank_correlation(depth_prior(28), scores) == pytest.approx(0.53, abs=0.01)


def test_a_profile_without_a_gain_gives_no_pick():
    model, tokenizer = demo_model.load()
    about = {"model": "m", "revision": None, "num_layers": 12, "method": "sweep", "tied": [0], "cost": {}, "task": "t"}
    about |= {"scores": [-0.01 * k for k in range(12)], "errors": [0.01] * 12, "learning_rate": 1e-3, "seed": 0}
    profile = LayerRanking(**about, order=list(range(12)), pick=None, sweep=Sweep([None] * 12, 0.3, 0.2, undefined="x"))
    rank = partial(probe_layers, model, tokenizer, None, method="profile")
    found = rank(profile=profile)
    assert found.pick is None and found.order == list(range(12)) and found.choice == [3, 4, 5, 6, 7]
    said = "the profile has no block that gains beyond noise, so the choice is blocks 3, 4, 5, 6, 7"
    assert describe(found) == [said]
    assert [_mark(found, k) for k in (0, 5)] == ["", "choice"]
    # that of a race is one that ran, which need not be the first
    assert rank(profile=replace(profile, pick=1)).pick == 1
    assert rank(profile=replace(profile, pick=1), layers=[4, 7]).pick == 4


@pytest.mark.parametrize("depth", [1, 2, 8, 12, 28, 36])
def test_any_depth(depth):
    scores = depth_prior(depth)
    assert len(scores) == depth and 0 < min(scores) <= max(scores) <= 1
    best = scores.index(max(scores))
    assert abs(best - (depth - 1) * fitted()[0]) <= 0.5 or depth == 1
    assert scores[best:] == sorted(scores[best:], reverse=True) and scores[: best + 1] == sorted(scores[: best + 1])
