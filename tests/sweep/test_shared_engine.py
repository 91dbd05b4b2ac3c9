"""Runs in one process on one base: each is the run that it is alone, and ends alone."""

import os
import signal
import sys
import threading
import time

import pytest
from specs import SETTINGS, demo_spec

from peft_onelayer.sweep.engines import RunsFailedError, attempt, load_engine, shared
from peft_onelayer.sweep.run_layer import run_layer
from peft_onelayer.sweep.store import RowStore
from peft_onelayer.sweep.sweep import collect_rows
from peft_onelayer.tuner.joint import JointDecoder

STEP = {**SETTINGS, "num_generations": 4, "per_device_train_batch_size": 8}
SMALL = {"problems": 8, "samples": 2, "settings": STEP}


def without_timings(row):
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.fixture
def passes(monkeypatch):
    """The names of the runs in every joint pass."""
    seen = []
    run = JointDecoder.run

    def noted(self, passes):
        run(self, passes)
        seen.append((sorted(own.name for own in passes), passes[0].cache is not None))

    monkeypatch.setattr(JointDecoder, "run", noted)
    return seen


@pytest.mark.parametrize("seeds", [(0,), pytest.param((0, 1), marks=pytest.mark.more)], ids=str)
def test_every_run_is_the_run_that_it_is_alone(tmp_path, passes, seeds):
    specs = [demo_spec(layer, seed=seed, **SMALL) for seed in seeds for layer in (2, 5)]
    if len(seeds) > 1:
        specs += [demo_spec("base", **SMALL), demo_spec([5, 6], **SMALL, greedy=True)]
    rows = {row["digest"]: row for row in shared.run(specs, folder=tmp_path)}
    assert rows.keys() == {spec.digest() for spec in specs}
    for spec in specs:
        assert without_timings(rows[spec.digest()]) == without_timings(run_layer(spec)), str(spec)
    assert max(len(names) for names, generates in passes if generates) == len(specs)  # the evaluation
    assert max(len(names) for names, generates in passes if not generates) == len(specs) - (len(seeds) > 1)
    assert "could not be joined" not in (tmp_path / "logs" / "shared.log").read_text()


def stopped_at_first_step(spec, on_step, place):
    def stop(step, reward):
        if spec.layer == 5:
            raise ValueError(f"no step {step}")

    return run_layer(spec, stop, place)


@pytest.mark.more
def test_a_run_that_fails_ends_alone(tmp_path, passes):
    specs = [demo_spec(layer, **SMALL) for layer in (2, 5, 7)]
    diverging = demo_spec(3, **{**SMALL, "settings": {**STEP, "learning_rate": 1e38}})
    rows = []
    with pytest.raises(RunsFailedError) as error:
        for row in shared.run([*specs, diverging], folder=tmp_path, run_row=stopped_at_first_step):
            rows.append(row)
    assert sorted(row["spec"]["layer"] for row in rows) == [2, 7]
    for spec in (specs[0], specs[2]):
        (row,) = [row for row in rows if row["digest"] == spec.digest()]
        assert without_timings(row) == without_timings(run_layer(spec))
    assert str(error.value).startswith(
        "2 of the runs failed: block 5, seed 0, learning rate 0.003: no step 1 (and 1 more)"
    )
    text = (tmp_path / "logs" / "shared.log").read_text()
    assert "ValueError: no step 1" in text  # with its traceback
    alone = attempt(run_layer, diverging)["error"]
    assert alone.startswith("RuntimeError: probability tensor contains") and alone.partition(": ")[2] in text
    assert max(len(names) for names, _ in passes) == 4 and len(passes[-1][0]) == 2


@pytest.mark.more
def test_an_interrupted_group_goes_on_with_the_runs_that_are_missing(tmp_path, passes):
    specs = [demo_spec(layer, **SMALL) for layer in (2, 5, 7)]
    threads = threading.active_count()
    store, begun = RowStore(tmp_path / "rows"), []
    store.prepare()

    def run_row(spec, on_step, place):
        begun.append(spec.layer)
        return run_layer(spec, on_step, place)

    def collect(on_row=lambda spec, row: None):
        run = lambda missing: shared.run(missing, folder=tmp_path, workers=2, run_row=run_row)  # noqa: E731
        return collect_rows(specs, store=store, run=run, on_row=on_row)

    def interrupt(spec, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(interrupt)
    assert begun == [2, 5] and threading.active_count() == threads
    assert max(len(names) for names, _ in passes) == 2  # as many as `workers`
    (finished,) = [spec.layer for spec in specs if store.read(spec)]
    rows = collect()
    assert sorted(begun[2:]) == sorted({2, 5, 7} - {finished})
    assert {row["spec"]["layer"] for row in rows.values()} == {2, 5, 7}


@pytest.mark.more
def test_runs_that_share_nothing_follow_one_after_another(tmp_path, passes):
    specs = [demo_spec("full", **SMALL), demo_spec(5, steps=1, **SMALL)]
    rows = {row["spec"]["layer"]: row for row in shared.run(specs, folder=tmp_path)}
    assert list(rows) == [5, "full"]
    assert without_timings(rows["full"]) == without_timings(run_layer(specs[0]))
    assert {name for names, _ in passes for name in names} == {f"run 0, {specs[1]}"}


@pytest.mark.more
def test_a_model_with_dropout_passes_by_itself(tmp_path, passes, monkeypatch):
    monkeypatch.setattr("peft_onelayer.rl.prefix.draws", lambda decoder: True)
    spec = demo_spec(5, **SMALL)
    (row,) = shared.run([spec], folder=tmp_path)
    assert without_timings(row) == without_timings(run_layer(spec)) and passes == []


@pytest.mark.more
def test_where_passes_cannot_be_joined_each_run_passes_by_itself(tmp_path, monkeypatch):
    def refuse(self, passes):
        raise TypeError("not\nthese")

    monkeypatch.setattr(JointDecoder, "run", refuse)
    specs = [demo_spec(layer, **SMALL) for layer in (2, 5)]
    rows = {row["digest"]: row for row in shared.run(specs, folder=tmp_path)}
    for spec in specs:
        assert without_timings(rows[spec.digest()]) == without_timings(run_layer(spec))
    text = (tmp_path / "logs" / "shared.log").read_text()
    assert text.count("passes that could not be joined are run one by one: not these") == 1


def test_several_gpus_are_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_onelayer.sweep.engines.shared.visible_devices", lambda: ["0", "1"])
    with pytest.raises(ValueError, match="computes on one GPU, and 2 are visible; name one in CUDA_VISIBLE_DEVICES"):
        next(load_engine("shared")([demo_spec(5)], folder=tmp_path))
    monkeypatch.undo()
    assert list(shared.run([], folder=tmp_path)) == [] and not (tmp_path / "logs").exists()


def test_ctrl_c_ends_a_run_that_shares_nothing_at_once(tmp_path):
    worked = []

    def endless(spec, on_step, place):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            time.sleep(0.01)
        worked.append(spec)

    with pytest.raises(KeyboardInterrupt):
        list(shared.run([demo_spec("full", **SMALL)], folder=tmp_path, run_row=endless))
    assert not worked


def test_a_reward_that_exits_ends_its_run_alone(tmp_path):
    def run_row(spec, on_step, place):
        if spec.layer == 5:
            sys.exit("no more")
        return {"digest": spec.digest()}

    specs, rows = [demo_spec(layer, **SMALL) for layer in (2, 5, "full")], []
    with pytest.raises(RunsFailedError, match=r"1 of the runs failed: block 5, .*: SystemExit: no more; what is done"):
        for row in shared.run(specs, folder=tmp_path, run_row=run_row):
            rows.append(row)
    assert {row["digest"] for row in rows} == {specs[0].digest(), specs[2].digest()}


def test_a_backward_that_fails_is_the_failure_of_its_runs(tmp_path, monkeypatch):
    """Of a GPU without enough memory, for instance."""

    def fail(passes):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(JointDecoder, "backward", fail)
    specs, rows = [demo_spec(layer, **SMALL) for layer in (2, 5)], []
    with pytest.raises(RunsFailedError, match=r"2 of the runs failed: block 2, .*: RuntimeError: out of memory"):
        for row in shared.run([*specs, demo_spec("base", **SMALL)], folder=tmp_path):
            rows.append(row)
    assert [row["spec"]["layer"] for row in rows] == ["base"]
