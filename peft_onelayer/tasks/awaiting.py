"""One event loop of the process, for the coroutines of rewards and environments.

It runs in a thread of its own, as TRL's does: what a coroutine opens in it stays good for the next one, and the caller
may be in a loop itself, as a notebook is.
"""

import asyncio
import functools
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Return what the coroutine returns, or raise what it raises."""
    return asyncio.run_coroutine_threadsafe(coroutine, _event_loop(os.getpid())).result()


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="onelayer awaits", daemon=True).start()
    return loop
