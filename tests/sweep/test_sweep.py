"""The sweep: its profile, and that one killed by anything goes on and ends with the rows of an undisturbed one."""

import csv
import ctypes
import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import fake_runs
import numpy as np
import pytest
from specs import DEMO

from peft_onelayer.records.claim import TargetError, claimed
from peft_onelayer.records.disk import DiskFullError, OutputLostError
from peft_onelayer.records.files import write_whole
from peft_onelayer.records.privacy import without_private
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.sweep import sweep as module
from peft_onelayer.sweep.engines import RunsFailedError
from peft_onelayer.sweep.metric import layer_contribution
from peft_onelayer.sweep.plan import plan_sweep
from peft_onelayer.sweep.profile import make_profile
from peft_onelayer.sweep.run_layer import RunSpec
from peft_onelayer.sweep.settings import SweepSettings
from peft_onelayer.sweep.store import RowStore
from peft_onelayer.sweep.sweep import sweep_layers

pytestmark = pytest.mark.usefixtures("light_workers")
LAYERS = [0, 3, 5, 11]
ROWS = 1 + 2 * (1 + len(LAYERS))


NONE = {"learning_rate": None, "full_learning_rate": None}


def settings(**changes):
    """Those of a sweep of four blocks of the demo model."""
    given = {"layers": LAYERS, "steps": 2, "seeds": (0, 1), "learning_rate": 3e-3, "full_learning_rate": 3e-4}
    return SweepSettings(**{"model": DEMO, "task": "arithmetic", "problems": 200, **given, **changes})


def sweep(out, fate=None, workers=1, on_row=lambda done, total, spec, row: None, engine="local", **changes):
    """A sweep of runs that compute nothing, on the real demo model's description.

    `fate` is what `fake_runs` takes from FAKE_RUNS_FATE.
    """
    os.environ["FAKE_RUNS_FATE"] = json.dumps({"sleep": 0.05, **(fate or {})})
    return sweep_layers(
        settings(**changes), out=out, engine=engine, workers=workers, run_row=fake_runs.run, on_row=on_row
    )


started = fake_runs.started


def without_timings(path):
    profile = json.loads((path / "layer_profile.json").read_text())
    profile["cost"]["seconds"] = 0
    return profile


def test_the_profile_follows_from_the_rows(tmp_path):
    calls = []
    profile = sweep(tmp_path / "out", workers=2, on_row=lambda done, total, spec, row: calls.append((done, total)))
    assert calls == [(i, ROWS) for i in range(1, ROWS + 1)]
    rows = fake_runs.stored(tmp_path / "out").values()
    assert len(rows) == ROWS == len(started(tmp_path))

    def scores(layer):
        found = sorted((r for r in rows if r["spec"]["layer"] == layer), key=lambda r: r["spec"]["seed"])
        return [r["scores"] for r in found]

    (base,), full = scores("base"), scores("full")
    for k in range(12):
        if k not in LAYERS:
            assert (
                profile.sweep.contribution[k]
                is profile.scores[k]
                is profile.errors[k]
                is profile.sweep.means[k]
                is None
            )
            continue
        c = layer_contribution(scores(k), base, full)
        assert (profile.sweep.contribution[k], profile.sweep.contribution_errors[k]) == (c.value, c.standard_error)
        assert profile.scores[k] == pytest.approx(profile.sweep.means[k] - profile.sweep.base)
        assert profile.sweep.means[k] == pytest.approx(np.mean(scores(k)))
    assert profile.order == [11, 5, 3, 0] and profile.pick == 11 and profile.tied == [11]
    assert profile.sweep.full_gain[0] == pytest.approx(profile.sweep.full - profile.sweep.base)
    assert profile.sweep.undefined is None and profile.sweep.seeds == [0, 1] and profile.sweep.problems == 200
    assert (profile.learning_rate, profile.sweep.full_learning_rate, profile.sweep.learning_rate_search) == (
        3e-3,
        3e-4,
        None,
    )
    runs = ROWS - 1  # each 2 steps, and every row an evaluation
    assert profile.cost["tokens_generated"] == runs * 20 + ROWS * 100 and profile.cost["tokens_trained"] == runs * 40
    assert profile.cost["share"] == pytest.approx((runs * 60 + ROWS * 100) / 60, abs=1e-3)
    text = (tmp_path / "out" / "layer_profile.json").read_text()
    assert LayerRanking.from_json(text) == profile
    table = list(csv.DictReader((tmp_path / "out" / "layer_profile.csv").open()))
    assert [line["layer"] for line in table] == ["base", "full", "0", "3", "5", "11"]
    assert float(table[-1]["contribution"]) == profile.sweep.contribution[11]


def test_what_is_finished_never_runs_again(tmp_path):
    sweep(tmp_path / "out", seeds=[0])
    before = started(tmp_path)
    sweep(tmp_path / "out", seeds=[0])
    assert started(tmp_path) == before
    sweep(tmp_path / "out", seeds=[0, 1])  # one seed more: its five runs, and not the base
    assert len(started(tmp_path)) == ROWS and set(started(tmp_path).values()) == {1}
    row = min((tmp_path / "out" / "rows").glob("*.json"))
    row.write_text(row.read_text()[:100])  # as a power cut might leave it
    sweep(tmp_path / "out", seeds=[0, 1])
    assert started(tmp_path)[row.stem] == 2 and sum(started(tmp_path).values()) == ROWS + 1


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        pytest.param({"steps": 9}, "--steps 4, and 9 is asked for", marks=pytest.mark.more),
        pytest.param({"algorithm": "dr_grpo"}, "--algorithm grpo, and dr_grpo is asked for", marks=pytest.mark.more),
        pytest.param({"task": "sort"}, "--task arithmetic, and sort is asked for", marks=pytest.mark.more),
        pytest.param(
            {"learning_rate": 2e-3}, "--full-learning-rate 0.001, and 0.002 is asked for", marks=pytest.mark.more
        ),
        ({"learning_rate": 2e-3, "full_learning_rate": 1e-3}, "--learning-rate 0.001, and 0.002 is asked for"),
        pytest.param(
            {"config": {"temperature": 0.9}}, "--set {}, and {'temperature': 0.9} is asked for", marks=pytest.mark.more
        ),
        ({"problems": 100}, "evaluated otherwise"),
    ],
    ids=str,
)
def test_the_profile_of_another_sweep_is_not_replaced(tmp_path, changes, what):
    given = {"seeds": [0], "layers": "0", "steps": 4, "learning_rate": 1e-3, "full_learning_rate": None}
    sweep(tmp_path / "out", **given)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    with pytest.raises(TargetError, match=re.escape(what)):
        sweep(tmp_path / "out", **{**given, **changes})
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before
    sweep(tmp_path / "out", **{**given, "layers": "0,5", "seeds": [0, 1]})  # goes on


def files_of(out):
    return {path: path.read_bytes() for path in out.rglob("*.*")}


def test_a_profile_is_not_replaced_by_one_of_other_seeds_or_of_fewer_blocks(tmp_path):
    out = tmp_path / "out"
    given = {"problems": 20, "layers": "0,3"}
    sweep(out, {"sleep": 0}, seeds=[0], **given)
    before = files_of(out)
    for changes, said in (
        ({"seeds": [1]}, "holds a profile of seeds 0; ask for --seeds 0,1 to add to it, or give another --out"),
        ({"layers": "3,5"}, "holds a profile of blocks 0, 3; ask for --layers 0,3,5 to add to it, or give another"),
        ({"layers": "3"}, "ask for --layers 0,3 to add to it"),
    ):
        with pytest.raises(TargetError, match=re.escape(said)):
            sweep(out, {"sleep": 0}, **{"seeds": [0], **given, **changes})
    assert files_of(out) == before
    rows = len(started(tmp_path))
    profile = sweep(out, {"sleep": 0}, seeds=[1, 0], problems=20, layers="all")
    assert profile.sweep.seeds == [0, 1] and len(profile.order) == 12 and len(started(tmp_path)) == rows + 1 + 12 + 10


def test_rates_of_a_profile_are_compared_block_by_block(tmp_path):
    out, rates = tmp_path / "out", {0: 1e-4, 3: 2e-4}
    given = {"seeds": [0], "problems": 20, "layers": "0,3"}
    sweep(out, {"sleep": 0}, learning_rate=rates, **given)
    before = files_of(out)
    for other, said in (
        ({0: 1e-4, 3: 5e-4}, "block 3 at --learning-rate 0.0002, and 0.0005 is asked for"),
        (1e-4, "block 3 at --learning-rate 0.0002, and 0.0001 is asked for"),
    ):
        with pytest.raises(TargetError, match=re.escape(said)):
            sweep(out, {"sleep": 0}, learning_rate=other, **given)
    assert files_of(out) == before
    more = {**given, "layers": "0,3,5"}
    assert sweep(out, {"sleep": 0}, learning_rate={**rates, 5: 1e-3}, **more).learning_rates[5] == 1e-3


@pytest.mark.parametrize("rates", [{}, {"search_learning_rates": [1e-3, 3e-3]}], ids=["found", "searched"])
def test_more_blocks_and_seeds_go_on_at_the_rates_that_were_found(tmp_path, rates):
    fate = {"sleep": 0, "rates": {"3": 1e-3, "5": 2e-3}, "levels": {"3 0.001": 0.5, "5 0.003": 0.5}}
    given = {"problems": 20, **NONE, **rates}
    first = sweep(tmp_path / "out", fate, layers="0,3,5", seeds=[4], **given)
    assert first.learning_rate == 1e-3
    rows = len(started(tmp_path))
    more = sweep(tmp_path / "out", fate, layers="0,3,5,11", seeds=[2, 4], **given)
    assert more.learning_rate == 1e-3 and more.sweep.seeds == [4, 2]
    assert len(started(tmp_path)) == rows + 1 + 5 and max(started(tmp_path).values()) == 1  # no rate is found anew
    again = more.sweep.learning_rates_found or more.sweep.learning_rate_search
    assert again == (first.sweep.learning_rates_found or first.sweep.learning_rate_search) and again["block"] == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"regimes": False}, "--regimes True, and False"), ({"learning_rate": 2e-2}, "--learning-rate 0.01, and 0.02")],
)
def test_the_regimes_of_a_profile_are_not_replaced(tmp_path, changes, said):
    given = {"layers": "5", "problems": 20, "search_learning_rates": [1e-3, 3e-3], "regimes": True, "seeds": [0]}
    given |= {"learning_rate": 1e-2, "full_learning_rate": None}
    sweep(tmp_path / "out", {"sleep": 0}, **given)
    before = files_of(tmp_path / "out")
    with pytest.raises(TargetError, match=f"{said} is asked for"):
        changes = {"learning_rate": None, **changes}
        sweep(tmp_path / "out", {"sleep": 0}, **{**given, **changes})
    assert files_of(tmp_path / "out") == before


def test_the_search_for_learning_rates(tmp_path):
    profile = sweep(tmp_path / "out", seeds=[3], layers="0-2,mid-1", search_learning_rates=[1e-4, 1e-3], **NONE)
    search = profile.sweep.learning_rate_search
    assert search["rates"] == [1e-4, 1e-3] and search["block"] == 2 and search["split"] == "train"
    assert profile.learning_rate == 1e-4 == profile.sweep.full_learning_rate  # of equal scores the first
    rows = fake_runs.stored(tmp_path / "out").values()
    trials = [row["spec"] for row in rows if row["spec"]["split"] == "train"]
    assert {(t["layer"], t["settings"]["learning_rate"], t["seed"], t["evaluation_seed"]) for t in trials} == {
        (layer, rate, 3, 1) for layer in (2, "full") for rate in (1e-4, 1e-3)
    }
    assert len(rows) == 4 + 1 + 1 + 4 and [k for k in range(12) if profile.sweep.means[k]] == [0, 1, 2, 5]
    assert profile.cost["tokens_trained"] == 9 * 40  # the search's runs are counted


def test_a_sweep_with_searched_rates_goes_on(tmp_path):
    given = {"layers": "5", "problems": 20, "search_learning_rates": [1e-3, 3e-3], "regimes": True}
    given |= {"learning_rate": 1e-2, "full_learning_rate": None}
    for seeds, runs in [([0], 4 + 1 + 4), ([0], 4 + 1 + 4), ([0, 1], 4 + 1 + 8)]:
        sweep(tmp_path / "out", {"sleep": 0}, seeds=seeds, **given)
        assert len(started(tmp_path)) == runs and set(started(tmp_path).values()) == {1}
    other = "--search-learning-rates [0.001, 0.003], and [0.0001] is asked for"
    with pytest.raises(TargetError, match=re.escape(other)):
        sweep(tmp_path / "out", seeds=[0], **{**given, "search_learning_rates": [1e-4]})
    assert len(started(tmp_path)) == runs


def test_a_rate_to_be_found_does_not_replace_the_profile_of_a_given_one(tmp_path):
    given = {"seeds": [0], "layers": "5", "problems": 20}
    sweep(tmp_path / "out", {"sleep": 0}, **given, learning_rate=1e-2, full_learning_rate=None)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    with pytest.raises(TargetError, match=re.escape("--learning-rate 0.01, and auto is asked for; give another --out")):
        sweep(tmp_path / "out", {"sleep": 0}, **given, **NONE)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before


@pytest.mark.parametrize(
    ("rates", "option"),
    [
        ({"learning_rate": 1e-2, "full_learning_rate": None}, "--learning-rate 0.01"),
        ({"learning_rate": None, "full_learning_rate": 1e-3}, "--full-learning-rate 0.001"),
    ],
)
def test_a_rate_beside_a_search_is_refused(rates, option):
    with pytest.raises(ValueError, match=f"^{option} has no effect beside --search-learning-rates"):
        plan_sweep(settings(search_learning_rates=[1e-4, 1e-3], **rates))


def test_data_with_fewer_prompts_than_a_step_draws_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(40)))
    (tmp_path / "own.py").write_text("def reward(completions, answer, **_):\n    return [0.0 for _ in answer]\n")
    given = {"task": None, "dataset": str(tmp_path / "rows.jsonl"), "reward": f"{tmp_path / 'own.py'}:reward"}
    line = r"^one step draws 64 prompts and task .*rows\.jsonl has 36; use a smaller --prompts$"
    with pytest.raises(ValueError, match=line):
        plan_sweep(settings(**given, prompts=64, completions=2))


def test_data_with_one_held_out_problem_are_refused(tmp_path):
    task = tmp_path / "one.py"
    task.write_text(
        'def rows(split, n, seed):\n    return [{"prompt": f"{i}+1="} for i in range(n if split == "train" else 1)]\n'
        "def reward(completions, **_):\n    return [0.0 for _ in completions]\n"
    )
    line = r"^blocks are compared on at least 2 held-out problems, and task .*one.* has 1; give more rows"
    with pytest.raises(ValueError, match=line):
        plan_sweep(settings(task=str(task)))


def test_each_block_at_a_rate_of_its_own(tmp_path):
    rates = {0: 1e-4, 3: 2e-4, 5: 3e-3, 11: 3e-3}
    profile = sweep(tmp_path / "out", seeds=(0,), learning_rate=rates)
    rows = fake_runs.stored(tmp_path / "out").values()
    trained = {r["spec"]["layer"]: r["spec"]["settings"].get("learning_rate") for r in rows}
    assert trained == {**rates, "full": 3e-4, "base": None}
    assert profile.learning_rates == [rates.get(k) for k in range(12)]
    assert profile.learning_rate == rates[profile.order[0]]
    lines = {row["layer"]: row for row in csv.DictReader(profile.to_csv().splitlines())}
    assert {k: float(lines[str(k)]["learning_rate"]) for k in rates} == rates
    assert LayerRanking.from_json(profile.to_json()) == profile

    with pytest.raises(ValueError, match="no learning rate for block 11; there are rates for"):
        sweep(tmp_path / "out2", learning_rate={0: 1e-4, 3: 2e-4, 5: 3e-3})
    with pytest.raises(ValueError, match="full_learning_rate must be given too"):
        sweep(tmp_path / "out3", learning_rate=rates, full_learning_rate=None)
    assert sweep(tmp_path / "out4", seeds=(0,)).learning_rates is None


def test_rates_that_nobody_gives_are_found_once_and_kept(tmp_path):
    told = []
    profile = sweep(tmp_path / "out", seeds=[3], **NONE, on_row=lambda d, n, spec, row: told.append((d, n, row)))
    assert sorted(str(row["found"]["learning_rate"]) for _, _, row in told[:2]) == ["0.0003", "0.003"]
    assert [(d, n) for d, n, _ in told] == [(i, 8) for i in range(1, 9)]
    specs = [row["spec"] for row in fake_runs.stored(tmp_path / "out").values()]
    finding = [s for s in specs if s["steps"] == 0 and s["layer"] != "base"]
    assert sorted(str(s["layer"]) for s in finding) == ["5", "full"]  # the middle one of the four
    assert all((s["seed"], s["split"], s["settings"]) == (3, "train", {}) for s in finding)
    trained = {s["layer"]: s["settings"].get("learning_rate") for s in specs if s["steps"]}
    assert trained == {**dict.fromkeys(LAYERS, 3e-3), "full": 3e-4}
    assert (profile.learning_rate, profile.sweep.full_learning_rate) == (3e-3, 3e-4)
    found = profile.sweep.learning_rates_found
    assert found["block"] == 5 and found["layer"]["kl"] == found["full"]["kl"] == 0.015
    assert (found["layer"]["learning_rate"], found["full"]["learning_rate"]) == (3e-3, 3e-4)
    assert LayerRanking.from_json(profile.to_json()) == profile and profile.sweep.learning_rate_search is None
    # five runs of two steps, six evaluations, and what finding the rates took
    assert profile.cost["tokens_generated"] == 5 * 20 + 6 * 100 + 200
    assert profile.cost["tokens_trained"] == 5 * 40 + 100

    again = sweep(tmp_path / "out", seeds=[3, 4], problems=200, samples=4, **NONE)
    assert max(started(tmp_path).values()) == 1 and len(started(tmp_path)) == 8 + 5
    assert again.learning_rate == 3e-3
    (tmp_path / "out" / "layer_profile.json").unlink()
    sweep(tmp_path / "out", seeds=[3], problems=100, steps=3, **NONE)  # another evaluation and length: the same rates
    assert (
        sum(
            s["spec"]["steps"] == 0 and s["spec"]["layer"] != "base"
            for s in fake_runs.stored(tmp_path / "out").values()
        )
        == 2
    )


@pytest.mark.parametrize(
    ("given", "found", "rates"),
    [
        ({"learning_rate": 1e-4, "full_learning_rate": None}, [], (1e-4, 1e-4)),
        ({"learning_rate": None, "full_learning_rate": 1e-5}, ["5"], (3e-3, 1e-5)),
        ({**NONE, "search_learning_rates": [1e-4]}, [], (1e-4, 1e-4)),
        ({"learning_rate": dict.fromkeys(LAYERS, 1e-4), "full_learning_rate": 1e-5}, [], (1e-4, 1e-5)),
    ],
    ids=["equal", "full given", "searched", "each its own"],
)
def test_only_rates_that_are_not_given_are_found(given, found, rates):
    plan = plan_sweep(settings(**given))
    assert [str(spec.layer) for spec in plan.finding.values()] == found
    rows = {
        spec.digest(): {"mean": 0.5, "found": {"learning_rate": 3e-3 if spec.layer == 5 else 3e-4}}
        for spec in plan.of_rates
    }
    plan = plan.with_learning_rates(rows)
    assert {spec.settings["learning_rate"] for specs in plan.blocks.values() for spec in specs} == {rates[0]}
    assert {spec.settings["learning_rate"] for spec in plan.full} == {rates[1]}
    assert plan.base.settings == {}


def test_a_sweep_that_can_learn_nothing_stops_before_its_runs(tmp_path):
    shown = []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^nothing to learn\. The likely reason: it is a test\.$"):
            sweep(
                tmp_path / "out", {"nothing": True}, **NONE, on_row=lambda d, n, spec, row: shown.append(row["shown"])
            )
    assert shown == [["prompt: 1 + 1"]] * 4 and len(started(tmp_path)) == 2
    assert not (tmp_path / "out" / "layer_profile.json").exists()


def test_prompts_and_completions_make_the_step_of_every_run():
    plan = plan_sweep(settings(prompts=4, completions=6))
    step = {"num_generations": 6, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    for spec in (plan.full[0], plan.blocks[5][1]):
        assert {name: spec.settings[name] for name in step} == step
        assert make_recipe("grpo", None, spec.settings).settings.items() >= step.items()
    assert plan_sweep(settings()).full[0].settings == {"learning_rate": 3e-4}
    with pytest.raises(ValueError, match="--prompts 4 and --set gradient_accumulation_steps both say"):
        plan_sweep(settings(prompts=4, config={"gradient_accumulation_steps": 2}))


@pytest.mark.more
def test_where_no_run_moved_the_policy_the_profile_says_so(tmp_path):
    every = {"same": [*map(str, LAYERS), "full"]}
    sweep_of = lambda name, fate, **more: sweep(tmp_path / name, fate, seeds=[0], **more).sweep.undefined  # noqa: E731
    assert sweep_of("given", every) == (
        "every run scored exactly what the base did on every problem: the learning rate (0.003) is too low, or the "
        "steps are too few; leave --learning-rate out to have one found, or raise --steps"
    )
    assert sweep_of("found", every, **NONE).endswith("(0.003) is too low, or the steps are too few; raise --steps")
    assert sweep_of("some", {"same": ["0", "3"]}) is None
    assert "full equals base within noise" in sweep_of("full", {"same": ["full"]})
    constant = sweep_of("constant", every | {"constant": 0.5})
    assert constant == "every run and the base scored 0.5 on every problem: the reward tells nothing apart"


def in_a_process_to_kill(function, *arguments, **keywords):
    """A copy of this process: it has imported everything already."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, kwargs=keywords)
    process.start()
    return process


def workers_of(log):
    """Workers whose runs report to `log`: the process that started them may be gone."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = Path("/proc", pid, "environ").read_bytes()
            if b"engines.worker" in Path("/proc", pid, "cmdline").read_bytes() and log.encode() in environment:
                found.append(pid)
        except OSError:
            continue
    return found


@pytest.mark.more
def test_killed_at_random_moments_it_ends_with_the_same_rows(tmp_path):
    undisturbed = sweep(tmp_path / "undisturbed")
    (tmp_path / "log").unlink()
    rng = random.Random(os.getpid())
    out, finished_before, kills = tmp_path / "killed", Counter(), 0
    while True:
        process = in_a_process_to_kill(sweep, out, workers=2)
        target = len(finished_before) + rng.randint(0, 4)
        while process.is_alive() and len(list((out / "rows").glob("*.json"))) < target:
            time.sleep(0.01)
        process.join(rng.uniform(0.0, 0.1))
        alive = process.is_alive()
        process.kill()
        process.join()
        deadline = time.monotonic() + 20
        while workers_of(str(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert workers_of(str(tmp_path)) == []  # they end with the driver
        again = {digest: n for digest, n in finished_before.items() if started(tmp_path)[digest] != n}
        assert again == {}, "finished rows were run again"
        finished_before = Counter({digest: started(tmp_path)[digest] for digest in fake_runs.stored(out)})
        if not alive:
            break
        kills += 1
    assert kills > 0, "it was never killed"
    assert fake_runs.stored(out) == fake_runs.stored(tmp_path / "undisturbed") and len(fake_runs.stored(out)) == ROWS
    assert without_timings(out) == without_timings(tmp_path / "undisturbed")
    assert undisturbed.order == LayerRanking.from_json((out / "layer_profile.json").read_text()).order
    assert [path.name for path in (out / "rows").iterdir() if path.suffix != ".json"] == []
    assert [path.name for path in out.parent.iterdir() if "onelayer-lock" in path.name] == []


@pytest.mark.more
def test_workers_that_die_leave_the_same_rows(tmp_path):
    kill = {"kill": {"3": 1, "full": 2}}
    sweep(tmp_path / "dying", fate=kill, workers=2)
    assert sorted(started(tmp_path).values())[-4:] == [2, 2, 3, 3]
    assert len(fake_runs.stored(tmp_path / "dying")) == ROWS
    # As if every run had been started three times: now none dies any more.
    (tmp_path / "log").write_text("".join(3 * f"{digest} first\n" for digest in started(tmp_path)))
    sweep(tmp_path / "undisturbed", fate=kill)
    assert fake_runs.stored(tmp_path / "dying") == fake_runs.stored(tmp_path / "undisturbed")


def test_a_run_that_fails_leaves_the_others_and_no_profile(tmp_path):
    with pytest.raises(RunsFailedError, match=r"2 of the runs failed: block 3, seed [01], .*: no luck"):
        sweep(tmp_path / "out", fate={"fail": {"3": "no luck"}})
    assert len(fake_runs.stored(tmp_path / "out")) == ROWS - 2
    assert not (tmp_path / "out" / "layer_profile.json").exists()


libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUSER, MS_REMOUNT = 0x20000, 0x10000000, 32


def _mount(folder, flags, size):
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, f"size={size}".encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount")


def _sweep_on_a_full_disk(tmp_path, disk, answer):
    """In a process of its own: a file system of 16 pages, which is then made larger, and the same sweep again."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
        answer.put("no namespaces here")
        return
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        Path("/proc/self", name).write_text(text)
    _mount(disk, 0, "64k")
    try:
        sweep(disk / "out")
        answer.put("the disk did not fill up")
        return
    except DiskFullError as error:
        full = error.errno
        assert error.place == disk and "finished rows are kept" in str(error)
    names = sorted(path.name for path in (disk / "out" / "rows").iterdir())
    finished = {digest: started(tmp_path)[digest] for digest in fake_runs.stored(disk / "out")}
    _mount(disk, MS_REMOUNT, "16m")
    sweep(disk / "out")
    shutil.copytree(disk / "out", tmp_path / "resumed")
    answer.put((full, names, finished))


@pytest.mark.more
def test_a_full_disk_stops_it_and_it_goes_on(tmp_path):
    sweep(tmp_path / "undisturbed")
    (tmp_path / "log").unlink()
    disk = tmp_path / "disk"
    disk.mkdir()
    answer = multiprocessing.get_context("fork").Queue()
    process = in_a_process_to_kill(_sweep_on_a_full_disk, tmp_path, disk, answer)
    process.join(120)
    assert process.exitcode == 0
    found = answer.get(timeout=10)
    if found == "no namespaces here":
        pytest.skip(found)
    code, names, finished = found
    assert code == errno.ENOSPC
    assert 0 < len(finished) < ROWS and names == sorted(f"{digest}.json" for digest in finished)
    assert all(started(tmp_path)[digest] == n for digest, n in finished.items())  # not run again
    assert fake_runs.stored(tmp_path / "resumed") == fake_runs.stored(tmp_path / "undisturbed")


def _sweep_while_another_runs(tmp_path):
    with pytest.raises(TargetError, match=f"out is being written by process {os.getppid()} on "):
        sweep(tmp_path / "out")


def test_rows_that_cannot_be_written_any_more_stop_it_in_one_line_and_it_goes_on(tmp_path):
    out = tmp_path / "out"

    def replace_by_a_file(*_):
        (out / "rows").rename(tmp_path / "kept")
        (out / "rows").touch()

    with pytest.raises(
        OutputLostError, match=r"rows takes no files any more \(Not a directory\): finished rows are kept"
    ):
        sweep(out, on_row=replace_by_a_file, workers=1)
    (out / "rows").unlink()
    (tmp_path / "kept").rename(out / "rows")
    first = fake_runs.stored(out)
    assert len(first) == 1
    sweep(out)
    assert len(fake_runs.stored(out)) == ROWS and started(tmp_path)[next(iter(first))] == 1


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    with claimed(tmp_path / "out"):
        refused = in_a_process_to_kill(_sweep_while_another_runs, tmp_path)
        refused.join(60)
    assert refused.exitcode == 0 and not (tmp_path / "log").exists() and not (tmp_path / "out").exists()


SECRETS = {"vllm_server_base_url": "http://me:hunter2@gpu.internal:8000/?token=abcdef", "run_name": "hf_" + "Ab1" * 9}


def test_secrets_reach_no_file_and_nothing_of_this_machine_is_published(tmp_path):
    profile = sweep(tmp_path / "out", config={**SECRETS, "trackio_space_id": "/home/me/logs"})
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > ROWS
    for path in written:
        content = path.read_bytes()
        assert not any(secret in content for secret in (b"hunter2", b"abcdef", b"Ab1Ab1")), path
    assert fake_runs.stored(tmp_path / "out")  # known by the digests of what was asked for
    again = sweep(tmp_path / "out", config={**SECRETS, "trackio_space_id": "/home/me/logs"})
    assert max(started(tmp_path).values()) == 1 and again == profile
    published = without_private(LayerRanking.from_file(tmp_path / "out" / "layer_profile.json").to_dict())
    given = published["settings"]
    assert given["vllm_server_base_url"] == "<host>" and given["trackio_space_id"] == "logs"


@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_an_engine_that_would_keep_a_secret_in_its_files_is_refused_it(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(module, "load_engine", lambda name: None)
    with pytest.raises(ValueError, match=f"the settings hold a secret, and the engine {engine} would keep it"):
        sweep_layers(settings(config=SECRETS), out=tmp_path / "out", engine=engine)
    assert list(tmp_path.iterdir()) == []


def test_a_row_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", "before")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "a", "after")
    assert (tmp_path / "a").read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["a"]
    spec = RunSpec("m", "t", 0, "grpo", 1, 0)
    (tmp_path / f"{spec.digest()}.json").write_text('{"format": "onelayer-row-1", "digest": "another"}')
    assert RowStore(tmp_path).read(spec) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "12"}, "layer='12' is out of range"),
        ({"layers": "3,3"}, "names a block twice"),
        ({"seeds": []}, "seeds must be one or more different numbers"),
        ({"seeds": [1, 1]}, "seeds must be one or more different numbers"),
        ({"algorithm": "dpo"}, "dpo is offline"),
        ({"algorithm": "gigpo"}, "gigpo needs a task with an environment, such as textworld"),
        ({"engine": "slurp"}, "engine 'slurp' is not known"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"problems": 1}, "problems must be at least 2, got 1: of one problem the noise is not known"),
        ({"learning_rate": float("nan")}, "a learning rate must be above 0, got nan"),
        ({"config": {"learning_rat": 1}}, "no field 'learning_rat'; did you mean learning_rate"),
        ({"config": {"learning_rate": 1}}, "field learning_rate is set by --learning-rate"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        sweep(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def as_stopped(row, steps):
    """What the Ray engine makes of a run that was stopped early."""
    kept = {name: row[name] for name in ("format", "digest", "spec", "seconds")}
    missing = dict.fromkeys(("scores", "mean", "standard_error", "greedy_scores", "problems_digest", "versions"))
    return kept | missing | {"stopped": steps, "steps": steps, "rewards": row["rewards"][:steps]}


def test_a_stopped_block_is_said_to_be_stopped_and_runs_in_full_when_asked(tmp_path):
    whole = sweep(tmp_path / "out", seeds=[0])
    path = next(p for p in (tmp_path / "out" / "rows").glob("*.json") if '"layer": 3,' in p.read_text())
    rows = [json.loads(p.read_text()) for p in (tmp_path / "out" / "rows").glob("*.json")]
    by_layer = {row["spec"]["layer"]: row for row in rows}
    by_layer[3] = as_stopped(by_layer[3], 1)
    asked = settings(seeds=[0])
    profile = make_profile(asked, plan_sweep(asked), {row["digest"]: row for row in by_layer.values()})
    assert profile.sweep.stopped == {"3": [1]} and profile.sweep.contribution[3] is profile.sweep.means[3] is None
    assert profile.order == [11, 5, 0] and profile.sweep.contribution[5] == whole.sweep.contribution[5]
    # one of the two steps of a run (10 and 20 tokens a step), and no evaluation (100)
    assert whole.cost["tokens_generated"] - profile.cost["tokens_generated"] == 10 + 100
    assert whole.cost["tokens_trained"] - profile.cost["tokens_trained"] == 20
    assert profile.to_csv().splitlines()[4].startswith("3,,,,,,") and profile.to_csv().splitlines()[4].endswith(",1")
    path.write_text(json.dumps(by_layer[3]))
    assert sweep(tmp_path / "out", seeds=[0]).sweep.stopped == {}
    assert started(tmp_path)[path.stem] == 2 and sum(started(tmp_path).values()) == 7
