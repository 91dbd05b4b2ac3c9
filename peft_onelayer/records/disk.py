"""A disk without room, and a folder that is not there any more: one line in place of what the libraries make of it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and hf_xet raise errors of their own with the system's text as Rust writes it, torch one without.
_TORCH = re.compile(r"PytorchStreamWriter failed|inline_container\.cc")
ROOM = 2**16  # bytes; with less a disk is full


class DiskFullError(OSError):
    """There is no room for the output; the message says where, and what was kept.

    Attributes:
        place: the folder that is full.
    """

    def __init__(self, place: Path, number: int, kept: str) -> None:
        said = os.strerror(number)
        super().__init__(f"there is no room in {place} ({said}): {kept}; free some space and try again.")
        self.place, self.errno = place, number


class OutputLostError(OSError):
    """The folder of the output, or one in it, takes no files any more; the message says which, and what was kept."""


@contextmanager
def disk_errors(target: Path, kept: str) -> Iterator[None]:
    """Turn what a full disk, a quota or a limit on the size of files leads to into a `DiskFullError`, and what a folder
    in the output leads to that was removed, replaced by a file or made read-only meanwhile into an `OutputLostError`.

    Args:
        target: the output.
        kept: what is left of the work: "nothing was changed".
    """
    try:
        yield
    except Exception as error:
        if found := _find(error, target):
            raise DiskFullError(*found, kept) from error
        if lost := _lost(error, target):
            said = f"{lost} takes no files any more ({os.strerror(error.errno)})"  # type: ignore[attr-defined]
            raise OutputLostError(f"{said}: {kept}; make it a writable folder again and try again.") from error
        raise


def _find(error: BaseException | None, target: Path) -> tuple[Path, int] | None:
    """Which folder is full, and the system's number for it; None where the error is another one."""
    while error is not None:
        if isinstance(error, DiskFullError):
            return error.place, error.errno or errno.ENOSPC
        if isinstance(error, OSError) and error.errno in FULL:
            name = error.filename2 or error.filename
            place = Path(os.fsdecode(name)).parent if isinstance(name, str | bytes) else _full_one(target)
            return place, error.errno
        for number in FULL:
            if f"{os.strerror(number)} (os error {number})" in str(error):
                return _full_one(target), number
        if isinstance(error, RuntimeError) and _TORCH.search(str(error)):
            return _full_one(target), errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def _lost(error: Exception, target: Path) -> Path | None:
    """The folder in the output that takes no files; None where the error is another one."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | bytes):
        return None
    path = Path(os.fsdecode(error.filename)).resolve()
    if not path.is_relative_to(top := target.resolve()):
        return None
    if error.errno == errno.ENOTDIR:
        return next(folder for folder in reversed([path, *path.parents]) if not folder.is_dir())
    folder = path if path == top else path.parent
    gone = error.errno == errno.ENOENT and not folder.is_dir()
    return folder if gone or error.errno in (errno.EACCES, errno.EROFS, errno.ESTALE) else None


def _full_one(target: Path) -> Path:
    """The folder of the output, unless the one of temporary files is the one that is full."""
    parent, scratch = target.absolute().parent, Path(tempfile.gettempdir())
    return scratch if shutil.disk_usage(scratch).free < ROOM <= shutil.disk_usage(parent).free else parent
