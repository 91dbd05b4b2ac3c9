"""From gains to a ranking: the arithmetic, on gains that nobody trained for."""

import numpy as np
import pytest

from peft_onelayer.probe.outcome import make_ranking, measured_rounds
from peft_onelayer.probe.posterior import fit
from peft_onelayer.probe.settings import DEFAULT_SETTINGS
from peft_onelayer.probe.updates import Candidate


def ranked(scale):
    """A race of five blocks on 16 prompts, all rewards times `scale`."""
    draws = np.random.default_rng(1)
    candidates = {}
    for k, gain in {0: 0.02, 3: 0.1, 6: 0.25, 9: 0.22, 11: 0.05}.items():
        candidates[k] = Candidate(k, 1e-4)
        candidates[k].gains[0] = list(scale * (gain + draws.normal(0, 0.15, 16)))
    rounds = measured_rounds(candidates, DEFAULT_SETTINGS, scale)
    about = {
        "model": "m",
        "revision": None,
        "method": "race",
        "learning_rate": None,
        "cost": {},
        "task": "t",
        "seed": 0,
    }
    return make_ranking(candidates, fit([0.0] * 12, rounds), range(12), DEFAULT_SETTINGS, scale, **about)


@pytest.mark.parametrize("scale", [0.001, 0.03, 0.1, 100.0])
def test_a_ranking_does_not_depend_on_the_unit_of_the_rewards(scale):
    one, other = ranked(1.0), ranked(scale)
    assert one.pick == 6 == other.pick
    assert (other.order, other.tied, other.expected) == (one.order, one.tied, one.expected)
    assert np.allclose(other.scores, scale * np.array(one.scores), rtol=1e-6, atol=0)
    assert np.allclose(other.errors, scale * np.array(one.errors), rtol=1e-6, atol=0)
    for k, rounds in one.rounds.items():
        assert np.allclose(other.rounds[k], np.array(rounds) * [1, scale, scale], rtol=1e-6, atol=0)
