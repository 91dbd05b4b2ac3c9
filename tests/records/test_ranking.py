import json
from dataclasses import replace
from pathlib import Path

import pytest

from peft_onelayer.records.ranking import LayerRanking

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


def test_json_round_trip_with_the_documented_fields():
    assert LayerRanking.from_json(RANKING.to_json()) == RANKING
    assert json.loads(RANKING.to_json()).keys() == {
        *("format", "model", "revision", "num_layers", "method", "scores", "errors", "order", "tied", "pick"),
        *("learning_rate", "cost", "task", "seed", "learning_rates", "expected", "rounds", "fallback"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "p.json holds no fields"),
        ("{}", 'p.json holds no layer profile: its "format" is None'),
        ('{"format": "onelayer-ranking-1"}', "p.json: model is missing, expected text"),
        ("nonsense", "p.json is not JSON: Expecting value"),
    ],
)
def test_something_else_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        LayerRanking.from_json(text, "p.json")


def ranked(**fields):
    values = {"num_layers": 12, "scores": [0.1] * 12, "errors": [0.01] * 12, "order": [0, 3, 4], "tied": [0], "pick": 0}
    return replace(RANKING, **{**values, **fields})


def test_the_choice_is_the_pick_or_the_middle_blocks_where_nothing_gains():
    assert ranked().choice == [0]
    assert ranked(pick=None).choice == [3, 4, 5, 6, 7]
    assert ranked(num_layers=4, pick=None).choice == [0]
    assert ranked(num_layers=4, pick=None, order=[2, 1]).choice == [2]


def test_the_rate_is_that_of_the_pick():
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
