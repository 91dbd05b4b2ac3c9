"""Local workers: rows as they are done, processes that die, runs that raise, and nothing left running."""

import os
from collections import Counter
from contextlib import closing

import fake_runs
import pytest

from peft_onelayer.sweep.engines import RunsFailedError, load_engine
from peft_onelayer.sweep.engines.local import run, visible_devices
from peft_onelayer.sweep.run_layer import RunSpec

pytestmark = pytest.mark.usefixtures("light_workers")


def specs(layers=range(5), **settings):
    settings = {"sleep": 0.02} | settings
    return [RunSpec("m", "t", layer, "grpo", 2, 0, settings, problems=3) for layer in layers]


def test_every_row_once(tmp_path):
    todo = specs()
    rows = list(run(todo, folder=tmp_path, workers=2, run_row=fake_runs.run))
    assert (
        Counter(row["digest"] for row in rows) == Counter(spec.digest() for spec in todo) == fake_runs.started(tmp_path)
    )
    assert [row["scores"] for row in sorted(rows, key=lambda row: row["spec"]["layer"])] == [
        fake_runs.run(spec)["scores"] for spec in todo
    ]
    logs = sorted((tmp_path / "logs").iterdir())
    assert [path.name for path in logs] == ["worker-0.log", "worker-1.log"]
    lines = [line for path in logs for line in path.read_text(encoding="utf-8").splitlines()]
    told = {f"{spec}: step {step} of {spec.steps}, reward " for spec in todo for step in range(1, spec.steps + 1)}
    assert {line[: line.index("reward ") + 7] for line in lines if ": step " in line} == told
    assert list(run([], folder=tmp_path, run_row=fake_runs.run)) == []


def test_they_come_as_they_are_done(tmp_path):
    slow, fast = specs([0], sleep=60.0) + specs([1])
    with closing(run([slow, fast], folder=tmp_path, workers=2, run_row=fake_runs.run)) as rows:
        assert next(rows)["digest"] == fast.digest()


@pytest.mark.more
def test_a_run_whose_process_dies_is_tried_again_twice(tmp_path):
    todo = specs(kill={"1": 2, "3": 99})
    rows = []
    with pytest.raises(RunsFailedError) as error:
        for row in run(todo, folder=tmp_path, workers=2, run_row=fake_runs.run):
            rows.append(row)
    assert sorted(row["spec"]["layer"] for row in rows) == [0, 1, 2, 4]
    assert [fake_runs.started(tmp_path)[spec.digest()] for spec in todo] == [1, 3, 1, 3, 1]
    message = str(error.value)
    assert message.startswith("1 of the runs failed: block 3, seed 0: its process died 3 times, at last by SIGKILL")
    assert "what is done is kept" in message and "\n" not in message


def test_a_run_that_raises_is_not_tried_again_and_stops_no_other(tmp_path):
    todo = specs(fail={"0": "no such\nthing", "1": "nor this"})
    rows = []
    with pytest.raises(RunsFailedError, match=r"2 of the runs failed: block [01], seed 0: .* \(and 1 more\)"):
        for row in run(todo, folder=tmp_path, workers=1, run_row=fake_runs.run):
            rows.append(row)
    assert len(rows) == 3 and set(fake_runs.started(tmp_path).values()) == {1}
    assert "ValueError: no such" in (tmp_path / "logs" / "worker-0.log").read_text()  # with its traceback


def running(marker):
    """Workers that hold `marker` in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/cmdline", "rb") as command:
                if marker.encode() in environ.read() and b"engines.worker" in command.read():
                    found.append(pid)
        except OSError:
            continue
    return found


def test_closing_it_ends_the_workers(tmp_path):
    todo = [*specs([0]), *specs([1, 2], sleep=3600.0)]
    with closing(run(todo, folder=tmp_path, workers=2, run_row=fake_runs.run)) as rows:
        next(rows)
        assert len(running(str(tmp_path))) == 2
    assert running(str(tmp_path)) == []


def test_one_worker_per_visible_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_devices() == ["3", "5"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_devices() == []


def test_each_worker_gets_its_gpu_or_one_thread(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_onelayer.sweep.engines.local.visible_devices", lambda: ["3", "5"])
    seen = {row["cuda"] for row in run(specs(), folder=tmp_path, run_row=fake_runs.report_environment)}
    assert seen == {"3", "5"}
    monkeypatch.setattr("peft_onelayer.sweep.engines.local.visible_devices", list)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    rows = list(run(specs([0]), folder=tmp_path, run_row=fake_runs.report_environment))
    assert rows[0]["threads"] == "1"


def test_an_engine_that_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match="engine 'slurp' is not known; expected one of local, shared, ray, slurm"):
        load_engine("slurp")
    assert load_engine("local") is run
