"""What must not be published: paths of this machine, and secrets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from huggingface_hub import get_token

from peft_onelayer.records.locate import last_part
from peft_onelayer.records.text import one_line, printable

REMOVED = "<removed>"
_SECRET_NAME = re.compile(r"((^|hub_|auth_|access_)token|api_key|secret|password)$", re.IGNORECASE)
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=://)[^/\s@]+(?=@)")  # a Hub token; user:password in a URL
_ROOT = r"(?:file://)?(?:~/|/(?=[^/\s]+/)|\.\.?/|[A-Za-z]:\\)"
_FILE = r"\S+/\S+\.(?:py|jsonl|jsonl\.gz|json|md|txt|safetensors)(?::\w+)?"  # data/mine.jsonl, tasks/mine.py:my_reward
_IS_PATH = re.compile(rf"{_ROOT}|(?!\w+://){_FILE}\Z")
_PATH = re.compile(rf"(?:^|(?<=[\s'\"=(,:])){_ROOT}[^\s'\",;()]+")
_OPTION = re.compile(r"(?P<name>[\w.-]+=)(?P<value>.*)", re.DOTALL)  # --out=DIR, or hub_token=... after --set
_FOLDERS = ("--out", "--adapter")  # options that name a folder, which may look like a Hub id


def without_private(value: Any, names: Mapping[str, str] = MappingProxyType({})) -> Any:
    """A copy of JSON data in which paths are cut to their last part and secrets are removed.

    Args:
        names: what is to stand for a name that is private and looks like a Hub id, such as the folder "models/qwen".

    Raises:
        ValueError: a command line with an open quotation.

    >>> without_private({"name": "/home/me/qwen", "hub_token": "abc", "command": "onelayer train ~/qwen --seed 1"})
    {'name': 'qwen', 'hub_token': '<removed>', 'command': 'onelayer train qwen --seed 1'}
    """
    if isinstance(value, dict):
        return {
            _text(key, names): REMOVED
            if _SECRET_NAME.search(key) and isinstance(item, str)
            else _command(item, names)
            if key == "command" and isinstance(item, str)
            else without_private(item, names)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_private(item, names) for item in value]
    return _text(value, names) if isinstance(value, str) else value


def _command(command: str, names: Mapping[str, str]) -> str:
    try:
        given_words = shlex.split(command)
    except ValueError as error:
        raise ValueError(
            f"a record's command is no command line ({one_line(error)}): {printable(command, 60)}"
        ) from None
    words: list[str] = []
    for word in given_words:
        option = _OPTION.fullmatch(word)
        name, given = (option["name"], option["value"]) if option else ("", word)
        if _SECRET_NAME.search(name.rstrip("=")):
            given = REMOVED
        elif name.rstrip("=") in _FOLDERS or (words and words[-1] in _FOLDERS):
            given = last_part(given)
        words.append(name + _text(given, names))
    return shlex.join(words)


def _text(text: str, names: Mapping[str, str]) -> str:
    if text in names:
        return names[text]
    if token := get_token():
        text = text.replace(token, REMOVED)
    text = _SECRET.sub(REMOVED, text)
    if _IS_PATH.match(text) and "\n" not in text:
        return last_part(text)
    return _PATH.sub(lambda found: last_part(found[0]), text)
