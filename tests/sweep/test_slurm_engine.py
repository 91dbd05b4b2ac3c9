"""The Slurm engine, on submitit's local executor: processes in place of jobs."""

from contextlib import closing

import fake_runs
import pytest

from peft_onelayer.sweep.engines import RunsFailedError, load_engine
from peft_onelayer.sweep.run_layer import RunSpec

submitit = pytest.importorskip("submitit")
run = load_engine("slurm")

pytestmark = pytest.mark.usefixtures("light_workers")
LOCAL = {"parameters": {"cluster": "local"}, "poll": 0.05}


def specs(layers, **settings):
    return [RunSpec("m", "t", layer, "grpo", 1, 0, settings, problems=3) for layer in layers]


@pytest.mark.more
def test_every_row_once_and_lost_jobs_are_submitted_again(tmp_path, monkeypatch):
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0.2)  # it waits so long for a slow file system
    todo = specs(range(4), kill={"1": 2, "2": 99}, fail={"3": "no luck"})
    rows = []
    with pytest.raises(RunsFailedError, match=r"2 of the runs failed: block [23], seed 0: "):
        for row in run(todo, folder=tmp_path, workers=2, run_row=fake_runs.run, **LOCAL):
            rows.append(row)
    assert sorted(row["digest"] for row in rows) == sorted(spec.digest() for spec in todo[:2])
    assert [fake_runs.started(tmp_path)[spec.digest()] for spec in todo] == [1, 3, 3, 1]
    assert {row["spec"]["layer"]: row["scores"] for row in rows} == {
        spec.layer: fake_runs.run(spec)["scores"] for spec in todo[:1] + specs([1])
    }


def test_closing_it_cancels_the_jobs(tmp_path):
    todo = specs([0]) + specs([1], sleep=60)
    with closing(run(todo, folder=tmp_path, run_row=fake_runs.run, **LOCAL)) as rows:
        assert next(rows)["spec"]["layer"] == 0
    assert fake_runs.started(tmp_path).total() <= 2


def test_without_a_cluster_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"submitit refused slurm .* Could not detect .srun."):
        list(run(specs([0]), folder=tmp_path, run_row=fake_runs.run))
    with pytest.raises(ValueError, match=r"submitit refused local with .*no_such_field"):
        list(run(specs([0]), folder=tmp_path, parameters={"cluster": "local", "no_such_field": 1}))


def test_without_submitit_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    monkeypatch.delitem(__import__("sys").modules, "peft_onelayer.sweep.engines.slurm")
    with pytest.raises(ValueError, match=r"engine 'slurm' needs submitit: pip install 'peft-onelayer\[slurm\]'"):
        load_engine("slurm")
