"""A disk without room: one line in place of what the libraries make of it."""

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


@contextmanager
def disk_errors(target: Path, kept: str) -> Iterator[None]:
    """Turn what a full disk, a quota or a limit on the size of files leads to into a `DiskFullError`.

    Args:
        target: the output.
        kept: what is left of the work: "nothing was changed".
    """
    try:
        yield
    except Exception as error:
        found = _find(error, target)
        if found is None:
            raise
        raise DiskFullError(*found, kept) from error


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


def _full_one(target: Path) -> Path:
    """The folder of the output, unless the one of temporary files is the one that is full."""
    parent, scratch = target.absolute().parent, Path(tempfile.gettempdir())
    return scratch if shutil.disk_usage(scratch).free < ROOM <= shutil.disk_usage(parent).free else parent
