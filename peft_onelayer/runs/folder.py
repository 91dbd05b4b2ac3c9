"""The output folder of a training run.

While the run goes on it holds `checkpoints/`, a run.json that says "unfinished", and what was expensive to make before
training; at the end the result is put beside them, run.json last. Whoever makes a `RunFolder` has claimed the folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from peft_onelayer.records.claim import PARTIAL
from peft_onelayer.records.files import PROFILE, RUN, check_folder, make_readable, read_fields, read_text, write_whole
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.run import RunRecord

from .log import LOG
from .recipes import RUN_YAML


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
        state = self.previous.status if self.previous else None
        if resume and state is None:
            raise ValueError(f"{path} holds no run to resume; leave out --resume to start one.")
        if state == "finished" and not (resume and self.last_checkpoint()):  # with more steps it can go on
            raise ValueError(f"the run in {path} is finished; choose a new output folder.")
        if state and not resume:
            raise ValueError(f"{path} holds an unfinished run; continue it with --resume or choose a new folder.")
        if not resume:
            check_folder(path, _is_unfinished)

    def _read(self) -> RunRecord | None:
        path = self.path / RUN
        try:
            fields = read_fields(path)
        except ValueError:  # not there, or somebody else's
            return None
        return RunRecord.from_dict(fields, str(path)) if fields.get("format") == RunRecord.FORMAT else None

    def last_checkpoint(self, every: int = 1) -> Path | None:
        """The newest complete checkpoint, of those whose step is a multiple of `every`.

        `Trainer._save_checkpoint` writes trainer_state.json last, so one that lacks it, or holds a torn one, was being
        written when the run was killed.
        """
        found = {step: folder for folder, step in self._checkpoints() if step is not None and step % every == 0}
        return found[max(found)] if found else None

    def _checkpoints(self) -> list[tuple[Path, int | None]]:
        """Every checkpoint and its step; None for one that is not complete."""
        found: list[tuple[Path, int | None]] = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            try:
                found.append((folder, read_fields(folder / "trainer_state.json").get("global_step")))
            except ValueError:
                found.append((folder, None))
        return found

    def _remove_unfinished(self) -> None:
        """Remove what was being written when the run ended: it takes room, and nothing goes on from it."""
        torn = [folder for folder, step in self._checkpoints() if step is None]
        for left in [*torn, *self.path.glob(f".*{PARTIAL.removeprefix('.')}*")]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    @contextmanager
    def running(self, record: RunRecord) -> Iterator[None]:
        """Create the folder with an unfinished run.json; on an error remove it, unless it holds work to resume."""
        if not self.main:
            yield
            return
        self.path.mkdir(exist_ok=True)
        try:
            self._remove_unfinished()  # by a kill
            self.write_record(replace(record, status="unfinished"))
            yield
        except BaseException:
            self._remove_unfinished()  # such as on a full disk
            entries = {entry.name for entry in self.path.iterdir()}
            if self._ranked_for_nothing():
                entries.discard(PROFILE)
            if entries <= {RUN, RUN_YAML, LOG, self.checkpoints.name} and not self.last_checkpoint():
                shutil.rmtree(self.path)
            raise

    def _ranked_for_nothing(self) -> bool:
        """Whether the folder's ranking was made without running the model, so that it is made again in no time."""
        path = self.path / PROFILE
        try:
            return path.exists() and not LayerRanking.from_json(read_text(path), str(path)).cost.get("tokens_generated")
        except ValueError:  # somebody else's
            return False

    def write(self, name: str, text: str) -> None:
        """Write a file in one piece."""
        if self.main:
            write_whole(self.path / name, text)

    def write_record(self, record: RunRecord) -> None:
        """Write run.json in one piece."""
        self.write(RUN, record.to_json())

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty folder that is removed when the block ends; the first process' is on the run's disk."""
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=self.path if self.main else None) as scratch:
            yield Path(scratch)

    @contextmanager
    def publishing(self) -> Iterator[Path]:
        """Yield an empty folder whose files are moved into the run's when the block ends."""
        with self.scratch() as scratch:
            yield scratch
            if not self.main:
                return
            make_readable(scratch)
            for file in sorted(scratch.iterdir()):
                os.replace(file, self.path / file.name)
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()  # the trainer makes it even if it saves none


def step_of(checkpoint: Path) -> int:
    """The step that a complete checkpoint was written after."""
    return int(read_fields(checkpoint / "trainer_state.json")["global_step"])


def _is_unfinished(folder: Path) -> bool:
    """Whether the folder holds nothing but what a run was writing when it was killed at its very start."""
    return all(entry.name.startswith(".") and PARTIAL in entry.name for entry in folder.iterdir())
