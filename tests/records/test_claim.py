"""An output belongs to one process at a time, and nothing of a dead one stays."""

import errno
import os
import platform
import signal
import subprocess
import sys
import threading
import time

import pytest

from peft_onelayer.records import claim
from peft_onelayer.records.claim import TargetError, claimed
from peft_onelayer.records.files import staged_directory, write_whole

HOLD = """
import sys, time
from pathlib import Path
from peft_onelayer.records.files import staged_directory
with staged_directory(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("1")
    print("now", flush=True)
    time.sleep(60)
"""
RACE = """
import sys, time
from pathlib import Path
from peft_onelayer.records.claim import TargetError, claimed
out, start = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, start - time.time()))
for _ in range(200):
    try:
        with claimed(out):
            out.mkdir()  # fails where another holds it too
            out.rmdir()
    except TargetError:
        pass
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is writing tmp_path/out."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"now\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_process_is_refused_and_touches_nothing(tmp_path, holder):
    before = names(tmp_path)
    message = f"out is being written by process {holder.pid} on {platform.node()}; wait for it to end, or choose"
    with pytest.raises(TargetError, match=message), claimed(tmp_path / "out"):
        raise AssertionError("the block must not run")
    with claimed(tmp_path / "other"):  # what lives is not taken for something left
        assert names(tmp_path) == sorted([*before, ".other.onelayer-lock"])
    assert names(tmp_path) == before and len(before) == 2


def test_a_dead_process_holds_nothing_and_what_it_left_goes(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert len(names(tmp_path)) == 2
    with claimed(tmp_path / "out"):
        assert names(tmp_path) == [".out.onelayer-lock"]
    assert names(tmp_path) == []


def test_another_output_in_the_same_folder_removes_it_too(tmp_path, holder):
    holder.kill()
    holder.wait()
    (tmp_path / ".theirs.partial-abc").mkdir()  # no lock beside it: nobody of ours made it
    (tmp_path / ".elsewhere.partial-abc").mkdir()
    (tmp_path / ".elsewhere.onelayer-lock").write_text("1 another-machine\n")
    with claimed(tmp_path / "other"):
        pass
    assert names(tmp_path) == [".elsewhere.onelayer-lock", ".elsewhere.partial-abc", ".theirs.partial-abc"]


def test_what_was_about_to_be_replaced_returns(tmp_path):
    """A kill between the two renames of `staged_directory`."""
    for name in (".out.partial-abc", ".out.partial-abc.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name.rpartition(".")[2]).touch()
    with claimed(tmp_path / "out"):
        assert names(tmp_path) == [".out.onelayer-lock", "out"] and names(tmp_path / "out") == ["old"]
    (tmp_path / ".out.partial-abc.old").mkdir()  # and after the second
    with claimed(tmp_path / "out"):
        assert names(tmp_path) == [".out.onelayer-lock", "out"] and names(tmp_path / "out") == ["old"]


def test_names_that_begin_alike_are_not_mixed_up(tmp_path):
    with claimed(tmp_path / "out.partial-x"), claimed(tmp_path / "out"):
        assert names(tmp_path) == [".out.onelayer-lock", ".out.partial-x.onelayer-lock"]
    assert names(tmp_path) == []


@pytest.mark.more
def test_one_of_many_at_a_time(tmp_path):
    command = [sys.executable, "-c", RACE, tmp_path / "out", str(time.time() + 1)]
    racing = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    said = [process.communicate(timeout=60)[1] for process in racing]
    assert said == [b""] * 4 and [process.returncode for process in racing] == [0] * 4
    assert names(tmp_path) == []


def test_a_thread_may_claim_again_what_it_holds_and_another_may_not(tmp_path):
    said = []

    def other():
        try:
            with claimed(tmp_path / "out"):
                said.append("held twice")
        except TargetError as error:
            said.append(str(error))

    with claimed(tmp_path / "out"):
        with claimed(tmp_path / "out"):
            pass
        assert names(tmp_path) == [".out.onelayer-lock"]
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(said) == 1 and "is being written by another thread of this process" in said[0]
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_does_not_hold_it_on(tmp_path):
    """A data loader's worker that outlives its parent."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        with claimed(tmp_path / "out"):
            child = os.fork()
            if child == 0:
                os.close(write)
                time.sleep(60)
                os._exit(0)
            os.write(write, str(child).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    child = int(os.read(read, 20))
    try:
        os.kill(child, 0)  # it lives
        with claimed(tmp_path / "out"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(read)
        os.close(write)
    assert names(tmp_path) == []


def test_a_file_system_without_locks_goes_by_whether_the_process_lives(tmp_path, monkeypatch):
    import fcntl

    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = tmp_path / ".out.onelayer-lock"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for record, free in ((f"{ended.pid} {platform.node()}", True), ("1 another-machine", False), ("", True)):
        lock.write_text(record)
        if free:
            with claimed(tmp_path / "out"):
                assert lock.read_text() == f"{os.getpid()} {platform.node()}\n"
            assert not lock.exists()
        else:
            with pytest.raises(TargetError, match="by process 1 on another-machine"), claimed(tmp_path / "out"):
                pass
            assert lock.read_text() == record
    lock.write_text(f"{os.getppid()} {platform.node()}")
    with pytest.raises(TargetError, match=f"by process {os.getppid()} on"), claimed(tmp_path / "out"):
        pass


def test_folders_that_are_not_there_are_made_and_go_again_when_nothing_is_written(tmp_path):
    with claimed(tmp_path / "no" / "such" / "out"):
        assert (tmp_path / "no" / "such").is_dir()
    assert names(tmp_path) == []
    with pytest.raises(KeyError), claimed(tmp_path / "no" / "such" / "out"):
        raise KeyError
    assert names(tmp_path) == []
    with claimed(tmp_path / "no" / "such" / "out"):
        (tmp_path / "no" / "such" / "out").write_text("x")
    assert names(tmp_path / "no" / "such") == ["out"]
    with pytest.raises(TargetError, match="out is not a folder"), claimed(tmp_path / "no/such/out/deeper/file"):
        pass


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def write(descriptor, data):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(claim.os, "write", write)
        with pytest.raises(OSError, match="full"), claimed(tmp_path / "out"):
            pass
    assert names(tmp_path) == []
    with claimed(tmp_path / "out"):
        write_whole(tmp_path / "out", "x")
    assert names(tmp_path) == ["out"]


def test_a_folder_is_refused_while_another_process_writes_it(tmp_path, holder):
    with pytest.raises(TargetError, match="is being written by"), staged_directory(tmp_path / "out"):
        raise AssertionError("the block must not run")
