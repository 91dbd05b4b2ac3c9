"""Files: the names in an adapter's folder, output that is complete or not there, and digests.

An output folder is written as a hidden folder beside the target, and a file as a hidden file; both are renamed into
place at the end. An error or Ctrl-C removes them, and after a kill the next process does that claims the target.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .claim import PARTIAL, REPLACED, TargetError, check_parent, claimed
from .disk import disk_errors
from .text import check_limits, one_line, well_formed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RUN, EVALUATION, PROFILE, CARD = "run.json", "eval.json", "layer_profile.json", "README.md"
RECORD_LIMIT = 32 * 2**20  # bytes of a JSON file that is read whole
UNCHANGED = "nothing was changed"


@contextmanager
def output(target: Path, kept: str = UNCHANGED) -> Iterator[None]:
    """Keep `target` for this process alone, and say in one line if its disk gets full.

    A command enters it before any heavy work.

    Args:
        kept: what is left of the work where the disk is full.

    Raises:
        TargetError: by `claimed`.
        DiskFullError: by `disk_errors`.
    """
    with disk_errors(target, kept), claimed(target):
        yield


def check_folder(target: Path, replaceable: Callable[[Path], bool] = lambda folder: False) -> None:
    """Raise `TargetError`, saying what to do, unless `target` can become an output folder without losing anything.

    It may not exist yet, be empty, or be `replaceable`, as what an earlier run of the same command
    wrote; and it must be writable.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise TargetError(f"{target} exists and is not a folder; choose another output folder.")
    if target.is_dir() and any(target.iterdir()) and not replaceable(target):
        raise TargetError(f"{target} exists and holds other files; choose a new output folder (nothing was changed).")
    if target == Path.cwd():
        raise TargetError(f"{target} is the current folder; name a new folder for the output.")
    check_parent(target)
    if target.is_dir() and not os.access(target, os.W_OK | os.X_OK):
        raise TargetError(f"{target} is read-only; choose another output folder.")


def check_file(target: Path, replaceable: Callable[[Path], bool] = lambda file: False) -> None:
    """Raise `TargetError`, saying what to do, unless `target` can become an output file without losing anything.

    It may not exist yet, or be `replaceable`; and its folder must be writable.
    """
    target = target.resolve()
    if target.is_dir():
        raise TargetError(f"{target} is a folder; give a file, such as {target / 'out.json'}.")
    if target.exists() and not replaceable(target):
        raise TargetError(f"{target} exists and is another file; choose another one (nothing was changed).")
    check_parent(target)


@contextmanager
def staged_directory(target: Path, replaceable: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends without an exception.

    Raises:
        TargetError: by `check_folder`, on entry and again before the rename; another process writes to `target`.
        DiskFullError: the disk is full.
        OSError: a rename failed; what was there before is still there.
    """
    check_folder(target, replaceable)
    target = target.resolve()
    with scratch_directory(target) as staging:
        yield staging
        make_readable(staging)
        check_folder(target, replaceable)  # minutes may have passed
        old = Path(f"{staging}{REPLACED}")
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


@contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `target`, which is claimed; it is removed when the block ends.

    Raises:
        TargetError, DiskFullError: by `output`.
    """
    with output(target):
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}{PARTIAL}", dir=target.resolve().parent))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def make_readable(folder: Path) -> None:
    """Give a folder and all in it the permissions of a plain folder and file: mkdtemp and safetensors make theirs
    private."""
    plain = folder / ".plain"
    plain.mkdir()
    of_folder = plain.stat().st_mode
    (plain / "file").touch()
    of_file = (plain / "file").stat().st_mode
    shutil.rmtree(plain)
    for path in (folder, *folder.rglob("*")):
        path.chmod(of_folder if path.is_dir() else of_file)


def write_whole(path: Path, text: str) -> None:
    """Write a file in one piece; after an error there is what was there before.

    Raises:
        OSError: the disk is full, or not there any more.
    """
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(well_formed(text))
        file.flush()
        os.fsync(file.fileno())  # a full disk may show only now


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a hidden file that becomes `path` when the block ends without an exception."""
    partial = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON file that holds one object.

    Raises:
        ValueError: in one line: not there, too large, not JSON, or no object.
    """
    return parse_fields(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a file that may come from a stranger.

    Raises:
        ValueError: in one line: not there, too large, or not UTF-8.
    """
    try:
        if path.stat().st_size > RECORD_LIMIT:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than any record ({RECORD_LIMIT:,}).")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None


def parse_fields(text: str, where: str) -> dict[str, Any]:
    """The fields of a JSON text that holds one object; `where` names it in the error.

    Raises:
        ValueError: in one line: not JSON, no object, or beyond the limits of `check_limits`.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {one_line(error)}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where} holds no fields: expected a JSON object.")
    check_limits(fields, where)
    return fields


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digests(model: str) -> dict[str, str]:
    """SHA-256 of the configuration and the weights of a model in a folder, by file; {} for one on the Hub."""
    folder = Path(model).expanduser()
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))] if folder.is_dir() else []
    return {path.name: file_digest(path) for path in files}
