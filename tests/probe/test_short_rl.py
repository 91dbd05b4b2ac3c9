import demo_model
import torch

from peft_onelayer.probe import short_rl
from peft_onelayer.probe.ranking import LayerRanking
from peft_onelayer.tasks import load_task
from peft_onelayer.tasks.evaluation import Evaluation


def test_a_probe_of_two_blocks_leaves_the_model_as_it_was():
    model, tokenizer = demo_model.load()
    before = {name: p.clone() for name, p in model.named_parameters()}
    steps = []
    ranking = short_rl.probe_layers(
        model,
        tokenizer,
        load_task("arithmetic"),
        layers=[2, 5],
        steps=2,
        problems=32,
        training_steps=10,
        on_step=lambda layer, step, reward: steps.append((layer, step)),
    )
    assert steps == [(2, 1), (2, 2), (5, 1), (5, 2)]
    assert {name for name, _ in model.named_parameters()} == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert ranking.num_layers == 12 and ranking.method == "short_rl" and ranking.task == "arithmetic"
    assert [i for i, score in enumerate(ranking.scores) if score is not None] == [2, 5]
    assert [i for i, error in enumerate(ranking.errors) if error is not None] == [2, 5]
    assert sorted(ranking.order) == [2, 5] and ranking.order[0] in ranking.tied
    assert ranking.scores[ranking.order[0]] >= ranking.scores[ranking.order[1]]
    # two runs of two steps and three evaluations, against ten steps
    assert 0.4 < ranking.cost["share"] < 0.6
    assert LayerRanking.from_json(ranking.to_json()) == ranking


def test_the_choice(monkeypatch):
    """From given scores: the best, what is tied with it, and the block nearest the middle among those."""

    def evaluation(*scores):
        return Evaluation(problems=tuple(map(str, range(len(scores)))), scores=scores, samples=1)

    def choose(base, *after):
        measured = iter([base, *after])
        monkeypatch.setattr(short_rl, "evaluate", lambda *args, **kwargs: next(measured))
        result = type("Result", (), {"tokens_generated": 1, "tokens_trained": 1})()
        result.model = type("Model", (), {"unload": lambda self: None})()
        monkeypatch.setattr(short_rl, "train_layer", lambda *args, **kwargs: result)
        model, _ = demo_model.load()
        return short_rl.probe_layers(model, None, load_task("sort"), layers=range(len(after)))

    base = evaluation(0, 0, 0, 0)
    better, best, noisy = evaluation(0.5, 0.5, 0.5, 0.4), evaluation(1, 1, 1, 0.9), evaluation(1, 1, 1, 0.8)
    clear = choose(base, better, best, base)
    assert (clear.order, clear.tied, clear.pick) == ([1, 0, 2], [1], 1)
    tie = choose(base, best, better, noisy)
    assert (tie.order, tie.tied, tie.pick) == ([0, 2, 1], [0, 2], 2)  # 2 is nearer the middle of twelve blocks
    nothing = choose(base, evaluation(0, 0, 0, 0.1), base)
    assert nothing.order[0] == 0 and nothing.pick is None
