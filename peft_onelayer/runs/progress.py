"""What a run tells of itself while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Update = Callable[[int, str], None]  # completed so far, and a detail in words


class Progress:
    """Says nothing. The command line has a subclass that draws on the terminal."""

    def note(self, message: str) -> None:
        """A line about what is going on."""

    def status(self, message: str) -> AbstractContextManager[object]:
        """Shows `message` while the block runs."""
        return nullcontext()

    def bar(self, description: str, total: int, unit: str = "") -> AbstractContextManager[Update]:
        """Shows how much of `total` is done, counted in `unit`; the block is given what to call."""
        return nullcontext(lambda completed, detail="": None)
