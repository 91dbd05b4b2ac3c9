"""Files of one JSON record a line, which are only added to: a kill leaves whole records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none where there is no file. A last line that was not written to its end is left out."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Write the record behind the last whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def find_records(records: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """Those whose fields have these values."""
    return [record for record in records if all(record[name] == value for name, value in fields.items())]
