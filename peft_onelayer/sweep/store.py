"""The rows of a sweep as files: `rows/<digest of the specification>.json`, each complete or not there."""

from __future__ import annotations

import json
from pathlib import Path

from peft_onelayer.records.claim import PARTIAL
from peft_onelayer.records.files import write_whole
from peft_onelayer.records.privacy import without_secrets

from .run_layer import FORMAT, Row, RunSpec


class RowStore:
    """The rows in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Create the folder, and remove what a kill left half-written in it. Whoever calls this has claimed the sweep's
        folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in (*self.folder.glob(f".*{PARTIAL}*"), *self.folder.parent.glob(f".*{PARTIAL}*")):
            left.unlink(missing_ok=True)

    def path(self, digest: str) -> Path:
        """The file of the row whose specification has this digest."""
        return self.folder / f"{digest}.json"

    def read(self, spec: RunSpec) -> Row | None:
        """The row of `spec`; None where there is none, or a damaged one."""
        digest = spec.digest()
        try:
            row = json.loads(self.path(digest).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        complete = isinstance(row, dict) and row.get("format") == FORMAT and row.get("digest") == digest
        return row if complete else None

    def write(self, row: Row) -> None:
        """Write the whole row, without secrets, or nothing.

        Raises:
            OSError: the disk is full, or not there any more.
        """
        write_whole(self.path(row["digest"]), json.dumps(without_secrets(row), allow_nan=False) + "\n")
