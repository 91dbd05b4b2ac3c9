"""The layer profile: one type for a probe, a sweep and a paper; files of each kind, and what is refused."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from peft_onelayer.records.ranking import LayerRanking, Sweep

OLD = Path(__file__).with_name("old")

RANKING = LayerRanking(
    model="m",
    revision=None,
    num_layers=3,
    method="race",
    scores=[0.1, None, 0.3],
    errors=[0.01, None, 0.02],
    order=[2, 0],
    tied=[2],
    pick=2,
    learning_rate=3e-3,
    cost={"tokens_generated": 10, "tokens_trained": 20, "seconds": 1.5, "share": 0.1},
    task="arithmetic",
    seed=0,
)
COMMON = {
    *("format", "model", "revision", "num_layers", "method", "scores", "errors", "order", "tied", "pick"),
    *("learning_rate", "cost", "task", "seed", "learning_rates", "expected", "rounds", "fallback"),
}
SWEEP = replace(RANKING, method="sweep", sweep=Sweep([0.4, None, 1.1], base=0.2, full=0.5, undefined=None))


def test_json_round_trip_with_the_documented_fields():
    assert LayerRanking.from_json(RANKING.to_json()) == RANKING
    assert json.loads(RANKING.to_json()).keys() == COMMON
    fields = json.loads(SWEEP.to_json())
    assert LayerRanking.from_json(SWEEP.to_json()) == SWEEP
    assert fields["format"] == "onelayer-sweep-1" and fields["contribution"] == [0.4, None, 1.1]
    assert fields["base"] == 0.2 and fields.keys() > COMMON


def test_a_published_profile_is_one_too():
    text = (files("peft_onelayer") / "profiles" / "Qwen--Qwen3-8B-Base.json").read_text()
    profile = LayerRanking.from_json(text)
    assert (profile.num_layers, profile.method, profile.pick, profile.choice) == (36, "published", 16, [16])
    assert profile.worth == profile.scores == profile.sweep.contribution and profile.scores[0] == -0.51
    assert (profile.sweep.base, profile.sweep.full) == (58.0, 66.5) and not profile.measured
    assert "2607.01232" in profile.source


def test_what_ranks_the_blocks():
    assert RANKING.worth == RANKING.scores
    assert SWEEP.worth == [0.4, None, 1.1]
    assert replace(SWEEP, sweep=replace(SWEEP.sweep, undefined="full equals base")).worth == RANKING.scores


def test_a_file_with_c_of_a_full_run_that_lost_goes_by_the_gains():
    written = replace(SWEEP.sweep, contribution=[0.34, None, -0.34], contribution_errors=[0.1, None, 0.1])
    read_with = lambda *gain: LayerRanking.from_json(  # noqa: E731
        replace(SWEEP, sweep=replace(written, full_gain=list(gain))).to_json()
    )
    lost = read_with(-0.167, 0.02)
    assert lost.worth == RANKING.scores and lost.sweep.contribution == [None] * 3 == lost.sweep.contribution_errors
    assert lost.sweep.undefined == (
        "all parameters ended below the base (-0.1670 ± 0.0200), so there is no gain to take a share of"
    )
    assert read_with(0.03, 0.02).sweep.undefined.startswith("full equals base within noise")
    assert read_with(-0.167, None).worth == RANKING.scores
    assert read_with(0.167, 0.02).worth == read_with(None, None).worth == [0.34, None, -0.34]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "theirs"}, 'its "format" is theirs, expected onelayer-ranking-1, onelayer-sweep-1'),
        ({"pick": "2"}, "p.json: pick is 2, expected an integer or null"),
        ({"scores": [0.1, None, "x"]}, "p.json: scores[2] is x, expected a number or null"),
        ({"scores": [0.1]}, "p.json: scores has 1 entries, expected 3, one per block"),
        ({"scores": [0.1, None, float("nan")]}, "p.json: scores holds a number that is not finite"),
        ({"order": [2, 7]}, "p.json: order names a block that is not one of 0 to 2"),
        ({"num_layers": True}, "p.json: num_layers is True, expected an integer"),
        ({"bonus": 1}, "p.json: bonus is not known; expected model, revision"),
        ({"model": None}, "p.json: model is None, expected text"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    with pytest.raises(ValueError) as error:
        LayerRanking.from_json(json.dumps(json.loads(RANKING.to_json()) | change), "p.json")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_gain_of_full_training_without_its_error_is_named():
    with pytest.raises(ValueError, match=r"p\.json: full_gain has 1 entries, expected a gain and its error"):
        LayerRanking.from_dict(replace(SWEEP, sweep=replace(SWEEP.sweep, full_gain=[0.4])).to_dict(), "p.json")


def test_a_missing_field_is_named():
    fields = json.loads(RANKING.to_json())
    del fields["order"]
    with pytest.raises(ValueError, match=r"p\.json: order is missing, expected a list of an integer"):
        LayerRanking.from_dict(fields, "p.json")


@pytest.mark.parametrize("text", ["[]", "nonsense", "[" * 100_000, ""])
def test_something_else_is_refused(text):
    with pytest.raises(ValueError, match=r"p\.json (is not JSON|holds no fields)"):
        LayerRanking.from_json(text, "p.json")


def ranked(num_layers=12, **fields):
    values = {"num_layers": num_layers, "order": list(range(num_layers)), "tied": [0, 3], "pick": 0}
    return replace(RANKING, **{**values, **fields})


def test_the_choice_is_the_pick_or_the_middle():
    assert ranked().choice == [0]
    assert ranked(expected=0.5).choice == [0]
    assert ranked(pick=None).choice == [3, 4, 5, 6, 7]
    assert ranked(num_layers=5, pick=None).choice == [0, 1, 2, 3, 4]
    assert ranked(num_layers=4, pick=None).choice == [0]  # there are no five
    assert ranked(num_layers=4, pick=3).choice == [3]


def test_the_choice_without_a_pick_is_among_the_candidates():
    assert ranked(pick=None, order=[8, 5, 0]).choice == [5]
    assert ranked(pick=None, order=[7, 8, 9, 6]).choice == [6, 7]
    assert ranked(pick=None, order=[9, 8, 11]).choice == [9]  # none of the middle: the first of them


def test_the_rate_is_that_of_the_choice():
    assert ranked(learning_rates=[1e-4, *[None] * 11]).choice_learning_rate == 1e-4
    assert ranked().choice_learning_rate == 3e-3
    assert ranked(pick=None, learning_rates=[1e-4, *[None] * 11]).choice_learning_rate == 3e-3


def test_what_earlier_versions_wrote_is_written_alike():
    for name in ("race.json", "sweep.json"):
        text = (OLD / name).read_text(encoding="utf-8")
        ranking = LayerRanking.from_json(text, name)
        assert ranking.to_dict() == json.loads(text)
        assert (ranking.sweep is not None) == (name == "sweep.json")
        assert ranking.choice == {"race.json": [3, 4, 5, 6, 7], "sweep.json": [ranking.pick]}[name]
