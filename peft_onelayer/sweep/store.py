"""The rows of a sweep as files: `rows/<digest of the specification>.json`, each complete or not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from peft_onelayer.records.files import write_whole

from .run_layer import FORMAT, Row, RunSpec


class RowStore:
    """The rows in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Create the folder and keep it for this process alone, so that no run is done twice at a time.

        Raises:
            ValueError: another process writes to it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:  # the system drops the lock with the process, however that ends
            lock = FileLock(self.folder / ".lock").acquire(blocking=False)
        except Timeout:
            raise ValueError(f"another sweep is writing to {self.folder.parent}; wait for it to end") from None
        with lock:
            for left in self.folder.glob(".*.partial-*"):  # by a kill
                left.unlink()
            yield

    def read(self, spec: RunSpec) -> Row | None:
        """The row of `spec`; None where there is none, or a damaged one."""
        digest = spec.digest()
        try:
            row = json.loads((self.folder / f"{digest}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        complete = isinstance(row, dict) and row.get("format") == FORMAT and row.get("digest") == digest
        return row if complete else None

    def write(self, row: Row) -> None:
        """Write the whole row or nothing.

        Raises:
            OSError: the disk is full, or not there any more.
        """
        write_whole(self.folder / f"{row['digest']}.json", json.dumps(row, allow_nan=False) + "\n")
