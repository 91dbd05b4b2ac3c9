import numpy as np
import pytest

from peft_onelayer.probe.posterior import Measured, fit
from peft_onelayer.probe.prior import depth_prior

FLAT = [0.0] * 12


def measured(gains: dict[int, float], error: float = 0.01, updates: int = 4, common: float = 0.0) -> Measured:
    covariance = np.eye(len(gains)) * error**2 + common**2
    return Measured(list(gains), updates, np.array(list(gains.values())), covariance)


def test_without_noise_it_goes_through_the_gains():
    gains = {0: 0.1, 3: 0.4, 6: 0.2, 11: 0.0}
    belief = fit(FLAT, [measured(gains, error=1e-4)])
    at = np.array([4 * belief.mean[k] for k in gains])
    # up to the round's offset, which shifts all alike
    assert at - at.mean() == pytest.approx(np.array(list(gains.values())) - 0.175, abs=2e-3)


def test_an_isolated_peak_stays_and_neighbours_share():
    gains = dict.fromkeys(range(12), 0.05) | {2: 0.5}
    belief = fit(depth_prior(12), [measured(gains)])
    assert belief.mean.argmax() == 2 and belief.mean[2] - belief.mean[6] > 0.35 / 4
    seen = fit(FLAT, [measured({0: 0.0, 4: 0.3, 6: 0.3, 11: 0.0})])
    assert seen.mean[5] > seen.mean[9]  # between two good ones
    assert seen.error[5] > seen.error[4]


def test_noise_leaves_the_prior_in_charge():
    gains = {0: 0.03, 6: 0.02, 11: 0.025}
    assert fit(depth_prior(12), [measured(gains, error=0.03)]).mean.argmax() in (5, 6)
    assert fit(depth_prior(12), [measured(gains, error=0.001)]).mean.argmax() == 0


def test_noise_that_all_share_does_not_blur_the_ranking():
    gains = {0: 0.10, 5: 0.14, 11: 0.08}
    alone, common = (fit(FLAT, [measured(gains, common=common)]) for common in (0.0, 0.2))
    for belief in (alone, common):
        difference = belief.draws()[:, 5] - belief.draws()[:, 0]
        assert difference.mean() / difference.std() > 1.5
    assert common.error[5] > alone.error[5]


def test_a_later_round_is_compared_within_itself():
    """Gains do not grow in proportion: the finalists are not punished for it."""
    first = measured(dict.fromkeys(range(12), 0.1) | {4: 0.14, 5: 0.14})
    later = measured({4: 0.15, 5: 0.20}, updates=8)
    belief = fit(FLAT, [first, later])
    assert sorted(range(12), key=lambda k: -belief.mean[k])[:2] == [5, 4]


def test_draws_are_those_of_the_belief():
    belief = fit(depth_prior(12), [measured({0: 0.1, 6: 0.3, 11: 0.2})])
    draws = belief.draws()
    assert draws.mean(axis=0) == pytest.approx(belief.mean, abs=5 * belief.error.max() / 60)
    assert draws.std(axis=0) == pytest.approx(belief.error, rel=0.1)
    assert np.array_equal(draws, belief.draws())
