"""Functions that run in turns: served together, each with the random numbers of a process of its own."""

import os
import random
import signal
import threading
import time
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from accelerate.state import GradientState

from peft_onelayer.sweep.lockstep import Member, process_state_kept, run_together


def answer_all(members):
    for member in members:
        member.answer(member.request * 10)


def test_they_are_served_together_and_end_by_themselves():
    served = []

    def serve(members):
        served.append([member.request for member in members])
        answer_all(members)

    def count(member, to):
        return [member.ask(i) for i in range(to)]

    ended = list(run_together({str(n): lambda m, n=n: count(m, n) for n in (3, 0, 2)}, serve))
    assert [(member.name, member.result) for member in ended] == [("0", []), ("2", [0, 10]), ("3", [0, 10, 20])]
    assert served == [[0, 0], [1, 1], [2]]


def draws(member, seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    drawn = []
    for _ in range(4):
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
        member.ask(1)
    return drawn


def test_each_has_its_own_random_numbers():
    before = torch.get_rng_state()
    together = {
        m.name: m.result for m in run_together({str(s): lambda m, s=s: draws(m, s) for s in range(3)}, answer_all)
    }
    assert torch.equal(torch.get_rng_state(), before)
    for seed in range(3):
        (alone,) = run_together({"alone": lambda m, s=seed: draws(m, s)}, answer_all)
        assert together[str(seed)] == alone.result
    assert len({str(drawn) for drawn in together.values()}) == 3


def test_each_has_its_own_warnings_and_state_of_accelerate():
    def ignoring(member):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = GradientState()
            state._set_sync_gradients(False)
            member.ask(1)
            return state.sync_gradients

    def raising(member):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state = GradientState()
            state._set_sync_gradients(True)
            member.ask(1)
            with pytest.raises(UserWarning, match="heard"):
                warnings.warn("heard", stacklevel=1)
            return state.sync_gradients

    before = list(warnings.filters)
    ended = run_together({"a": ignoring, "b": raising}, answer_all)
    assert {member.name: member.result for member in ended} == {"a": False, "b": True}
    assert warnings.filters == before


def test_an_answer_may_be_an_exception():
    def ask(member: Member):
        with pytest.raises(ZeroDivisionError):
            member.ask("this")
        return "went on"

    def serve(members):
        for member in members:
            member.answer(ZeroDivisionError())

    assert [member.result for member in run_together({"a": ask}, serve)] == ["went on"]


@pytest.mark.parametrize("by_error", [False, True])
def test_what_nobody_waits_for_is_ended(by_error):
    cleaned, threads = [], threading.active_count()

    def forever(member):
        try:
            while True:
                member.ask(1)
        finally:
            cleaned.append(member.name)

    def serve(members):
        if by_error:
            raise KeyboardInterrupt
        answer_all(members)

    functions = {"short": lambda member: "done", "a": forever, "b": forever}
    with closing(run_together(functions, serve)) as ended:
        assert next(ended).result == "done"
        if by_error:
            with pytest.raises(KeyboardInterrupt):
                next(ended)
    assert cleaned == ["a", "b"]
    assert threading.active_count() == threads


def test_one_that_nobody_waits_for_ends_where_it_checks():
    """An interrupt finds it at work, not where it asks."""
    checks = []

    def work(member):
        time.sleep(0.1)  # the main thread waits by then: Python sees a signal of just before only when it wakes
        os.kill(os.getpid(), signal.SIGINT)
        for number in range(300):
            time.sleep(0.01)
            checks.append(number)
            member.check()

    with pytest.raises(KeyboardInterrupt):
        list(run_together({"it": work}, answer_all))
    assert 0 < len(checks) < 300 and not any(thread.name == "it" for thread in threading.enumerate())


def test_state_is_kept_around_a_function_that_runs_here():
    before, show = torch.get_rng_state(), warnings.showwarning
    with process_state_kept():
        torch.rand(1)
        warnings.showwarning = print
    assert torch.equal(torch.get_rng_state(), before) and warnings.showwarning is show
