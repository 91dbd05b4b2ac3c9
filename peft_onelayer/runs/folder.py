"""The output folder of a training run.

While the run goes on it holds `checkpoints/`, a run.json that says "unfinished", and what was expensive to make before
training; at the end the result is put beside them, run.json last. It does not know what a run is made of.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_onelayer.records.files import check_folder, make_readable
from peft_onelayer.records.run import RunRecord

FORMAT = RunRecord.FORMAT


class RunFolder:
    """The folder of one run, new or to be resumed.

    Args:
        path: the folder; a new run's must not exist or be empty.
        resume: whether it holds an interrupted run that is to go on.
        main: False in all processes of a distributed run but the first; they check and write nothing.

    Attributes:
        previous: the interrupted run's run.json; None for a new run.

    Raises:
        ValueError: the folder holds something else than `resume` says.
    """

    def __init__(self, path: Path, resume: bool, main: bool = True) -> None:
        self.main = main
        self.path = path.resolve()
        self.checkpoints = self.path / "checkpoints"
        self.previous = self._read() if resume or main else None
        if not main:
            return
        state = self.previous["status"] if self.previous else None
        if resume and state is None:
            raise ValueError(f"{path} holds no run to resume; leave out --resume to start one.")
        if state == "finished":
            raise ValueError(f"the run in {path} is finished; choose a new output folder.")
        if state and not resume:
            raise ValueError(f"{path} holds an unfinished run; continue it with --resume or choose a new folder.")
        if not resume:
            check_folder(path, lambda folder: False)

    def _read(self) -> dict[str, Any] | None:
        try:
            record = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.get("format") == FORMAT else None

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint.

        `Trainer._save_checkpoint` writes trainer_state.json last, so one that lacks it, or holds a torn one, was being
        written when the run was killed.
        """
        found = {}
        for folder in self.checkpoints.glob("checkpoint-*"):
            try:
                found[json.loads((folder / "trainer_state.json").read_text())["global_step"]] = folder
            except (OSError, ValueError):
                continue
        return found[max(found)] if found else None

    @contextmanager
    def running(self, record: dict[str, Any]) -> Iterator[None]:
        """Create the folder with an unfinished run.json; on an error remove it, unless it holds work to resume."""
        if not self.main:
            yield
            return
        self.path.mkdir(exist_ok=True)
        for left in self.path.glob(".partial-*"):  # by a kill
            shutil.rmtree(left)
        self.write("run.json", _to_json({**record, "status": "unfinished"}))
        try:
            yield
        except BaseException:
            if {entry.name for entry in self.path.iterdir()} <= {
                "run.json",
                "checkpoints",
            } and not self.last_checkpoint():
                shutil.rmtree(self.path)
            raise

    def write(self, name: str, text: str) -> None:
        """Write a file in one piece."""
        if not self.main:
            return
        partial = self.path / f".{name}.partial"
        partial.write_text(text)
        os.replace(partial, self.path / name)

    @contextmanager
    def publishing(self, record: dict[str, Any]) -> Iterator[Path]:
        """Yield an empty folder whose files are moved into the run's when the block ends, then run.json."""
        if not self.main:
            with tempfile.TemporaryDirectory() as scratch:
                yield Path(scratch)
            return
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=self.path) as scratch:
            yield Path(scratch)
            make_readable(Path(scratch))
            for file in sorted(Path(scratch).iterdir()):
                os.replace(file, self.path / file.name)
        self.write("run.json", _to_json({**record, "status": "finished"}))


def _to_json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"
