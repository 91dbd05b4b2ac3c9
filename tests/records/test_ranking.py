import json

import pytest

from peft_onelayer.records.ranking import LayerRanking

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


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "onelayer-ranking-1"}', "nonsense"])
def test_something_else_is_refused(text):
    with pytest.raises(ValueError, match=r"not a layer ranking|Expecting value"):
        LayerRanking.from_json(text)


def ranked(**fields):
    values = {**vars(RANKING), "num_layers": 12, "order": [0, 3, 4, 5, 6, 7], "tied": [0, 3, 4, 5, 6, 7], "pick": 0}
    return LayerRanking(**{**values, **fields})


def test_the_choice_is_the_pick_or_mid_5_where_that_is_the_better_bet():
    assert ranked(expected=0.99).choice == "0"
    assert ranked(expected=None).choice == "0"
    assert ranked(expected=0.8).choice == "mid-5"  # all of it tied with the best
    assert ranked(expected=0.8, tied=[0, 3, 4, 5, 6]).choice == "0"
    assert ranked(pick=None).choice == "mid-5"
    assert ranked(num_layers=4, pick=None).choice == "0"


def test_the_rate_is_that_of_the_pick():
    assert ranked(learning_rates=[1e-4, *[None] * 11]).recommended_rate == 1e-4
    assert ranked().recommended_rate == 3e-3
    assert ranked(pick=None, learning_rates=[1e-4, *[None] * 11]).recommended_rate == 3e-3
