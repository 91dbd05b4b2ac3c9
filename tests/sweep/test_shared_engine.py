"""Runs in one process on one base: each is the run that it is alone, and ends alone."""

import pytest
from specs import SETTINGS, demo_spec

from peft_onelayer.sweep.engines import shared
from peft_onelayer.sweep.run_layer import run_layer
from peft_onelayer.tuner.joint import JointDecoder


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


SMALL = {"problems": 8, "samples": 2, "settings": {**SETTINGS, "num_generations": 4, "per_device_train_batch_size": 8}}


def test_every_run_is_the_run_that_it_is_alone(tmp_path, passes):
    specs = [demo_spec(layer, seed=seed, **SMALL) for seed in (0, 1) for layer in (2, 5)]
    specs += [demo_spec("base", **SMALL), demo_spec([5, 6], **SMALL, greedy=True)]
    rows = {row["digest"]: row for row in shared.run(specs, folder=tmp_path)}
    assert rows.keys() == {spec.digest() for spec in specs}
    for spec in specs:
        assert without_timings(rows[spec.digest()]) == without_timings(run_layer(spec)), str(spec)
    assert max(len(names) for names, generates in passes if generates) == 6  # the evaluation
    assert max(len(names) for names, generates in passes if not generates) == 5
    assert "could not be joined" not in (tmp_path / "logs" / "shared.log").read_text()
