"""C under three regimes of learning rates: which runs are added and said, what comes out, and whose the paper's is."""

import json
import os

import fake_runs
import pytest
from specs import DEMO

from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.sweep.metric import gain, layer_contribution
from peft_onelayer.sweep.plan import plan_sweep
from peft_onelayer.sweep.regimes import (
    BOTH_TUNED,
    EQUAL,
    FULL_TUNED,
    describe_added,
    papers_regime,
    regime_lines,
    regime_table,
)
from peft_onelayer.sweep.settings import SweepSettings
from peft_onelayer.sweep.sweep import sweep_layers

pytestmark = pytest.mark.usefixtures("light_workers")
RATES = [1e-4, 1e-3]
LEVELS = {"full 0.0001": 0.9, "full 0.001": 0.6, "full 0.003": 0.5}  # by rate; all others go by their block
LEVELS |= {f"{k} 0.001": 0.7 + k / 100 for k in (0, 5, 11)} | {f"{k} 0.003": 0.4 for k in (0, 5, 11)}


def settings(**changes):
    given = {"layers": [0, 5, 11], "steps": 2, "seeds": (0, 1), "search_learning_rates": RATES, "regimes": True}
    return SweepSettings(**{"model": DEMO, "task": "arithmetic", "problems": 50, **given, **changes})


def sweep(out, notes=None, calls=None, **changes):
    os.environ["FAKE_RUNS_FATE"] = json.dumps({"levels": LEVELS})
    return sweep_layers(
        settings(**changes),
        out=out,
        workers=1,
        run_row=fake_runs.run,
        on_note=(notes if notes is not None else []).append,
        on_row=lambda done, total, spec, row: (calls if calls is not None else []).append((done, total)),
    )


def trained(out, split="test"):
    """(block or full, rate, seed) of every row of the evaluation but the base's, and its scores."""
    rows = [row for row in fake_runs.stored(out).values() if row["spec"]["split"] == split]
    keys = [(r["spec"]["layer"], r["spec"]["settings"].get("learning_rate"), r["spec"]["seed"]) for r in rows]
    return dict(zip(keys, (row["scores"] for row in rows), strict=True))


def test_all_parameters_run_at_the_rate_of_the_blocks_too(tmp_path):
    notes, calls = [], []
    profile = sweep(tmp_path / "out", notes, calls)
    assert (profile.learning_rate, profile.sweep.full_learning_rate) == (1e-3, 1e-4)
    runs = trained(tmp_path / "out")
    assert {(layer, rate) for layer, rate, _ in runs} == {
        ("base", None),
        ("full", 1e-4),
        ("full", 1e-3),
        (0, 1e-3),
        (5, 1e-3),
        (11, 1e-3),
    }
    assert notes == [
        "--regimes adds 2 runs to the sweep (all parameters at the blocks' tuned rate, for each of 2 seeds), fewer "
        "where a tuned rate is the same"
    ]
    total = 4 + 1 + 2 * 4 + 2  # of the search, the base, blocks and full, and what was added
    assert calls == [(i, total) for i in range(1, total + 1)]
    base = runs["base", None, 0]
    of_full = {rate: [runs["full", rate, seed] for seed in (0, 1)] for rate in RATES}
    regimes = profile.sweep.regimes
    rates = {name: (regime["block_rate"], regime["full_rate"]) for name, regime in regimes.items()}
    assert rates == {EQUAL: (1e-3, 1e-3), FULL_TUNED: (1e-3, 1e-4), BOTH_TUNED: (1e-3, 1e-4)}
    for regime in regimes.values():
        assert regime["full_gain"] == list(gain(of_full[regime["full_rate"]], base))
        for k in (0, 5, 11):
            c = layer_contribution([runs[k, 1e-3, seed] for seed in (0, 1)], base, of_full[regime["full_rate"]])
            assert (regime["contribution"][k], regime["contribution_errors"][k]) == (c.value, c.standard_error)
        assert regime["contribution"][1] is None
    assert regimes[BOTH_TUNED]["contribution"] == profile.sweep.contribution
    assert profile.cost["tokens_trained"] == (4 + 8 + 2) * 40  # what was added is counted
    assert LayerRanking.from_json(profile.to_json()) == profile


def test_a_rate_that_is_given_is_the_one_of_the_equal_runs(tmp_path):
    notes = []
    profile = sweep(tmp_path / "out", notes, learning_rate=3e-3, seeds=(0,))
    runs = trained(tmp_path / "out")
    assert {(layer, rate) for layer, rate, _ in runs if layer != "base"} == {
        *((layer, 3e-3) for layer in (0, 5, 11, "full")),
        *((layer, 1e-3) for layer in (0, 5, 11)),
        ("full", 1e-4),
    }
    assert notes[0].startswith(
        "--regimes adds 4 runs to the sweep (all parameters and 3 blocks at 0.003, for the seed)"
    )
    regimes = profile.sweep.regimes
    rates = {name: (regime["block_rate"], regime["full_rate"]) for name, regime in regimes.items()}
    assert rates == {EQUAL: (3e-3, 3e-3), FULL_TUNED: (3e-3, 1e-4), BOTH_TUNED: (1e-3, 1e-4)}
    base = runs["base", None, 0]
    for name, (block, full) in rates.items():
        c = layer_contribution(runs[5, block, 0], base, runs["full", full, 0])
        assert regimes[name]["contribution"][5] == c.value
    assert regimes[EQUAL]["contribution"][5] > regimes[FULL_TUNED]["contribution"][5]  # its full run is worse


def test_what_is_there_does_not_run_again_and_a_sweep_gets_its_regimes_later(tmp_path):
    sweep(tmp_path / "out", regimes=False)
    before = set(fake_runs.started(tmp_path))
    profile = sweep(tmp_path / "out")
    assert len(set(fake_runs.started(tmp_path)) - before) == 2 and profile.sweep.regimes is not None
    assert set(fake_runs.started(tmp_path).values()) == {1}
    sweep(tmp_path / "out")
    assert set(fake_runs.started(tmp_path).values()) == {1}


def test_a_rate_that_is_also_the_tuned_one_is_trained_once(tmp_path):
    calls = []
    profile = sweep(tmp_path / "out", calls=calls, search_learning_rates=[1e-3], learning_rate=1e-3)
    assert len(trained(tmp_path / "out")) == 1 + 2 * 4 and calls[-1][0] == calls[-1][1] == 2 + 1 + 8 + 8
    assert profile.cost["tokens_trained"] == (2 + 8) * 40
    regimes = profile.sweep.regimes
    assert regimes[EQUAL] == regimes[FULL_TUNED] == regimes[BOTH_TUNED]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"search_learning_rates": ()}, "--regimes compares tuned rates with equal ones: give rates to choose from"),
        (
            {"full_learning_rate": 1e-4},
            "--regimes has the rate of all parameters tuned; leave --full-learning-rate out",
        ),
        ({"learning_rate": {0: 1e-3, 5: 1e-3, 11: 1e-4}}, "the regimes need one learning rate for all blocks"),
    ],
)
def test_regimes_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sweep(tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "rows").exists() or not list((tmp_path / "out" / "rows").iterdir())


def test_what_is_added_is_said_for_one_run(tmp_path):
    asked = settings(seeds=(0,))
    assert describe_added(plan_sweep(asked), asked).startswith("--regimes adds 1 run to the sweep (all parameters at")


def regime(block, full, values, undefined=None):
    return {
        "block_rate": block,
        "full_rate": full,
        "full_gain": [0.4, 0.01],
        "contribution": values,
        "contribution_errors": [None if value is None else 0.1 for value in values],
        "undefined": undefined,
    }


def test_the_table_has_each_block_under_each_regime_and_an_undefined_one_is_said():
    regimes = {
        EQUAL: regime(5e-6, 5e-6, [None, None, None], "full equals base within noise"),
        FULL_TUNED: regime(5e-6, 1e-6, [0.5, None, 1.2]),
        BOTH_TUNED: regime(2e-5, 1e-6, [0.25, None, 0.5]),
    }
    header, rows = regime_table(regimes)
    assert header == ["", EQUAL, FULL_TUNED, BOTH_TUNED]
    assert rows[0] == ["rates: block, full", "5e-06, 5e-06", "5e-06, 1e-06", "2e-05, 1e-06"]
    assert rows[1] == ["C of block 0", "undefined", "0.50 [0.30, 0.70]", "0.25 [0.05, 0.45]"]
    assert rows[2][0] == "C of block 2" and rows[3] == ["highest C", "", "1.20", "0.50"] and len(rows) == 4
    lines = regime_lines(regimes, [0])
    assert "of one seed the spread of seeds is not known" in lines[0]
    assert "C is undefined under equal rates: full equals base within noise." in lines
    assert f"{FULL_TUNED} is nearest to it here, with 0.2." in lines[-1]
    assert "the same runs" not in " ".join(lines)
    same = regime_lines({**regimes, BOTH_TUNED: regimes[FULL_TUNED]}, [0, 1])
    assert f"{FULL_TUNED}: the same runs as {BOTH_TUNED}" in " ".join(same) and "over the seeds." in same[0]


@pytest.mark.parametrize(
    "rates, named",
    [
        (
            {EQUAL: (1e-3, 1e-3), FULL_TUNED: (1e-3, 1e-4), BOTH_TUNED: (3e-4, 1e-4)},
            f"{BOTH_TUNED} is nearest to it here, with 0.33",
        ),
        (
            {EQUAL: (1e-3, 1e-3), FULL_TUNED: (1e-3, 2e-4), BOTH_TUNED: (2e-4, 2e-4)},
            f"{FULL_TUNED} is nearest to it here, with 0.2",
        ),
        (
            {EQUAL: (1e-3, 1e-3), FULL_TUNED: (1e-3, 1e-3), BOTH_TUNED: (1e-3, 1e-3)},
            "none of the regimes here is theirs",
        ),
    ],
)
def test_the_regime_of_the_papers_table(rates, named):
    said = papers_regime(rates)
    assert named in said and "0.2 of a block's rate" in said and "transcribed" in said
