"""The one error that is meant for the user: shown as one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft_onelayer.records.text import one_line

LIMIT = 2000  # characters of a message: it may name several long paths


class UserError(Exception):
    """What was given, what was expected and what to do, in one line. Ends the command with exit code 1."""


@contextmanager
def user_error(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds into a `UserError` with the same message: for the checks at a command's door."""
    try:
        yield
    except kinds as error:
        raise UserError(one_line(error, LIMIT)) from error
