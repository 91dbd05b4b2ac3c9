"""The rows that gpu.py writes: each is on disk and on stdout before the next part begins; a part that fails is one."""

from __future__ import annotations

import gc
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "peft-onelayer",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "numpy",
)
Row = dict[str, Any]


class OutOfTimeError(Exception):
    """A part took longer than it may."""


class Rows:
    """Appends rows to a file and keeps the time.

    Args:
        path: JSONL file, written anew.
        seconds: of the whole run.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.start, self.seconds, self.path = time.perf_counter(), seconds, path
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")

    def left(self) -> float:
        """Seconds until the run has to be over."""
        return self.seconds - (time.perf_counter() - self.start)

    def write(self, part: str, case: str, **figures: Any) -> Row:
        """Write one row. `ok` among the figures says whether a check passed."""
        row = {"part": part, "case": case, **figures, "at": round(time.perf_counter() - self.start, 1)}
        self.rows.append(row)
        line = json.dumps(row, default=str)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)
        return row

    def check(self, part: str, case: str, needs: float, most: float, run: Callable[[], Row | None]) -> None:
        """Write what `run` returns, if anything; its error, or that the time was too short, in place of it.

        Args:
            needs: seconds that have to be left.
            most: seconds after which it is stopped.
        """
        if self.left() < needs:
            self.write(part, case, skipped=f"{self.left():.0f} s were left, it needs about {needs:.0f}")
            return
        begun = time.perf_counter()
        with self.failures_as_rows(part, case), time_limit(min(most, self.left())):
            figures = run()
            if figures is not None:
                self.write(part, case, **figures, took=round(time.perf_counter() - begun, 2))
        release_memory()

    @contextmanager
    def failures_as_rows(self, part: str, case: str) -> Iterator[None]:
        """SystemExit of a library included: one broken part must not end a run that cannot be repeated."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            said = f"{type(error).__name__}: {first_line(str(error))}"
            self.write(part, case, ok=False, error=said, where=innermost_frames(error))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError inside after `seconds`, as soon as Python runs again."""

    def stop(signum: int, frame: object) -> None:
        raise OutOfTimeError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(text: str) -> str:
    """With the next one where it ends in a colon, as torch.compile's errors do before the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])[:300]


def innermost_frames(error: BaseException) -> str:
    """file:line of the last three frames."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " < ".join(reversed(frames[-3:]))


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def environment(device: torch.device) -> Row:
    """Machine and versions."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    row: Row = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "versions": {package: installed(package) for package in PACKAGES},
        "vllm": "installed" if find_spec("vllm") else "absent",
        "arguments": sys.argv[1:],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "capability": list(torch.cuda.get_device_capability(device)),
            "float32_matmul": torch.get_float32_matmul_precision(),
        }
    return row


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def markdown(rows: Iterable[Row]) -> str:
    """One table of all rows, times and memory also relative to the row of their group that is the baseline."""
    rows = list(rows)
    baselines = {(row["part"], row.get("group")): row for row in rows if row.get("baseline")}
    title = next((row for row in rows if row["part"] == "environment"), {})
    versions = title.get("versions", {})
    lines = [
        f"Measured on {title.get('device', '?')}, {title.get('date', '')}, Python {title.get('python', '?')}: "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ". Written by `examples/benchmarks/gpu.py`.",
        "",
        "`x` columns are ratios to the row of the same group with 1.00; `ideal` is that ratio of the operations.",
        "",
        "| part | group | case | result | ms | x | ideal | peak GiB | x | more |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    hidden = {"part", "group", "case", "ok", "seconds", "peak_bytes", "operations", "baseline", "at", "took", "times"}
    for row in rows:
        if row["part"] == "environment":
            continue
        base = baselines.get((row["part"], row.get("group")), {})

        def ratio(field: str, row: Row = row, base: Row = base) -> str:
            return f"{row[field] / base[field]:.2f}" if row.get(field) and base.get(field) else ""

        result = {True: "pass", False: "FAIL"}.get(row.get("ok"), "")  # type: ignore[arg-type]
        if "skipped" in row:
            result = "skipped"
        cells = [
            row["part"],
            row.get("group", ""),
            row["case"],
            result,
            f"{1000 * row['seconds']:.1f}" if row.get("seconds") else "",
            ratio("seconds"),
            ratio("operations"),
            f"{row['peak_bytes'] / 2**30:.2f}" if row.get("peak_bytes") else "",
            ratio("peak_bytes"),
            "; ".join(f"{name} {shown(value)}" for name, value in row.items() if name not in hidden),
        ]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}"
