"""What must not be kept or published: secrets reach no file, and paths and hosts of this machine do not leave it.

`without_secrets` is for everything that is written, `without_private` for everything that is published.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from .locate import last_part
from .text import one_line, printable

REMOVED, HOST = "<removed>", "<host>"
PATH_LIMIT = 4096  # characters: no system has longer paths
HOME = "~"  # in place of the path of a home folder, whose last part is a person's name

# Words of a name (hub_token, X-Api-Key, wandbApiKey) that make its value a secret, and those beside "token" and "key"
# that do not: the tokens of a tokenizer, the keys of a mapping.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "pwd", "credential", "credentials"}
_SECRET_WORDS |= {"apikey", "authorization", "bearer", "jwt", "cookie"}
_KEY_OF = {"api", "access", "private", "secret", "auth", "account", "service", "ssh", "signing", "encryption", "master"}
_KEY_OF |= {"wandb", "openai", "anthropic", "aws", "azure", "hf", "hub", "license", "deploy", "shared"}
_NO_SECRET_TOKEN = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "start", "end", "stop", "special", "prefix"}
_NO_SECRET_TOKEN |= {"suffix", "middle", "image", "audio", "video", "think", "thinking", "next", "first", "last", "new"}
_NO_SECRET_TOKEN |= {"decoder", "answer", "response", "tool", "boi", "eoi", "boa", "eoa", "fake", "pool", "additional"}
_OF_URLS = {"sig", "signature", "key", "code", "auth"}  # of a query: ?sig=...
# What `sparse.base.Sampled` records of a tensor, whose name may hold any word: dtype, shape and digests.
OF_TENSOR = re.compile(r"(\w{7,9}) (scalar|\d{1,15}(?:x\d{1,15}){0,7})((?: [0-9a-f]{16}){0,4})")
_LOOKS_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])(?![0-9a-f]+\Z)[\w+/=.-]{16,}")

_B = r"(?<![A-Za-z0-9])"
_SECRET = re.compile(
    "|".join(
        (
            rf"{_B}(?:hf|api_org)_(?:[A-Za-z0-9]{{20,}}|(?=[A-Za-z]*\d)[A-Za-z0-9]{{8,}})",  # Hugging Face
            rf"{_B}gh[opusr]_[A-Za-z0-9]{{16,}}|{_B}github_pat_\w{{16,}}|{_B}gl(?:pat|ptt|dt|rt)-[\w-]{{16,}}",
            rf"{_B}sk-(?=[\w-]*\d)[\w-]{{16,}}|{_B}(?:sk|rk|pk|whsec)_(?:live|test)_\w{{12,}}",  # OpenAI and others
            rf"{_B}(?:gsk|r8|nvapi|pplx|xai|tgp|fw|npm|dop_v1|ntn|lin_api)[_-](?=\w*\d)[\w-]{{20,}}",
            rf"{_B}(?:AKIA|ASIA|AIDA|AROA)[A-Z0-9]{{12,}}|{_B}AIza[\w-]{{30,}}|{_B}ya29\.[\w.-]{{16,}}",  # AWS, Google
            rf"{_B}xox[a-z]-[\w-]{{10,}}|{_B}xapp-[\w-]{{10,}}|hooks\.slack\.com/services/\S+",
            rf"{_B}pypi-AgE[\w-]{{16,}}|{_B}SG\.[\w-]{{16,}}\.[\w-]{{16,}}",
            rf"{_B}eyJ[\w-]{{6,2000}}\.[\w-]{{6,9000}}\.[\w-]*",  # a JSON Web Token
            r"(?<=://)[^/\s?#\"'<>`]+(?=@)",  # user:password in a URL
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)",
        )
    ),
    re.DOTALL,
)
_HEADER = re.compile(
    r"(?i)(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token|digest)\s+)?)[^\s\"',;]+"
    r"|(\b(?:bearer|basic)\s+)(?=[^\s\"',;]*\d)[\w.~+/=-]{8,}"
)
_QUERY = re.compile(r"(?<=[?&;])([\w.%-]+)=([^&\s\"'`<>#]+)")
# name=value and "name": "value" in a text, such as a field in a dict that is given as JSON
_ASSIGNED = re.compile(
    r"(?<![\w.])([\"']?)([A-Za-z_][\w.-]{0,80})\1(\s*:\s*(?=[\"'])|=)(\"[^\"\n]*\"|'[^'\n]*'|[^\s\"'&,;)}\]]+)"
)
_QUOTED = re.compile(r"\\?[\"']")

_NAME = r"[^/\\\s'\",;:()\[\]{}<>|`]+"
_POSIX = rf"(?:file://[\w.-]*)?(?:~[a-z_]?[\w.-]*/|/(?={_NAME}/)|\.\.?/(?=[\w.]))(?:{_NAME}/+)*(?:{_NAME})?"
_HOME_FOLDER = rf"(?:file://)?(?:/(?:home|Users)/{_NAME}|/root(?![\w/.-])|[A-Za-z]:[\\/]+Users[\\/]+{_NAME})/?"
_WINDOWS = (
    r"(?:file:/*)?(?:[A-Za-z]:[\\/]+|\\\\+(?=[\w.$-]+\\))(?:[^\\/:*?\"'<>|\n,;`]+[\\/]+)*[^\\/:*?\"'<>|\s,;()\[\]{}`]*"
)
_AHEAD = r"(?<![\w/\\.~<)\]}*+-])"  # what stands before a path: nothing, a blank, a quote, a bracket, a sign; no "</s>"
_HOMES = re.compile(rf"(?<![\w/\\.~)\]}}*+-]){_HOME_FOLDER}(?![^\s'\",;:()\[\]{{}}<>|`])")
_PATH = re.compile(rf"{_AHEAD}(?:{_WINDOWS}|{_POSIX})|(?<=<)(?:{_WINDOWS}|{_POSIX})")
# data/mine.jsonl, tasks/mine.py:my_reward
_FILE = r"\S+/\S+\.(?:py|jsonl|jsonl\.gz|csv|parquet|json|md|txt|safetensors)(?::\w+)?"
_IS_PATH = re.compile(rf"(?:file://)?(?:~[\w.-]*/|/(?=[^/\s]+/)|\.\.?/(?=.))|[A-Za-z]:[\\/]|\\\\|(?!\w+://){_FILE}\Z")
_PRIVATE_IP = r"(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01])|169\.254)(?:\.\d{1,3}){2}(?![\w.]*\d)"
_LABELS = r"(?:[A-Za-z0-9-]+\.)+(?:internal|intranet|local|localdomain|lan|corp|cluster|home\.arpa)\b(?![\w(-]|\.\w)"
# "==10.0.0.1" is a version
_HOSTS = re.compile(rf"(?:(?<![\w.=-])|(?<=[^=<>!~]=)){_PRIVATE_IP}(?::\d+)?|(?<![\w.-]){_LABELS}(?::\d+)?")
# http://gpu-07:1
_BARE_HOST = re.compile(r"(https?://)(?!localhost\b)(?=[\w-]*[A-Za-z])[A-Za-z0-9-]+(?::\d+)?(?![\w.@%:-])")
_HOST_FIELD = re.compile(r".*[_-](?:host|base[_-]url)")  # such as vllm_server_host
_LOCAL = re.compile(r"(?:https?://)?(?:localhost|127\.0\.0\.1|0\.0\.0\.0)(?:[:/].*)?")
_OPTION = re.compile(r"(?P<name>[\w.-]+=)(?P<value>.*)", re.DOTALL)  # --out=DIR, or hub_token=... after --set
_FOLDERS = ("--out", "--adapter")  # options that name a folder, which may look like a Hub id


def is_secret_name(name: str, value: str = "") -> bool:
    """Whether a field, an option or a parameter of this name holds a secret.

    >>> [is_secret_name(name) for name in ("hub_token", "--api-key", "DB_PASSWORD", "eos_token", "max_tokens", "keys")]
    [True, True, True, False, False, False]
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if set(words) & _SECRET_WORDS:
        return True
    pairs = set(zip(["", *words], words, strict=False))
    if any(word == "token" and before not in _NO_SECRET_TOKEN for before, word in pairs):
        return not set(words) & {"type", "level", "id", "ids", "count", "length", "limit", "tokenizer", "per"}
    if any(word == "key" and before in _KEY_OF for before, word in pairs):
        return True
    return words[-1:] == ["key"] and bool(_LOOKS_RANDOM.fullmatch(value))


def without_secrets(value: Any) -> Any:
    """A copy of JSON data, or a text, in which secrets are removed: tokens, keys and passwords by their form, by the
    name of the field they are given to, and the Hub token that is in use.

    >>> without_secrets({"hub_token": "abc", "url": "https://me:pw@h.co", "command": "x --set token=abc"})
    {'hub_token': '<removed>', 'url': 'https://<removed>@h.co', 'command': "x --set 'token=<removed>'"}
    """
    return _clean(value, _secrets_of)


def holds_secrets(value: Any) -> bool:
    """Whether `without_secrets` would remove anything.

    >>> holds_secrets({"beta": 0.04}), holds_secrets({"model_init_kwargs": {"token": "abc"}})
    (False, True)
    """
    return str(without_secrets(value)).count(REMOVED) > str(value).count(REMOVED)


def without_private(value: Any, names: Mapping[str, str] = MappingProxyType({})) -> Any:
    """`without_secrets`, and without hosts of a private network; paths are cut to their last part.

    Args:
        names: what is to stand for a name that is private and looks like a Hub id, such as the folder "models/qwen".

    Raises:
        ValueError: a command line with an open quotation.

    >>> without_private({"name": "/home/me/qwen", "command": "onelayer train ~/qwen --seed 1", "at": "http://a.local:1"})
    {'name': 'qwen', 'command': 'onelayer train qwen --seed 1', 'at': 'http://<host>'}
    """
    return _clean(value, lambda text: _private_of(text, names), publishing=True)


def _clean(value: Any, clean: Callable[[str], str], publishing: bool = False) -> Any:
    if isinstance(value, Mapping):
        return {clean(key): _field(key, item, clean, publishing) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item, clean, publishing) for item in value]
    return clean(value) if isinstance(value, str) else value


def _field(name: str, value: Any, clean: Callable[[str], str], publishing: bool) -> Any:
    """The value of a field; the name of a tensor may hold any word."""
    if isinstance(value, str):
        if value and is_secret_name(name, value) and not OF_TENSOR.fullmatch(value):
            return REMOVED
        if publishing and _names_a_host(name, value):
            return HOST
        if name == "command":
            return _command(value, clean, publishing)
    return _clean(value, clean, publishing)


def _names_a_host(name: str, value: str) -> bool:
    """Whether a field or an option says where a server runs, other than on the machine itself."""
    return bool(value and _HOST_FIELD.fullmatch(name) and not _LOCAL.fullmatch(value))


def _command(command: str, clean: Callable[[str], str], publishing: bool) -> str:
    try:
        given_words = shlex.split(command)
    except ValueError as error:
        if not publishing:
            return clean(command)
        raise ValueError(
            f"a record's command is no command line ({one_line(error)}): {printable(command, 60)}"
        ) from None
    words: list[str] = []
    for word in given_words:
        option = _OPTION.fullmatch(word)
        name, given = (option["name"], option["value"]) if option else ("", word)
        before = words[-1] if words and words[-1].startswith("-") and not word.startswith("-") else ""
        if is_secret_name(name.rstrip("="), given) or (not option and before and is_secret_name(before, given)):
            given = REMOVED
        elif publishing and (name.rstrip("=") in _FOLDERS or before in _FOLDERS):
            given = last_part(given)
        elif publishing and _names_a_host(name.rstrip("=") or before, given):
            given = HOST
        words.append(name + clean(given))
    return shlex.join(words) if words != given_words else command


def _secrets_of(text: str) -> str:
    from huggingface_hub import get_token

    try:
        token = get_token()
    except OSError:  # HF_HOME or HF_TOKEN_PATH lies below a file, or may not be read: so no token can be in the text
        token = None
    if token:
        text = text.replace(token, REMOVED)
    text = _SECRET.sub(REMOVED, text)
    text = _HEADER.sub(lambda found: (found[1] or found[2]) + REMOVED, text)
    text = _QUERY.sub(_without_value(lambda name, value: is_secret_name(name, value) or _of_url(name)), text)
    return _ASSIGNED.sub(_assigned, text)


def _of_url(name: str) -> bool:
    return bool({word.lower() for word in _WORD.findall(name)} & _OF_URLS)


def _without_value(secret: Callable[[str, str], bool]) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[1]}={REMOVED}" if secret(found[1], found[2]) else found[0]


def _assigned(found: re.Match[str]) -> str:
    quote, name, equals, value = found.groups()
    bare = _QUOTED.sub("", value)
    if not bare or bare == REMOVED or not is_secret_name(name, bare):
        return found[0]
    mark = value[0] if value[0] in "\"'" else ""
    return f"{quote}{name}{quote}{equals}{mark}{REMOVED}{mark}"


def _private_of(text: str, names: Mapping[str, str]) -> str:
    if text in names:
        return names[text]
    text = _secrets_of(text)
    if len(text) <= PATH_LIMIT and "\n" not in text:
        if _HOMES.fullmatch(text) or re.fullmatch(r"~[a-z_]\w*", text):
            return HOME
        if _IS_PATH.match(text) and not re.search(r"\s[/~]|[`|<>]", text):
            return last_part(text)
    text = _HOMES.sub(HOME, text)
    text = _PATH.sub(lambda found: last_part(found[0]), text)
    return _BARE_HOST.sub(rf"\1{HOST}", _HOSTS.sub(HOST, text))
