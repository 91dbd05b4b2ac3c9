"""Text for messages: one line of an error, one line of a value out of a stranger's file, blocks by their numbers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

DEPTH, LENGTH, BITS = 64, 1_000_000, 128  # of JSON values; see `check_limits`


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """What an error says, in one line without control characters; the name of its type where it says nothing.

    >>> one_line(ValueError("no file\\n  model.safetensors")), one_line(KeyError())
    ('no file model.safetensors', 'KeyError')
    """
    return printable(" ".join(str(error).split()), limit) or type(error).__name__


def meant(given: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: the near ones, or nothing.

    >>> meant("Grop", ["grpo", "dpo"]), meant("x", ["grpo"])
    ('; did you mean grpo?', '')
    """
    names, plain = list(known), given.lower().replace("-", "_").replace(" ", "_")
    near = difflib.get_close_matches(given, names, 3) or difflib.get_close_matches(plain, names, 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


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


def check_limits(value: Any, where: str) -> None:
    """Raise ValueError for parsed JSON that no file of ours holds: nested deeper than `DEPTH`, an integer of more than
    `BITS` bits, or a text or a name of more than `LENGTH` characters. `where` names the file."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            raise ValueError(f"{where} is nested more than {DEPTH} deep.")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and len(item) > LENGTH:
                raise ValueError(f"{where} holds a text of {len(item):,} characters, expected at most {LENGTH:,}.")
            elif isinstance(item, int) and item.bit_length() > BITS:
                raise ValueError(f"{where} holds an integer of {item.bit_length()} bits, expected at most {BITS}.")
        level = below


def name_blocks(layers: Iterable[int]) -> str:
    """Blocks in words.

    >>> name_blocks([5]), name_blocks([8, 3])
    ('block 5', 'blocks 3, 8')
    """
    numbers = sorted(layers)
    return f"block{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"
