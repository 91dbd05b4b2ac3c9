"""The arithmetic of a race's token budget, by hand."""

from dataclasses import replace

import pytest

from peft_onelayer.probe.budget import TokenBudget, TurnSize, base_prompts, least_share, shares_of_round
from peft_onelayer.probe.settings import DEFAULT_SETTINGS

SETTINGS = replace(
    DEFAULT_SETTINGS,
    samples=2,
    round_shares=(0.5, 0.5),
    spare_turns=1,
    updates=2,
    minibatch=(5, 20),
    scoring_share=0.5,
    scoring_prompts=(2, 30),
)


def budget(limit=10_000.0, **spent):
    """Completions of 10 tokens, 20 with their prompt, cut at 25."""
    return TokenBudget(limit, one_run=40_000.0, completion=10.0, sequence=20.0, longest=25, settings=SETTINGS, **spent)


def test_what_is_spent_and_left():
    b = budget(generated=1000, trained=500)
    assert (b.spent, b.left) == (1500, 8500)
    b.generated += 8500
    assert b.left == 0


def test_prompts_are_counted_at_their_longest():
    assert budget(limit=1000).affordable_prompts() == 20  # 2 completions of 25 tokens each
    assert budget(limit=1000).affordable_prompts(reserved=501) == 9
    assert budget(limit=1000, generated=400, trained=600).affordable_prompts() == 0


def test_candidates_of_the_first_round():
    # The least turn: 2 updates of 5 passes of 20 tokens, and 2 prompts with 2 completions of 10: 240 of 5000 tokens.
    assert budget().affordable_candidates() == 20 - 1
    # The most useful one: 2 updates of 20 passes, 800 tokens, which are half of a turn: 1600 of 5000 tokens.
    assert budget().useful_candidates(0) == 3 - 1
    assert budget(generated=5000).useful_candidates(1) == 3 - 1  # the last round has all that is left


def test_finals_have_room_for_those_who_get_a_whole_turn():
    # Of 240 tokens, of all that is left and not of the round's share.
    assert budget(generated=5000).affordable_candidates(1) == 20 - 1
    assert budget(limit=10_000, generated=9_520).affordable_candidates(1) == 2 - 1
    assert budget(limit=10_000, generated=9_521).affordable_candidates(1) == 1 - 1


def test_the_size_of_a_turn():
    # 5000 tokens for 4 candidates and a spare turn: 1000 each, of which half are 25 prompts and half 25 passes.
    assert budget().turn_size(0, 4) == TurnSize(prompts=25, minibatch=12)
    assert budget().turn_size(0, 1) == TurnSize(prompts=30, minibatch=20)  # the most of both
    assert budget().turn_size(0, 100) == TurnSize(prompts=2, minibatch=5)  # the least
    assert budget(limit=10_000, generated=9_880).turn_size(1, 1) == TurnSize(2, 5)
    assert budget(limit=10_000, generated=9_901).turn_size(1, 1) is None  # no room to score one


def test_the_bases_prompts():
    share, completions = 0.25, 1200
    assert base_prompts(share, completions, DEFAULT_SETTINGS) == 7  # .2 x .25 x 1200 / 8
    assert base_prompts(share, 10**6, DEFAULT_SETTINGS) == 32
    least = least_share(completions, DEFAULT_SETTINGS)
    assert base_prompts(least * 1.0001, completions, DEFAULT_SETTINGS) == 1
    assert base_prompts(least * 0.9999, completions, DEFAULT_SETTINGS) == 0
    assert least == pytest.approx(8 / 0.2 / 1200)


@pytest.mark.parametrize("passes", [1, 2, 20])  # of a row, in all iterations on it
@pytest.mark.parametrize("candidates", [2, 3])
def test_the_budget_that_is_named_has_room(passes, candidates):
    for generated in range(8, 6000, 8):
        _, share = shares_of_round(generated, passes * generated, candidates, DEFAULT_SETTINGS)
        assert float(f"{share:.2f}") == share and base_prompts(share, generated, DEFAULT_SETTINGS) >= 1
        for completion in (0.1, 50.0, 100.0):  # of a row of 100 tokens
            run = generated * completion + passes * generated * 100.0
            room = TokenBudget(share * run, run, completion, 100.0, 100, DEFAULT_SETTINGS)
            room.generated = int(base_prompts(share, generated, DEFAULT_SETTINGS) * 8 * completion)
            assert room.affordable_candidates() >= candidates, (generated, share, completion)
