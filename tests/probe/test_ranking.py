import json

import pytest

from peft_onelayer.probe.ranking import LayerRanking

RANKING = LayerRanking(
    model="m",
    revision=None,
    num_layers=3,
    method="short_rl",
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
        *("learning_rate", "cost", "task", "seed"),
    }


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "onelayer-ranking-1"}', "nonsense"])
def test_something_else_is_refused(text):
    with pytest.raises(ValueError, match=r"not a layer ranking|Expecting value"):
        LayerRanking.from_json(text)
