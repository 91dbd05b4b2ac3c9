"""Output folders that are either complete or not there.

Everything is written to a hidden folder beside the target and renamed into place at the end; an error or Ctrl-C removes
it. It does not know what is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class TargetError(OSError, ValueError):
    """The output folder may not be used as one; the message says why and what to do."""


def check_target(target: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raise `TargetError`, saying what to do, unless `target` can become an output folder without losing anything.

    It may not exist yet (its parent must), be empty, or hold nothing but what `is_ours(target)` recognises as written
    by an earlier run of the same command; and it must be writable.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise TargetError(f"{target} exists and is not a folder; choose another output folder.")
    if target.is_dir() and any(target.iterdir()) and not is_ours(target):
        raise TargetError(f"{target} exists and holds other files; choose a new output folder (nothing was changed).")
    if target == Path.cwd():
        raise TargetError(f"{target} is the current folder; name a new folder for the output.")
    if not target.parent.is_dir():
        raise TargetError(f"the folder {target.parent} does not exist; create it or choose another output folder.")
    for folder in (target.parent, target):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise TargetError(f"{folder} is read-only; choose another output folder.")


@contextmanager
def staged_directory(target: Path, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends without an exception.

    Raises:
        TargetError: by `check_target`, on entry and again before the rename.
        OSError: the disk is full, or a rename failed; what was there before is still there.
    """
    check_target(target, is_ours)
    target = target.resolve()
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield staging
        make_readable(staging)
        check_target(target, is_ours)  # minutes may have passed
        old = Path(f"{staging}.old")
        replaced = target.is_dir()
        if replaced:
            target.rename(old)
        try:
            staging.rename(target)
        except BaseException:
            if replaced:
                old.rename(target)
            raise
        if replaced:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def make_readable(folder: Path) -> None:
    """Give a folder and all in it the permissions that the umask allows: mkdtemp and safetensors make files private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
