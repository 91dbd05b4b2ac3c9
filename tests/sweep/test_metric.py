"""Layer contribution and rank correlation against cases worked by hand and against simulation."""

import json
from importlib.resources import files

import numpy as np
import pytest

import peft_onelayer
from peft_onelayer.statistics import rank_correlation
from peft_onelayer.sweep.metric import LayerContribution, gain, layer_contribution, not_told_apart


def test_contribution_of_means():
    assert layer_contribution(3.0, base=1.0, full=5.0) == LayerContribution(0.5, None)
    assert layer_contribution(1.0, base=1.0, full=5.0).value == 0
    assert layer_contribution(0.0, base=1.0, full=5.0).value == -0.25  # worse than the base


def test_undefined_where_full_ended_below_the_base():
    """The block that lost most would have the highest C."""
    base, full = [1, 0, 1, 0, 1, 0, 0, 0], [0] * 8
    for layer in ([0] * 8, [1] * 8):
        said = "all parameters ended below the base (-0.3750 ± 0.1830), so there is no gain to take a share of"
        assert layer_contribution(layer, base, full) == LayerContribution(None, None, said)
    assert layer_contribution(0.0, base=1.0, full=0.5).reason == (
        "all parameters ended below the base (-0.5000), so there is no gain to take a share of"
    )


def test_contribution_by_hand():
    # gains a = 1 0 0 1, b = 1 1 0 1: C = .5 / .75 = 2/3; a - C b = 1/3 -2/3 0 1/3, mean 0, sum of squares 6/9;
    # variance of the mean = (6/9 / 3) / 4 = 1/18; se = sqrt(1/18) / .75
    c = layer_contribution([1, 0, 1, 1], base=[0, 0, 1, 0], full=[1, 1, 1, 1])
    assert c.value == pytest.approx(2 / 3) and c.reason is None
    assert c.standard_error == pytest.approx((1 / 18) ** 0.5 / 0.75)


def test_full_itself_is_exactly_one_without_error():
    full = [1, 1, 0.5, 1]
    assert layer_contribution(full, base=[0, 0, 0.25, 0], full=full) == LayerContribution(1.0, 0.0)


def test_seeds_by_hand():
    # Two seeds whose means over two problems are .5 and 1 (layer) with no residual: MS_seeds = 2 * .125 = .25,
    # V = .25 / (2 * 2) = 1/16, the variance of a mean of two seeds with sample variance 1/8.
    layer = [[0.25, 0.75], [0.75, 1.25]]
    difference, error = gain(layer, [0.0, 0.5])  # on each problem .5: nothing from problems
    assert (difference, error) == (0.5, 0.25)
    # full gains 1 on both problems, base 0: C = .75, its error that of the seeds alone
    c = layer_contribution([[0.5, 0.5], [1.0, 1.0]], base=[0, 0], full=[1, 1])
    assert c == LayerContribution(0.75, 0.25)
    # the spread of full's seeds counts with C^2: V(full) = var(.5, 1.5) / 2 = 1/4, C = .75
    c = layer_contribution([0.75, 0.75], base=[0, 0], full=[[0.75, 0.75], [1.25, 1.25]])
    assert c.value == 0.75 and c.standard_error == pytest.approx(0.75 * (0.125 / 2) ** 0.5)


def test_residual_noise_is_not_taken_for_a_spread_of_seeds():
    # Both seeds have mean .5; which problems they solve differs.
    _, error = gain([[1, 0, 1, 0], [0, 1, 0, 1]], [0, 0, 0, 0])
    assert error == 0.0  # every problem's mean is .5 and the seeds agree


def test_the_standard_error_is_the_spread_of_repetitions():
    """Problems, seeds and samples drawn anew 3000 times."""
    rng = np.random.default_rng(0)
    problems, seeds = 60, 3
    found = []
    for _ in range(3000):
        hard = rng.normal(0, 0.2, problems)

        def scores(mean, spread, hard=hard):
            return mean + hard + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.2, (seeds, problems))

        base = 0.2 + hard + rng.normal(0, 0.2, problems)
        c = layer_contribution(scores(0.7, 0.05), base, scores(0.8, 0.03))
        found.append((c.value, c.standard_error))
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(5 / 6, abs=0.01)
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.05)


@pytest.mark.parametrize("full", [[0, 1, 0, 1], [1, 0, 1, 1], [1, 0, 0, 1]])
def test_undefined_where_full_is_the_base_within_noise(full):
    c = layer_contribution([1, 1, 1, 1], base=[1, 0, 0, 1], full=full)
    assert c.value is None and c.standard_error is None
    assert c.reason.startswith("full equals base within noise")


def test_undefined_by_the_seeds_alone():
    base, full = [0.0, 0.0, 0.0], [[0.9, 0.9, 0.9], [0.1, 0.1, 0.1]]
    assert layer_contribution(base, base, full).reason  # one seed says .9, the other .1
    assert layer_contribution(base, base, full[0]).value == 0
    assert layer_contribution(1.0, base=0.5, full=0.5).value is None


def test_the_variance_of_seeds_is_that_of_all_blocks():
    """Alone, the noisiest block would be told from none, and those whose two seeds agree from each other."""
    flat = lambda *levels: [[level, level + 0.1] for level in levels]  # noqa: E731  # the problems pair exactly
    scores = {0: flat(0.5, 0.9), 1: flat(0.9, 0.9), 2: flat(0.85, 0.85), 3: flat(0.6, 0.6)}
    difference, error = gain(scores[1], scores[0])
    assert difference == pytest.approx(0.2) and error == pytest.approx(0.2)  # not beyond noise
    assert gain(scores[1], scores[2])[1] == pytest.approx(0)  # beyond it
    # pooled over four blocks: .08 / 4 = .02 for a run, .01 for a mean of two, .02 for a difference: the bound is .277
    assert not_told_apart([1, 2, 0, 3], scores) == [1, 2, 0]
    more = {**scores, **{k: flat(0.3, 0.3) for k in range(4, 12)}}  # .08 / 12: the bound is .160
    assert not_told_apart([1, 2, 0, 3, *range(4, 12)], more) == [1, 2]


def test_blocks_of_one_seed_are_compared_by_their_problems_alone():
    best, near, far = [1, 1, 1, 0, 1], [1, 1, 0, 1, 1], [0, 0, 0, 0, 1]
    assert not_told_apart([7, 2, 5], {7: best, 2: near, 5: far}) == [7, 2]
    assert not_told_apart([7], {7: best}) == [7] and not_told_apart([], {}) == []
    # A block of one seed has the variance of the others' seeds too: sqrt(.02 / 2 + .02) * 1.96 = .339
    several = {0: [[0.7, 0.7], [0.9, 0.9]], 1: [0.55, 0.55], 2: [0.45, 0.45]}
    assert not_told_apart([0, 1, 2], several) == [0, 1]


@pytest.mark.parametrize(
    ("layer", "base", "full", "message"),
    [
        ([1, 0], [1, 0, 0], [1, 0], "same problems for layer, base and full; got 2, 3 and 2"),
        ([], [], [], "layer must hold finite scores"),
        ([1, float("nan")], [0, 0], [1, 1], "layer must hold finite scores"),
        ([1, 1], [0, 0], [[[1, 1]]], "full must hold finite scores"),
    ],
)
def test_scores_that_are_none(layer, base, full, message):
    with pytest.raises(ValueError, match=message):
        layer_contribution(layer, base, full)


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [2, 4, 8]) == 1
    assert rank_correlation([1, 2, 3], [8, 4, 2]) == -1
    # 1 - 6 sum d^2 / (n (n^2 - 1)), d = 1 1 1 1: 1 - 24 / 60
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    # ties: ranks 1.5 1.5 3 against 1 2 3, deviations -.5 -.5 1 and -1 0 1: 1.5 / sqrt(1.5 * 2)
    assert rank_correlation([0, 0, 5], [1, 2, 3]) == pytest.approx(1.5 / 3**0.5)
    assert rank_correlation([None, 1, 2, 3, 9], [7, 2, 4, 8, None]) == 1
    assert rank_correlation([True, False], [1, 0]) == 1


def test_rank_correlation_undefined():
    assert rank_correlation([], []) is None
    assert rank_correlation([1.0], [2.0]) is None
    assert rank_correlation([1.0, None], [2.0, 3.0]) is None
    assert rank_correlation([1.0, 2.0], [3.0, 3.0]) is None
    with pytest.raises(ValueError, match="one length, got 1 and 2"):
        rank_correlation([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        rank_correlation([1.0, float("nan")], [1.0, 2.0])


def test_the_published_profile_against_the_depth_prior():
    """Figures of our own on the published profile of Qwen3-1.7B-Base: .76 with the centre at .35 or .40, .47 at .50."""
    profile = json.loads((files("peft_onelayer") / "profiles" / "Qwen--Qwen3-1.7B-Base.json").read_text())

    def prior(centre):
        return rank_correlation(profile["contribution"], [-abs(k / 27 - centre) for k in range(28)])

    assert prior(0.35) == pytest.approx(0.76, abs=0.005)
    assert prior(0.40) == pytest.approx(0.76, abs=0.005)
    assert prior(0.50) == pytest.approx(0.47, abs=0.005)
    # The .47 rests on the rounding of k / 27: blocks k and 27 - k are equally far from the middle, and tied it is .49.
    tied = [-abs(2 * k - 27) for k in range(28)]
    assert rank_correlation(profile["contribution"], tied) == pytest.approx(0.49, abs=0.005)


def test_they_are_exported():
    assert peft_onelayer.layer_contribution is layer_contribution
    assert peft_onelayer.rank_correlation is rank_correlation
