"""log.jsonl: every step of a training run as it happens, one JSON object a line."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
MEAN_OF = 10  # logs that the running mean is taken over
# Names in a line, and in what TRL's trainers log.
LOGGED = {
    "reward": "reward",
    "length": "completions/mean_length",
    "kl": "kl",
    "entropy": "entropy",
    "loss": "loss",
    "learning_rate": "learning_rate",
}


class RunLog:
    """The log of one run. Every line is written out before the next step begins.

    Args:
        folder: of the run; made if it is not there.
        resumed_at: the step of the checkpoint that the run goes on from; later lines are dropped. None for a new run.

    Raises:
        OSError: the disk is full or read-only.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        self.path = folder / LOG
        kept = [line for line in self._lines() if line["step"] <= (resumed_at or 0)]
        self.recent = [line["reward"] for line in kept if "reward" in line][-MEAN_OF:]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.before = time.perf_counter()

    def _lines(self) -> list[dict[str, Any]]:
        """What an interrupted run left; its last line may be torn."""
        lines = []
        if self.path.exists():
            for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    break
        return lines

    def write(self, step: int, logs: Mapping[str, float]) -> None:
        """Add the line of `step` from what the trainer logged.

        Raises:
            OSError: the disk is full.
        """
        now = time.perf_counter()
        line: dict[str, Any] = {"step": step} | {name: logs[key] for name, key in LOGGED.items() if key in logs}
        if "reward" in line:
            self.recent = [*self.recent, line["reward"]][-MEAN_OF:]
            line["running_mean"] = statistics.fmean(self.recent)
        line["seconds"] = round(now - self.before, 3)
        self.before = now
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
