"""The folder of a run is never taken for something that it is not, and never loses what can be resumed."""

import json
from dataclasses import replace

import pytest
from run_records import RECORD

from peft_onelayer.records.run import RunResults, differences
from peft_onelayer.runs.folder import RunFolder


def checkpoint(folder, step, torn=False):
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if torn is not None:
        state = json.dumps({"global_step": step})
        (path / "trainer_state.json").write_text(state[:-1] if torn else state)
    return path


def test_a_run_from_start_to_end(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    assert folder.previous is None and not folder.path.exists()
    with folder.running(RECORD):
        assert json.loads((folder.path / "run.json").read_text()) == RECORD.to_dict()
        with folder.publishing() as published:
            (published / "weights").write_text("w")
            assert not (folder.path / "weights").exists()
        finished = replace(RECORD, status="finished", results=RunResults(1))
        folder.write_record(finished)
    assert {p.name for p in folder.path.iterdir()} == {"weights", "run.json"}
    assert json.loads((folder.path / "run.json").read_text()) == finished.to_dict()
    for resume in (False, True):
        with pytest.raises(ValueError, match="finished; choose a new output folder"):
            RunFolder(folder.path, resume)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_removes_what_cannot_be_resumed(tmp_path, error):
    folder = RunFolder(tmp_path / "run", resume=False)
    with pytest.raises(error), folder.running(RECORD):
        checkpoint(folder, 1, torn=True)
        checkpoint(folder, 2, torn=None)
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", ["checkpoint", "layer_profile.json"])
def test_an_error_keeps_what_can(tmp_path, kept):
    folder = RunFolder(tmp_path / "run", resume=False)
    with pytest.raises(KeyboardInterrupt), folder.running(RECORD):
        newest = checkpoint(folder, 10) if kept == "checkpoint" else folder.write(kept, "{}")
        if kept == "checkpoint":
            checkpoint(folder, 9)
            checkpoint(folder, 11, torn=True)
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="unfinished run; continue it with --resume"):
        RunFolder(folder.path, resume=False)
    (folder.path / ".partial-killed").mkdir()
    again = RunFolder(folder.path, resume=True)
    assert again.previous == RECORD
    assert again.last_checkpoint() == newest
    with again.running(RECORD):
        assert not (folder.path / ".partial-killed").exists()


def test_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        RunFolder(tmp_path / "run", resume=True)
    (tmp_path / "thesis").write_text("")
    for content in (None, "{", "[]", '{"format": "other", "status": "unfinished"}'):
        if content is not None:
            (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match="holds no run to resume"):
            RunFolder(tmp_path, resume=True)
        with pytest.raises(ValueError, match="holds other files"):
            RunFolder(tmp_path, resume=False)


def test_other_processes_write_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False, main=False)
    with folder.running(RECORD), folder.publishing() as published:
        folder.write("pairs.jsonl", "")
        assert published.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_differences_are_named():
    old = {"config": {"beta": 0.0, "top_k": 0}, "seed": 0, "layer": "5"}
    new = {"config": {"beta": 0.1, "top_k": 0}, "seed": 0, "full": True, "layer": "5"}
    assert differences(old, new) == ["config.beta: 0.0 -> 0.1", "full: None -> True"]
    assert differences(old, old) == []
