"""The Ray engine on a cluster of two nodes of this machine, one of which is killed in the middle."""

import sys
import time
from collections import Counter
from dataclasses import replace

import fake_runs
import pytest

from peft_onelayer.sweep.engines import RunsFailedError, load_engine
from peft_onelayer.sweep.run_layer import RunSpec

pytestmark = pytest.mark.usefixtures("light_workers")


def specs(layers, steps=2, **settings):
    return [RunSpec("m", "t", layer, "grpo", steps, 0, settings, problems=3) for layer in layers]


@pytest.fixture
def cluster(light_workers, monkeypatch):
    """Two nodes with one CPU each; the driver is on the first."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster()
    cluster.add_node(num_cpus=1, include_dashboard=False)
    cluster.second = cluster.add_node(num_cpus=1, env_vars={"FAKE_RUNS_NODE": "second"})
    cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    import ray

    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_node_lost_in_the_middle(tmp_path, cluster):
    from peft_onelayer.sweep.engines.ray_engine import run

    todo = specs(range(10), sleep=2.0)
    rows, lost = [], None

    def begun_there():
        return (tmp_path / "log").read_text().split().count("second")

    for row in run(todo, folder=tmp_path, run_row=fake_runs.run):
        rows.append(row)
        if lost is None and row["versions"]["node"] == "second":
            before, deadline = begun_there(), time.monotonic() + 60
            while begun_there() == before and time.monotonic() < deadline:  # so that its next run has just begun
                time.sleep(0.02)
            cluster.remove_node(cluster.second, allow_graceful=False)
            lost = fake_runs.started(tmp_path).total()
    again = fake_runs.started(tmp_path).total() - len(todo)
    print(f"{len(rows)} rows of {len(todo)}; {lost} runs had started when the node was killed, {again} ran again")
    assert Counter(row["digest"] for row in rows) == Counter(spec.digest() for spec in todo)
    assert again == 1  # what ran on the lost node
    expected = {spec.layer: fake_runs.run(spec)["scores"] for spec in todo}
    assert {row["spec"]["layer"]: row["scores"] for row in rows} == expected


@pytest.mark.slow
def test_processes_that_die_runs_that_raise_and_early_stopping(tmp_path, cluster):
    from peft_onelayer.sweep.engines.ray_engine import run

    todo = specs(range(4), kill={"1": 2, "2": 99}, fail={"3": "no luck"})
    rows = []
    with pytest.raises(RunsFailedError, match=r"2 of the runs failed: block [23], seed 0: "):
        for row in run(todo, folder=tmp_path, run_row=fake_runs.run):
            rows.append(row)
    assert sorted(row["spec"]["layer"] for row in rows) == [0, 1]
    assert [fake_runs.started(tmp_path)[spec.digest()] for spec in todo] == [1, 3, 3, 1]

    # Later blocks score higher from the first step on, so that ASHA keeps them.
    todo = [*specs(range(11, -1, -1), steps=18, sleep=0.02), replace(specs(["full"])[0], steps=18)]
    rows = {row["digest"]: row for row in run(todo, folder=tmp_path, early_stop=True, run_row=fake_runs.run)}
    assert len(rows) == len(todo)
    stopped = {row["spec"]["layer"]: row for row in rows.values() if "stopped" in row}
    print("stopped:", {layer: row["stopped"] for layer, row in stopped.items()})
    assert stopped and "full" not in stopped and 11 not in stopped
    for row in stopped.values():
        assert row["stopped"] == row["steps"] == len(row["rewards"]) in (2, 6)
        assert row["scores"] is row["mean"] is None
    assert set(range(12)) - set(stopped) and all(
        len(row["scores"]) == 3 for row in rows.values() if "stopped" not in row
    )
    with pytest.raises(RunsFailedError, match="block 3, seed 0: no luck"):
        list(run(specs([3], fail={"3": "no luck"}), folder=tmp_path, early_stop=True, run_row=fake_runs.run))


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "peft_onelayer.sweep.engines.ray_engine", raising=False)
    with pytest.raises(ValueError, match=r"engine 'ray' needs ray: pip install 'peft-onelayer\[ray\]'"):
        load_engine("ray")
