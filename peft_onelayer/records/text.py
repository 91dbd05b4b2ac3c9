"""Text for messages: one line of an error, one line of a value out of a stranger's file, blocks by their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """What an error says, in one line without control characters; the name of its type where it says nothing.

    >>> one_line(ValueError("no file\\n  model.safetensors")), one_line(KeyError())
    ('no file model.safetensors', 'KeyError')
    """
    return printable(" ".join(str(error).split()), limit) or type(error).__name__


def well_formed(text: str) -> str:
    """The text as it can be written in UTF-8. Where the locale is ASCII, Python hides a file name's other bytes in
    surrogates; they return to what they are, and what is no text becomes a question mark in a box.

    >>> well_formed("mod\\udcc3\\udca8le"), well_formed("x\\ud800")
    ('modèle', 'x\ufffd')
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # a surrogate out of a stranger's file
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(value: Any, limit: int = 200) -> str:
    """What a message says of a value out of a stranger's file: in one line, no control characters, not long.

    >>> printable("a\\nb"), printable(["a"])
    ('a?b', 'list')
    """
    text = str(value) if isinstance(value, (str, int, float)) or value is None else type(value).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


def name_blocks(layers: Iterable[int]) -> str:
    """Blocks in words.

    >>> name_blocks([5]), name_blocks([8, 3])
    ('block 5', 'blocks 3, 8')
    """
    numbers = sorted(layers)
    return f"block{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"
