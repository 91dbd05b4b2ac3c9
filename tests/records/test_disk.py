"""A full disk is one line that says what is full and what was kept, whatever library met it first."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from outputs import on_a_disk_of
from safetensors.torch import save_file

from peft_onelayer.records.disk import DiskFullError, OutputLostError, disk_errors
from peft_onelayer.records.files import scratch_directory, staged_directory, whole_file, write_whole


def text(path):
    path.write_text("x" * 300_000, encoding="utf-8")


def wrapped(path):
    try:
        text(path)
    except OSError as error:
        raise ValueError("the libraries say: something failed") from error


WRITERS = {
    "text": text,
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "torch": lambda path: torch.save(torch.zeros(100_000), path),
    "whole": lambda path: write_whole(path, "x" * 300_000),
    "wrapped": wrapped,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer(tmp_path, writer):
    def run(disk):
        try:
            with staged_directory(disk / "out") as folder:
                WRITERS[writer](folder / "file")
        except DiskFullError as error:
            return str(error), error.errno, sorted(path.name for path in disk.iterdir())
        return "it fitted"

    said, number, left = on_a_disk_of("64k", tmp_path, run)
    assert (number, left) == (errno.ENOSPC, [])
    assert said == (
        f"there is no room in {tmp_path} (No space left on device): nothing was changed; free some space and try again."
    ) or (writer != "safetensors" and f"no room in {tmp_path}/" in said), said
    assert "\n" not in said


def test_a_limit_on_the_size_of_files(tmp_path):
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with scratch_directory(tmp_path / "out") as folder:
                text(folder / "file")
        except DiskFullError as error:
            os._exit(0 if "(File too large)" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_outermost_says_what_was_kept_and_other_errors_stay(tmp_path):
    outer, inner = disk_errors(tmp_path / "out", "all is kept"), disk_errors(tmp_path / "out" / "inner", "nothing is")
    with pytest.raises(DiskFullError) as caught, outer, inner:
        raise OSError(errno.EDQUOT, "quota", str(tmp_path / "there" / "file"))
    said = (
        f"there is no room in {tmp_path / 'there'} (Disk quota exceeded): all is kept; free some space and try again."
    )
    assert str(caught.value) == said and caught.value.errno == errno.EDQUOT
    for error in (
        ValueError("x"),
        OSError(errno.EACCES, "x"),
        RuntimeError("no space for a joke"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as caught, disk_errors(Path("out"), "all is kept"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("kept", [True, False])
def test_a_file_is_whole_or_not_there(tmp_path, kept):
    if kept:
        (tmp_path / "a").write_text("before", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a") as partial:
        partial.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [("a", "before")] * kept


def test_a_folder_that_is_not_there_any_more_is_named_and_what_is_outside_of_it_stays(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "rows").touch()
    for path, lost in ((out / "rows" / "a", out / "rows"), (out / "gone" / "a", out / "gone")):
        with pytest.raises(OutputLostError) as raised, disk_errors(out, "rows are kept"):
            write_whole(path, "x")
        assert str(raised.value).startswith(f"{lost} takes no files any more (")
        assert str(raised.value).endswith("): rows are kept; make it a writable folder again and try again.")
    with pytest.raises(FileNotFoundError), disk_errors(out, "rows are kept"):
        (out / "missing").read_text(encoding="utf-8")  # whose folder is there
    with pytest.raises(NotADirectoryError), disk_errors(tmp_path / "other", "rows are kept"):
        write_whole(out / "rows" / "a", "x")
