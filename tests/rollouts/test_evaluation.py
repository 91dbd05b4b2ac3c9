import dataclasses
import json
import math

import demo_model
import pytest
import torch

from peft_onelayer.rollouts.evaluation import Evaluation, evaluate, paired_difference
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import load_task
from peft_onelayer.tasks.limits import OVER_LIMIT

TASK = load_task("arithmetic")
ROWS = TASK.rows("test", 64, 0)
SORT_ROWS = load_task("sort").rows("test", 20, 0)


@pytest.fixture(scope="module")
def base():
    return demo_model.load()


@pytest.fixture(scope="module")
def sampled(base):
    return evaluate(*base, TASK, ROWS)


class Recorder:
    """A reward that keeps what it was called with and scores by the completion's first digit."""

    def __init__(self):
        self.prompts, self.completions, self.answers = [], [], []

    def __call__(self, prompts, completions, answer, **kwargs):
        self.prompts += prompts
        self.completions += completions
        self.answers += answer
        return [float(completion[0] == "1") for completion in completions]


def graded_by(reward):
    return dataclasses.replace(TASK, reward=reward)


def test_mean_and_standard_error_are_over_problems():
    evaluation = Evaluation(problems=("a", "b", "c", "d"), scores=(0.0, 0.25, 0.5, 1.0), samples=4)
    assert (evaluation.n, evaluation.mean) == (4, 0.4375)
    # squared deviations .1914 + .0352 + .0039 + .3164 = .546875; / 3 = .182292, / 4 = .045573, root = .213478
    assert evaluation.standard_error == pytest.approx(0.213478, abs=1e-6)
    assert math.isnan(Evaluation(problems=("a",), scores=(1.0,), samples=4).standard_error)


def test_a_paired_difference_takes_out_what_the_problems_share():
    prompts = ("a", "b", "c", "d")
    before = Evaluation(prompts, scores=(0.0, 0.25, 0.5, 0.75), samples=4)
    after = Evaluation(prompts, scores=(0.25, 0.5, 0.75, 1.0), samples=4)
    assert paired_difference(after, before) == (0.25, 0.0)  # the same gain on every problem has no error
    mixed = Evaluation(prompts, scores=(0.5, 0.25, 0.5, 0.75), samples=4)
    difference, error = paired_difference(mixed, before)  # .5 0 0 0: variance .0625, / 4, root
    assert (difference, error) == (0.125, 0.125)
    assert paired_difference(before, mixed) == (-0.125, 0.125)


@pytest.mark.parametrize("prompts", [("a", "b"), ("b", "a", "c"), ("a", "b", "d")])
def test_a_difference_between_other_problems_is_refused(prompts):
    a = Evaluation(("a", "b", "c"), scores=(0.0, 0.5, 1.0), samples=1)
    b = Evaluation(prompts, scores=(0.0, 0.5, 1.0)[: len(prompts)], samples=1)
    with pytest.raises(ValueError, match="same problems in the same order"):
        paired_difference(a, b)


def test_a_score_is_the_mean_over_the_samples_of_its_own_problem(base):
    reward = Recorder()
    evaluation = evaluate(*base, graded_by(reward), ROWS[:10], Sampling(samples=3, batch_size=7))
    assert [json.loads(problem) for problem in evaluation.problems] == ROWS[:10] and evaluation.samples == 3
    assert reward.prompts == [row["prompt"] for row in ROWS[:10] for _ in range(3)]
    assert reward.answers == [row["answer"] for row in ROWS[:10] for _ in range(3)]
    first_digits = [float(completion[0] == "1") for completion in reward.completions]
    assert 0 < sum(first_digits) < 30
    for i, score in enumerate(evaluation.scores):
        assert score == pytest.approx(sum(first_digits[3 * i : 3 * i + 3]) / 3)


def test_greedy_decoding_is_one_completion_that_no_seed_changes(base):
    greedy = evaluate(*base, TASK, ROWS, Sampling(greedy=True))
    assert greedy.samples == 1 and set(greedy.scores) == {0.0, 1.0}
    assert evaluate(*base, TASK, ROWS, Sampling(greedy=True, seed=1, samples=9, batch_size=5)) == greedy
    cold = evaluate(*base, TASK, ROWS, Sampling(samples=2, temperature=1e-4))
    assert cold.scores == greedy.scores


def test_sampling_follows_its_seed(base, sampled):
    assert evaluate(*base, TASK, ROWS) == sampled
    assert evaluate(*base, TASK, ROWS, Sampling(seed=1)).scores != sampled.scores


def test_the_models_own_sampling_settings_play_no_part(sampled):
    model, tokenizer = demo_model.load()
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=9.0)
    assert evaluate(model, tokenizer, TASK, ROWS) == sampled


@pytest.mark.more
def test_prompts_of_different_lengths_are_padded_on_the_left(base):
    rows = [row for pair in zip(ROWS[:20], SORT_ROWS, strict=True) for row in pair]
    together, alone = Recorder(), Recorder()
    evaluate(*base, graded_by(together), rows, Sampling(max_completion_tokens=9, greedy=True))
    for row in rows:
        evaluate(*base, graded_by(alone), [row], Sampling(max_completion_tokens=9, greedy=True))
    assert together.completions == alone.completions
    assert {len(completion) for completion in alone.completions} >= {4, 8}


def test_an_adapter_that_has_learnt_nothing_scores_like_its_base(base, sampled):
    from peft import get_peft_model

    from peft_onelayer import SingleLayerConfig

    model, tokenizer = demo_model.load()
    adapted = get_peft_model(model, SingleLayerConfig(layer=5))
    assert evaluate(adapted, tokenizer, TASK, ROWS) == sampled


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_and_random_state_are_as_before(fails):
    model, tokenizer = demo_model.load()
    model.train()
    model.model.layers[3].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    seen = []

    def reward(prompts, completions, answer, **kwargs):
        seen.append((model.training, torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("the reward failed")
        return [0.0] * len(completions)

    if fails:
        with pytest.raises(RuntimeError, match="the reward failed"):
            evaluate(model, tokenizer, graded_by(reward), ROWS[:4])
    else:
        evaluate(model, tokenizer, graded_by(reward), ROWS[:4])
    assert seen == [(False, False)]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("rows", "samples"), [([], 4), (ROWS, 0)])
def test_nothing_to_evaluate_is_refused(base, rows, samples):
    with pytest.raises(ValueError, match="at least one row and one sample"):
        evaluate(*base, TASK, rows, Sampling(samples=samples))


def test_tokens_are_counted_without_the_padding_behind_them(base):
    reward = Recorder()
    rows = [*ROWS[:20], *SORT_ROWS]  # answers of 4 and of 8 digits in one batch
    evaluation = evaluate(*base, graded_by(reward), rows, Sampling(max_completion_tokens=8, samples=2))
    lengths = [len(completion) for completion in reward.completions]
    assert min(lengths) <= 4 and max(lengths) == 8
    assert evaluation.tokens_generated == sum(min(length + 1, 8) for length in lengths)  # and the ".", if it fits


def test_completions_over_the_rewards_limit_are_counted_over_all_batches(base):
    def reward(prompts, completions, log_metric, **kwargs):
        log_metric("another", 7.0)
        log_metric(OVER_LIMIT, float(len(completions) // 2))
        return [0.0] * len(completions)

    assert evaluate(*base, graded_by(reward), ROWS[:10], Sampling(samples=2, batch_size=8)).over_limit == 4 + 4 + 2
    assert evaluate(*base, TASK, ROWS[:2]).over_limit == 0
