"""The race on the demo model: what it leaves, what it spends, and that it finds a damaged block."""

import math
import random
from dataclasses import replace

import demo_model
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_onelayer.probe.batch import graded_batch
from peft_onelayer.probe.outcome import measured_rounds, rate_together
from peft_onelayer.probe.probe import probe_layers
from peft_onelayer.probe.race import BudgetError, NothingToLearnError, _Race, race, stream_seed
from peft_onelayer.probe.settings import DEFAULT_SETTINGS
from peft_onelayer.probe.updates import Candidate, trained_candidate, update
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.rl.recipe import Recipe, demo_recipe, make_recipe
from peft_onelayer.rl.training import completions_per_step, train_layer
from peft_onelayer.rollouts.sampling import sample_rollouts
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import Task, load_task

ARITHMETIC = load_task("arithmetic")


def demo_race(task=ARITHMETIC, training_steps=150, rank=race, recipe=None, **options):
    """A race on the demo model for a run of the demo's recipe, or of another."""
    model, tokenizer = demo_model.load()
    recipe = recipe or demo_recipe(task, training_steps)
    return rank(model, tokenizer, task, training_steps=training_steps, recipe=recipe, **options)


def luck():
    """A task whose rewards come from a stream of random numbers."""
    stream = random.Random(0)
    return Task(
        name="luck",
        rows=ARITHMETIC.rows,
        reward=lambda completions, **_: [float(stream.random() < 0.3) for _ in completions],
        max_completion_tokens=5,
        data={},
    )


def test_a_race_of_one_prompt_is_refused():
    task = replace(ARITHMETIC, rows=lambda split, n, seed: ARITHMETIC.rows(split, min(n, 1), seed))
    with pytest.raises(ValueError, match=r"^a race scores blocks on at least 2 prompts, and task arithmetic has 1 to "):
        demo_race(task, layers=[3, 5, 7])


@pytest.fixture(scope="module")
def default():
    """A small race, and the model's weights before and after."""
    model, tokenizer = demo_model.load()
    before = {name: p.clone() for name, p in model.named_parameters()}
    turns = []
    ranking = race(
        model,
        tokenizer,
        ARITHMETIC,
        training_steps=50,
        recipe=demo_recipe(ARITHMETIC, 50),
        budget=0.1,
        on_candidate=lambda number, layer, spent: turns.append((number, layer, spent)),
    )
    return ranking, turns, model, before


def test_it_ranks_every_block_and_leaves_the_model_as_it_was(default):
    ranking, turns, model, before = default
    assert {name for name, _ in model.named_parameters()} == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(not p.requires_grad or name in before for name, p in model.named_parameters())
    assert ranking.method == "auto" and ranking.task == "arithmetic" and ranking.num_layers == 12
    assert sorted(ranking.order) == list(range(12))
    assert all(s is not None and e is not None and e > 0 for s, e in zip(ranking.scores, ranking.errors, strict=True))
    raced = {int(k) for k in ranking.rounds}
    assert {layer for _, layer, _ in turns} == raced and {0, 11} <= raced < set(range(12))
    assert {k for k, rate in enumerate(ranking.learning_rates) if rate is not None} == raced
    assert all(0 < rate <= 3e-3 for rate in ranking.learning_rates if rate is not None)
    assert ranking.pick in (None, *raced) and ranking.order[0] in ranking.tied
    assert 0 <= ranking.expected <= 1
    assert LayerRanking.from_json(ranking.to_json()) == ranking
    assert [spent for *_, spent in turns] == sorted(spent for *_, spent in turns)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [(0.05, 12), *(pytest.param(*case, marks=pytest.mark.more) for case in ((0.22, 12), (0.25, 5)))],
)
def test_the_budget_that_it_asks_for_is_enough(monkeypatch, budget, steps):
    with pytest.raises(BudgetError, match="no room for a round with 3 blocks; allow about ") as refused:
        demo_race(budget=budget, training_steps=steps)
    asked = float(str(refused.value).partition("about ")[2].partition(",")[0])
    assert budget < asked < 1
    starters, own = [], _Race._starters

    def started(race, layers):
        starters.extend(own(race, layers)[0])
        raise KeyboardInterrupt  # the rest of the race

    monkeypatch.setattr(_Race, "_starters", started)
    with pytest.raises(KeyboardInterrupt):
        demo_race(budget=asked, training_steps=steps)
    assert len(starters) >= 3


def test_gains_are_compared_in_the_range_of_all_rewards(monkeypatch):
    def started(race, layers):
        assert race.rewards == (-0.01, 0.03)
        raise KeyboardInterrupt  # the rest of the race

    monkeypatch.setattr(_Race, "_starters", started)
    task = luck()
    of_luck = replace(task, reward=lambda **given: [0.04 * reward - 0.01 for reward in task.reward(**given)])
    with pytest.raises(KeyboardInterrupt):
        demo_race(of_luck, budget=0.05)


@pytest.mark.more
@pytest.mark.parametrize("budget", [0.08, 0.25])
def test_the_base_passes_no_completion_that_no_update_uses(monkeypatch, budget):
    passed, own, new_round = [], _Race._with_old_policy, _Race._new_round

    def first_round(race, number, candidates):
        current = new_round(race, number, candidates)
        assert len(passed) == 1 and len(current.batch) <= passed[0] <= 1.25 * 4 * current.minibatch
        raise KeyboardInterrupt  # the rest of the race

    monkeypatch.setattr(_Race, "_with_old_policy", lambda race, batch: passed.append(len(batch)) or own(race, batch))
    monkeypatch.setattr(_Race, "_new_round", first_round)
    with pytest.raises(KeyboardInterrupt):
        demo_race(budget=budget, recipe=make_recipe("grpo", ARITHMETIC, prompts=8, completions=8))


@pytest.mark.more
def test_the_same_seed_gives_the_same_ranking(default):
    ranking, *_ = default
    again = demo_race(rank=probe_layers, training_steps=50, budget=0.1)
    assert again.scores == ranking.scores and again.rounds == ranking.rounds and again.pick == ranking.pick
    assert {k: v for k, v in again.cost.items() if k != "seconds"} == {
        k: v for k, v in ranking.cost.items() if k != "seconds"
    }


@pytest.mark.more
@pytest.mark.parametrize(
    ("budget", "steps"),
    [(0.05, 150), *(pytest.param(*case, marks=pytest.mark.more) for case in ((0.1, 150), (0.2, 60)))],
)
def test_it_spends_no_more_than_its_budget(budget, steps):
    ranking = demo_race(load_task("sort"), steps, budget=budget, layers=[1, 5, 9])
    assert 0 < ranking.cost["share"] <= budget
    assert sorted(ranking.order) == [1, 5, 9]
    # the share is of a run of 24 x 8 completions of 9 tokens to prompts of 10, which the trainer counts together
    one_run = steps * 192 * (9 + 19)
    spent = ranking.cost["tokens_generated"] + ranking.cost["tokens_trained"]
    assert spent / one_run == pytest.approx(ranking.cost["share"], rel=0.03)


@pytest.mark.more
def test_the_share_is_of_what_a_run_counts():
    """The same tokens that TRL counts in a run of the demo's recipe."""
    ranking = demo_race(budget=0.05, training_steps=100)
    recipe = demo_recipe(ARITHMETIC, 3)
    run = train_layer(*demo_model.load(), ARITHMETIC, 5, steps=3, seed=0, recipe=recipe)
    per_step = (run.tokens_generated + run.tokens_trained) / 3
    spent = ranking.cost["tokens_generated"] + ranking.cost["tokens_trained"]
    assert spent / (100 * per_step) == pytest.approx(ranking.cost["share"], rel=0.02)


def test_a_budget_too_small_says_what_it_needs():
    none = r"^a budget of 0\.1 of a run that generates 384 completions has no room for a race; it would cost more than"
    with pytest.raises(BudgetError, match=none):
        demo_race(budget=0.1, training_steps=2)
    with pytest.raises(BudgetError, match=r"has no room for a race; allow about 0\.30, or take") as refused:
        demo_race(budget=0.01, training_steps=12)
    assert not refused.value.cost["share"]
    with pytest.raises(BudgetError, match="no room for a round") as refused:
        demo_race(budget=0.002)
    assert not refused.value.cost["share"]  # before anything runs
    fallen_back = demo_race(rank=probe_layers, budget=0.1, training_steps=2)
    assert fallen_back.method == "prior" and fallen_back.pick == 5 and fallen_back.cost["share"] == 0
    assert fallen_back.fallback.startswith("a budget of 0.1 of a run that generates 384 completions has no room")
    fallen_back = demo_race(rank=probe_layers, budget=0.002)
    assert fallen_back.method == "prior" and "no room for a round" in fallen_back.fallback


@pytest.mark.more
def test_a_later_round_in_which_nobody_had_a_turn(monkeypatch):
    give_turns = _Race._give_turns

    def only_in_the_first(self, current, layers):
        if current.number == 0:
            give_turns(self, current, layers)

    monkeypatch.setattr(_Race, "_give_turns", only_in_the_first)
    ranking = demo_race(budget=0.05, layers=[1, 5, 9])
    assert sorted(ranking.order) == [1, 5, 9] and all(len(rounds) == 1 for rounds in ranking.rounds.values())


def test_rewards_that_teach_nothing():
    hopeless = Task(
        name="hopeless",
        rows=ARITHMETIC.rows,
        reward=lambda completions, **_: [0.0] * len(completions),
        max_completion_tokens=5,
        data={},
    )
    with pytest.raises(NothingToLearnError, match=r"equal for each of \d+ prompts of hopeless \(mean 0\.00\)"):
        demo_race(hopeless, budget=0.02)


@pytest.mark.more
def test_nothing_is_picked_where_nothing_can_be_learnt():
    ranking = demo_race(luck(), budget=0.1)
    assert ranking.pick is None and ranking.choice == [3, 4, 5, 6, 7]  # mid-5
    lowest = min(rate for rate in ranking.learning_rates[3:8] if rate is not None)
    assert ranking.choice_learning_rate == ranking.rate_together < 3e-3 / 2  # five blocks move the policy together
    assert ranking.rate_together >= 0.999 * lowest / math.sqrt(5)
    assert len(ranking.tied) > 6


@pytest.mark.more
def test_nothing_is_picked_among_fewer_than_five_blocks():
    """There is no mid-5 then: the choice is the first block of the order."""
    model, tokenizer = demo_model.load()
    del model.model.layers[4:]
    model.config.num_hidden_layers = 4
    model.config.layer_types = model.config.layer_types[:4]
    task = luck()
    ranking = race(model, tokenizer, task, budget=0.1, recipe=demo_recipe(task, 150))
    assert ranking.num_layers == 4 and sorted(ranking.order) == [0, 1, 2, 3]
    assert ranking.pick is None and ranking.choice == ranking.order[:1]


@pytest.mark.more
def test_the_recipe_is_by_default_that_of_the_commands():
    """GRPO with TRL's batch; the race finds the learning rates."""
    model, tokenizer = demo_model.load()
    ranking = probe_layers(model, tokenizer, ARITHMETIC, method="race", budget=0.5, layers=[2, 5, 9], training_steps=30)
    assert ranking.learning_rate in ranking.learning_rates
    assert all(0.01 <= kl <= 0.025 for kl, noise in ranking.first_step_kl.values())
    spent = ranking.cost["tokens_generated"] + ranking.cost["tokens_trained"]
    config = make_recipe("grpo", ARITHMETIC).config(output_dir="unused")
    one_run = 30 * completions_per_step(config) * (5 + 14)  # tokens of a completion; with its prompt
    assert spent / one_run == pytest.approx(ranking.cost["share"], rel=0.03)


@pytest.mark.more
def test_fewer_than_two_blocks_are_no_choice():
    with pytest.raises(ValueError, match=r"nothing to choose: of 12 blocks only \[3\]"):
        demo_race(rank=probe_layers, layers=3)
    two = demo_race(rank=probe_layers, layers=[3, 8], budget=0.05)
    assert sorted(two.order) == [3, 8]


@pytest.mark.slow
def test_a_block_damaged_on_purpose_is_found():
    """Its output matrices are negated in a copy of a model made strong: training another block helps little."""
    model, tokenizer = demo_model.load()
    recipe = demo_recipe(ARITHMETIC, 60)
    strong = train_layer(
        model,
        tokenizer,
        ARITHMETIC,
        None,
        steps=60,
        seed=0,
        recipe=Recipe(recipe.algorithm, {**recipe.settings, "learning_rate": 3e-4}),
    ).model
    assert isinstance(strong, type(AutoModelForCausalLM.from_config(model.config)))
    with torch.no_grad():
        strong.model.layers[8].mlp.down_proj.weight.mul_(-1.2)
    ranking = race(strong, tokenizer, ARITHMETIC, budget=0.25, recipe=demo_recipe(ARITHMETIC, 150))
    assert ranking.pick is not None and ranking.pick in (7, 8, 9)
    assert 8 in ranking.tied and 0 not in ranking.tied


def test_gains_get_the_covariance_of_their_prompts():
    candidates = {2: Candidate(2, 1.0), 5: Candidate(5, 1.0)}
    candidates[2].gains[0], candidates[5].gains[0] = [0.0, 0.5, 1.0, 0.5], [0.25, 0.75, 1.0]
    candidates[5].gains[1] = [1.0]  # alone in its round: nothing to compare with
    (only,) = measured_rounds(candidates, DEFAULT_SETTINGS, 1.0)
    assert only.layers == [2, 5] and only.updates == 4
    assert only.gains.tolist() == [0.5, pytest.approx(2 / 3)]  # the prompts that both had
    a, b = [0.0, 0.5, 1.0], [0.25, 0.75, 1.0]
    mean = (sum(a) / 3, sum(b) / 3)
    shared = sum((x - mean[0]) * (y - mean[1]) for x, y in zip(a, b, strict=True)) / 2 / 3
    assert only.covariance[0, 1] == pytest.approx(shared)
    assert math.isclose(only.covariance[0, 0], 0.25 / 3 + (3 * 8) ** -2)


def test_few_prompts_leave_no_combination_of_gains_without_noise():
    stream = random.Random(0)
    candidates = {k: Candidate(k, 1.0) for k in range(8)}
    for candidate in candidates.values():
        candidate.gains[0] = [stream.choice((0.0, 0.125, 0.25)) for _ in range(8)]
    (only,) = measured_rounds(candidates, DEFAULT_SETTINGS, 1.0)
    variances = [float(v) for v in only.covariance.diagonal()]
    assert np.linalg.eigvalsh(only.covariance)[0] > 0.1 * min(variances)
    gains = np.array([candidates[k].gains[0] for k in range(8)])
    assert np.linalg.eigvalsh(np.cov(gains) / 8)[0] < 1e-6 * min(variances)  # as the prompts alone would have it


def test_the_rate_of_several_blocks_trained_together():
    """1 / sqrt(n) of their mean; blocks that did not run are like the mean of those that did."""
    candidates = {1: Candidate(1, 2e-3), 2: Candidate(2, 2e-3), 5: Candidate(5, 1e-3)}
    assert rate_together(candidates, [1, 2]) == pytest.approx(2e-3 / math.sqrt(2))
    assert rate_together(candidates, [2, 5]) == pytest.approx(math.sqrt(2) / (1 / 2e-3 + 1 / 1e-3))
    assert rate_together(candidates, [1, 2, 3, 4]) == pytest.approx(2e-3 / 2)
    assert rate_together(candidates, [5]) == pytest.approx(1e-3)
    assert rate_together(candidates, [3, 4]) == pytest.approx(1 / math.sqrt(2) / ((1 / 2e-3 + 1 / 2e-3 + 1 / 1e-3) / 3))


@pytest.mark.more
def test_a_first_step_of_five_blocks_adds_up_to_no_more_than_five_times_one():
    """The rates of the five blocks alone, and then one step of all at once, at 1 / 5 of their mean."""
    model, tokenizer = demo_model.load()
    rows = ARITHMETIC.rows("train", 64, 1)
    batch = graded_batch(
        sample_rollouts(model, tokenizer, ARITHMETIC, rows, Sampling(samples=8, seed=1)), 0, model.device
    )
    layers = [3, 4, 5, 6, 7]
    candidates = {k: Candidate(k, 3e-3) for k in layers}
    together = Candidate(layers, 0.0)

    def step(candidate):
        with trained_candidate(model, candidate) as trained:
            update(trained, candidate, batch, steps=1, size=len(batch), micro_batch=len(batch))

    for candidate in candidates.values():
        step(candidate)
    given = together.learning_rate = rate_together(candidates, layers) / math.sqrt(5)
    step(together)
    assert together.learning_rate >= given  # not scaled down: the KL is below its upper bound
    too_far = together.learning_rate = 3e-3
    together.optimizer = None
    together.weights = None
    step(together)
    assert together.learning_rate < too_far / 2


def test_streams_of_random_numbers_do_not_collide():
    names = [f"{what}, {stream}" for what in ("prompts", "sampling") for stream in ("base 0", "base 1", "round 0")]
    seeds = [stream_seed(seed, name) for seed in range(2000) for name in [*names, "order, round 0"]]
    assert len(set(seeds)) > 0.9999 * len(seeds) and min(seeds) >= 0 and max(seeds) < 2**31
