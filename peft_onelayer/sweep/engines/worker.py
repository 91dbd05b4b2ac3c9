"""A worker of the local engine: specifications on stdin, answers on stdout, one JSON object a line.

    python -m peft_onelayer.sweep.engines.worker MODULE:FUNCTION

An answer is what `attempt` returns. Every step of a run is a line on stderr.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import queue
import signal
import sys
import threading
from contextlib import suppress

from peft_onelayer.sweep.engines import attempt
from peft_onelayer.sweep.run_layer import RunSpec


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    while True:
        spec = RunSpec.from_dict(json.loads(requests.get()))
        print(json.dumps(attempt(function, spec, functools.partial(_tell, spec))), file=answers, flush=True)


def _tell(spec: RunSpec, step: int, reward: float) -> None:
    with suppress(OSError):  # the log's disk is full
        print(f"{spec}: step {step} of {spec.steps}, reward {reward:.4f}", file=sys.stderr, flush=True)


def _read(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)  # the parent is gone, and nobody would read what the run in the main thread gives


if __name__ == "__main__":
    main()
