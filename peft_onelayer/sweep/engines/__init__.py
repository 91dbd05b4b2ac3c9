"""Where the runs of a sweep are executed, one module per place: this machine, in processes or in this one, a Ray
cluster, a Slurm cluster.

Every module has one function,

    run(specs, *, folder, workers=None, run_row=run_layer, ...) -> Iterator[Row]

that yields the rows of `specs` in the order in which they are done and keeps nothing itself. A run whose process or
machine is lost is tried again, twice at most; a run that raises is not, since it would raise again. Neither keeps the
others from going on: at the end the lost ones are a `RunsFailedError`. A generator that is closed early stops its runs.

An engine gets all runs at once, and may have them share what is the same in all of them: `shared` does.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TextIO

from peft_onelayer.records.privacy import without_secrets
from peft_onelayer.records.text import one_line
from peft_onelayer.sweep.early import ENGINES, check_engine
from peft_onelayer.sweep.run_layer import Row, RunSpec

Answer = dict[str, Any]  # {"row": ...}, or {"error": an exception in one line}

TRIES = 3  # the first and two more


class RunsFailedError(Exception):
    """Some runs gave no row; the message is one line."""

    def __init__(self, failures: Sequence[tuple[RunSpec, str]]) -> None:
        spec, reason = failures[0]
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        super().__init__(
            f"{len(failures)} of the runs failed: {spec}: {reason}{more}; what is done is kept, and the same command "
            "tries the others again"
        )


def load_engine(name: str) -> Callable[..., Iterator[Row]]:
    """Return the function `run` of the engine `name`.

    Raises:
        ValueError: for an unknown name, or one whose library is not installed.

    >>> load_engine("dask")
    Traceback (most recent call last):
    ValueError: engine 'dask' is not known; expected one of local, shared, ray, slurm
    """
    check_engine(name)
    return importlib.import_module(f"{__name__}.{ENGINES[name]}").run


def attempt(run_row: Callable[..., Row], spec: RunSpec, *arguments: Any, log: TextIO | None = None) -> Answer:
    """Run where the engine put it; what it raises is an answer too, with the traceback in the engine's log (default:
    stderr)."""
    try:
        return {"row": run_row(spec, *arguments)}
    except (Exception, SystemExit) as error:  # a reward may call sys.exit
        with suppress(OSError):  # the log's disk is full
            print(without_secrets(traceback.format_exc()), file=log or sys.stderr, flush=True)
        message = one_line(error, limit=2000)
        # the message of a ValueError speaks for itself
        return {"error": message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"}
