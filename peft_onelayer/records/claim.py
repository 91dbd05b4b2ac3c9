"""An output belongs to one process at a time, and what a killed one left half-written is removed by the next.

While a process writes `out`, it holds a lock on the file `.out.onelayer-lock` beside it. The system drops the lock with
the process, however that ends. What is not finished stands beside `out` under names that begin with `.out.partial-`.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .disk import FULL

LOCK, PARTIAL, REPLACED = ".onelayer-lock", ".partial-", ".old"
TRIES, PAUSE = 3, 0.1  # seconds: another process holds a lock for a moment while it removes what a dead one left
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # some network file systems
_held: dict[Path, tuple[int, int]] = {}  # lock file -> its descriptor and the thread that claimed it


class TargetError(OSError, ValueError):
    """The output may not be written where it was asked for; the message says why and what to do."""


def check_parent(target: Path) -> None:
    """Raise `TargetError` unless the folder that `target`, a whole path, is to stand in is writable, or can be made."""
    there = next(folder for folder in target.parents if os.path.lexists(folder))
    if not there.is_dir():
        raise TargetError(f"{there} is not a folder, so {target} cannot be written; choose another output.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise TargetError(f"{there} is read-only; choose another output.")


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the folders that `target` is to stand in; those that are still empty at the end are removed."""
    check_parent(target)
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # it holds the output
            for folder in missing:
                folder.rmdir()


@contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Keep the output `target`, a file or a folder, for this process and thread while the block runs.

    The folders that it is to stand in are made, and removed again if nothing is written. What dead processes left
    half-written beside it is removed first, of `target` and of other outputs. A thread may claim again what it holds.

    Raises:
        TargetError: another process or thread writes to it, or its folder is read-only or cannot be made.
    """
    target = target.resolve()
    lock = target.with_name(f".{target.name}{LOCK}")
    if lock in _held and _held[lock][1] == threading.get_ident():
        yield
        return
    with _parents(target):
        yield from _alone(target, lock)


def _alone(target: Path, lock: Path) -> Iterator[None]:
    try:
        descriptor = _take(lock)
        for _ in range(TRIES - 1):
            if descriptor is None:
                time.sleep(PAUSE)
                descriptor = _take(lock)
    except OSError as error:
        raise _cannot_write(target, error) from error
    if descriptor is None:
        raise TargetError(
            f"{target} is being written by {_holder(lock)}; wait for it to end, or choose another output."
        )
    _held[lock] = descriptor, threading.get_ident()
    try:
        remove_unfinished(target)
        _remove_stale(target.parent)
        yield
    finally:
        if lock in _held:  # not in a child that was forked meanwhile
            del _held[lock]
            _release(lock, descriptor)


def _cannot_write(target: Path, error: OSError) -> OSError:
    """What to say where a folder takes no file, such as one of /proc; a full disk stays what it is."""
    if error.errno in FULL:
        return error
    return TargetError(f"{target.parent} takes no new file ({error.strerror}); choose another output.")


def remove_unfinished(target: Path) -> None:
    """Remove what was being written when a process that had claimed `target` was killed; what it was about to replace
    returns to its place."""
    prefix = f".{target.name}{PARTIAL}"
    left = [Path(entry) for entry in os.scandir(target.parent) if entry.name.startswith(prefix)]
    for path in sorted(left, reverse=True):  # what was to be replaced before what was to take its place
        if path.name.endswith(LOCK):  # of an output with such a name
            continue
        if path.name.endswith(REPLACED) and not target.exists():
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """Remove what dead processes of this machine left in `folder`, by the locks that they hold no more."""
    for lock in [Path(entry) for entry in os.scandir(folder) if entry.name.endswith(LOCK)]:
        if lock in _held or _record(lock)[1:] != [platform.node()]:
            continue
        try:
            descriptor = _take(lock)
        except OSError:  # another user's
            continue
        if descriptor is not None:
            remove_unfinished(lock.with_name(lock.name.removeprefix(".").removesuffix(LOCK)))
            _release(lock, descriptor)


def _take(lock: Path) -> int | None:
    """The descriptor of the locked file, with this process' name in it; None where another holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _is_free(descriptor, lock):
                os.close(descriptor)
                return None
            if _is_at(descriptor, lock):
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, f"{os.getpid()} {platform.node()}\n".encode())
                return descriptor
        except OSError:  # such as a full disk
            _release(lock, descriptor)
            raise
        os.close(descriptor)  # its holder removed it between the opening and the locking


def _is_free(descriptor: int, lock: Path) -> bool:
    """Lock the file unless another process has; where the file system has no locks, by whether that one lives."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 2**30, os.SEEK_SET)  # behind the text, which others may read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            record = _record(lock)
            return record == [] or (record[1:] == [platform.node()] and not _lives(int(record[0])))
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _release(lock: Path, descriptor: int) -> None:
    if sys.platform == "win32":  # where an open file cannot be removed, and one that another opened stays
        os.close(descriptor)
        try:
            lock.unlink(missing_ok=True)
        except PermissionError:
            return
    else:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _record(lock: Path) -> list[str]:
    """Number and machine of the process that wrote the lock file; [] where it cannot be read, or is being written."""
    try:
        words = lock.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []
    return words if len(words) == 2 and words[0].isdecimal() else []


def _holder(lock: Path) -> str:
    record = _record(lock)
    if record[:1] == [str(os.getpid())]:
        return "another thread of this process"
    return f"process {record[0]} on {record[1]}" if record else "another process"


def _lives(pid: int) -> bool:
    if sys.platform == "win32":  # it always has locks
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _let_go() -> None:
    """In a forked child: a lock that it inherited would outlive the process that claimed the output."""
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)
