"""What a ranking says, with a pick and without one."""

import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from onelayer_cli.probe import _mark, _print
from peft_onelayer.layers import ranking_without_gain, resolve_layers
from peft_onelayer.records.ranking import LayerRanking, Sweep
from peft_onelayer.runs import ranking as ranking_module
from peft_onelayer.runs.progress import Progress
from peft_onelayer.runs.ranking import describe
from peft_onelayer.statistics import gain_of_rounds

ROUNDS = {"0": [[4.0, 0.01, 0.03]], "2": [[4.0, 0.05, 0.04], [8.0, 0.02, 0.10]]}


def without_a_gain(num_layers=3):
    return LayerRanking(
        model="m",
        revision=None,
        num_layers=num_layers,
        method="auto",
        scores=[0.01, 0.2, 0.1],
        errors=[0.01, 0.01, 0.01],
        order=[1, 2, 0],  # by its neighbours block 1 is the best, and did not run
        tied=[1, 2, 0],
        pick=None,
        learning_rate=None,
        cost={"tokens_generated": 1, "tokens_trained": 2, "seconds": 3, "share": 0.2},
        task="t",
        seed=0,
        rounds=ROUNDS,
    )


def test_the_best_block_that_ran_is_named_with_the_gain_of_its_own_rounds():
    # By hand: the gain per update is (4 * .05 / .04^2 + 8 * .02 / .1^2) / (16 / .04^2 + 64 / .1^2).
    slope = (4 * 0.05 / 0.04**2 + 8 * 0.02 / 0.1**2) / (16 / 0.04**2 + 64 / 0.1**2)
    error = 8 / math.sqrt(16 / 0.04**2 + 64 / 0.1**2)
    assert gain_of_rounds(ROUNDS["2"]) == pytest.approx((8 * slope, error))
    said = f"(most: block 2, in its own rounds {800 * slope:+.1f} points of reward, standard error {100 * error:.1f})"
    assert said in describe(without_a_gain())[0]


def test_no_block_is_called_the_best_where_none_gained(tmp_path):
    ranking = without_a_gain()
    assert [_mark(ranking, k) for k in ranking.order] == ["choice", "", ""] and ranking.choice == [1]
    assert [_mark(replace(ranking, pick=2), k) for k in (1, 2, 0)] == ["tied", "best", "tied"]
    file = tmp_path / "ranking.json"
    file.write_text(ranking.to_json())
    assert ranking_without_gain(f"0,top-1@{file}") == str(file)
    assert ranking_without_gain("0,middle") is None
    file.write_text(replace(ranking, pick=2).to_json())
    assert ranking_without_gain(f"top-1@{file}") is None
    assert [resolve_layers(f"{part}@{file}", 3) for part in ("top-1", "top-2", "worst-1")] == [[2], [1, 2], [0]]
    no_gain = replace(ranking, method="sweep", rounds=None, sweep=Sweep([None] * 3, 0.3, 0.2))
    file.write_text(no_gain.to_json())
    assert ranking_without_gain(f"top-1@{file}") == str(file)


def test_the_pick_is_said_to_gain_what_its_own_rounds_measured():
    ranking = replace(without_a_gain(), pick=2, tied=[1, 2])
    gain, error = gain_of_rounds(ROUNDS["2"])
    said = f"block 2 gains {100 * gain:+.1f} points of reward in its own 8 updates (standard error {100 * error:.1f})"
    assert describe(ranking)[0] == f"{said}, but block 1 may be as good: the differences are within noise"
    assert describe(replace(ranking, pick=0))[0].startswith(
        "block 0 gains +1.0 points of reward in its own 4 updates (standard error 3.0)"
    )


def test_errors_of_a_race_are_said_to_be_of_differences(capsys):
    of_race = replace(without_a_gain(), pick=2)
    _print(of_race)
    assert "± from the mean" in (said := " ".join(capsys.readouterr().out.split()))
    assert "± is the standard error of a block's difference from the mean of all ranked blocks" in said
    _print(replace(of_race, method="prior", errors=[None] * 3, rounds=None))
    assert "±" not in capsys.readouterr().out


def test_without_a_gain_the_rounds_together_err_as_rarely_as_one():
    draws = np.random.default_rng(0).standard_normal((20_000, 3))
    errors = [0.03, 0.05, 0.2]
    found = (
        gain_of_rounds([[4 * i + 4, e * d, e] for i, (e, d) in enumerate(zip(errors, row, strict=True))])
        for row in draws
    )
    share = np.mean([gain > 1.959964 * error for gain, error in found])
    assert abs(share - 0.025) < 4 * math.sqrt(0.025 * 0.975 / 20_000)


@pytest.mark.parametrize("method", ["race", "prior"])
def test_before_the_first_block_a_race_says_that_the_base_is_at_work(monkeypatch, method):
    told = []

    class Told(Progress):
        @contextmanager
        def bar(self, description, total, unit=""):
            yield lambda done, detail="": told.append((done, detail))

    def probe(*given, on_candidate, **options):
        on_candidate(0, 7, 0.294)

    monkeypatch.setattr(ranking_module, "probe_layers", probe)
    ranking_module.rank_blocks(None, None, None, Told(), method=method, budget=0.25)
    assert told == [(0, "completions of the base")] * (method == "race") + [(29, "round 1: block 7")]
