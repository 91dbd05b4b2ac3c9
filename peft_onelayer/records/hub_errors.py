"""What goes wrong between here and the Hub, as one line that says what to do."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any

from huggingface_hub import constants, get_token, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http

from peft_onelayer.seams import check

from .text import one_line

OF_THE_HUB = (HTTPError, OfflineModeIsEnabled, EntryNotFoundError, HFValidationError, JSONDecodeError)
TRANSFERS = ("huggingface_hub._commit_api", "huggingface_hub.file_download")
NO_ADDRESS = {getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)}
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


class HubError(OSError, ValueError):
    """The Hub could not be reached, or refused; the message says why and what to do."""


class UnknownHostError(OfflineModeIsEnabled):
    """The name of a host has no address: this machine is offline, or the name is wrong. What is in a cache is taken, as
    huggingface_hub, transformers and datasets do where they are told to be offline."""


class _AskedOnce:
    """A factory of clients of `before` that ask once for a host whose name has no address; `unknown` are the errors."""

    def __init__(self, before: Callable[[], Any]) -> None:
        self.before, self.unknown = before, list[UnknownHostError]()

    def __call__(self) -> Any:
        made = self.before()
        send = made.send

        def once(*args: Any, **kwargs: Any) -> Any:
            try:
                return send(*args, **kwargs)
            except HTTPError as error:
                if any(isinstance(cause, socket.gaierror) and cause.errno in NO_ADDRESS for cause in causes(error)):
                    self.unknown.append(UnknownHostError(str(error)))
                    raise self.unknown[-1] from error
                raise

        made.send = once
        return made


@contextmanager
def no_vain_retries() -> Iterator[list[UnknownHostError]]:
    """Have huggingface_hub ask once, not six times in half a minute, for a host whose name has no address. Within
    itself it does nothing, so that a connection is kept.

    Yields:
        The errors that this led to, for who catches what a library made of them.
    """
    check(__name__)
    before = _http._GLOBAL_CLIENT_FACTORY
    if isinstance(before, _AskedOnce):
        yield before.unknown
        return
    asked_once = _AskedOnce(before)
    set_client_factory(asked_once)
    try:
        yield asked_once.unknown
    finally:
        set_client_factory(before)


@contextmanager
def hub_errors(doing: str, repo_id: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a `HubError` "cannot {doing}: {why}".

    Args:
        doing: "push to me/adapter".
        repo_id: the repository asked for, where there is one.
    """
    try:
        yield
    except HubError:
        raise
    except OF_THE_HUB as error:
        raise HubError(f"cannot {doing}: {_reason(error, repo_id)}") from error
    except (RuntimeError, OSError) as error:
        if not _raised_by_the_client(error):
            raise
        raise HubError(f"cannot {doing}: {_reason(error, repo_id)}") from error


def hub_reason(error: BaseException | None, repo_id: str | None) -> str | None:
    """What the Hub has to do with an error that a library raised, in one sentence; None where it has nothing."""
    for cause in causes(error):
        if isinstance(cause, OF_THE_HUB) or _raised_by_the_client(cause):
            return _reason(cause, repo_id)
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _raised_by_the_client(error: BaseException) -> bool:
    """Whether an error came out of huggingface_hub's own code and is not about a disk: hf_xet, through which it
    transfers large files, raises plain RuntimeErrors and OSErrors, which have no frame of their own."""
    if not isinstance(error, (RuntimeError, ConnectionError, TimeoutError, PermissionError, FileNotFoundError)):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or (isinstance(error, OSError) and error.filename is not None):  # of a file on this machine
        return False
    return trace.tb_frame.f_globals.get("__name__", "") in TRANSFERS


def _reason(error: BaseException, repo_id: str | None) -> str:
    endpoint, token = constants.ENDPOINT, get_token()
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _reason(error.__cause__, repo_id)
    if isinstance(error, GatedRepoError):
        hint = "with a token that was given access" if token else LOG_IN
        return f"it is gated; ask for access at {endpoint}/{repo_id} and come back {hint}."
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision; give a branch, a tag or a commit that exists."
    if isinstance(error, RepositoryNotFoundError) and not (token and error.response.status_code == 401):
        seen = "that your token may see" if token else f"that is public; if it is private, {LOG_IN}"
        return f"{endpoint} has no model {repo_id} {seen}."
    if isinstance(error, HfHubHTTPError):
        return _refusal(error.response.status_code, error.server_message, token)
    if isinstance(error, UnknownHostError):
        return (
            f"{endpoint} cannot be reached, its name has no address; this machine is offline, or HF_ENDPOINT is wrong."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids requests to the Hub; unset it."
    if isinstance(error, JSONDecodeError):
        return f"{endpoint} answered with something that is not the Hub's; try again, or check HF_ENDPOINT."
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of an upload in parts
        return _reason(error.__cause__, repo_id)
    if _raised_by_the_client(error):
        said = one_line(_hidden(str(error) or type(error).__name__, token))
        return (
            f"the Hub's store of large files failed (Xet: {said}); try again: what was already transferred is not sent "
            "twice; or set HF_HUB_DISABLE_XET=1 to go without Xet."
        )
    if isinstance(error, HTTPError):  # no answer: a time-out, a refused or a dropped connection
        what = f"{type(error).__name__}: {_hidden(str(error), token)}" if str(error) else type(error).__name__
        return f"{endpoint} cannot be reached ({one_line(what)}); try again."
    return one_line(_hidden(str(error) or type(error).__name__, token))


def _refusal(status: int, message: str | None, token: str | None) -> str:
    said = f" ({one_line(_hidden(message, token))})" if message else ""
    if status == 401:
        return f"the Hub refused the token{said}; {LOG_IN}." if token else f"no token was found; {LOG_IN}."
    if status == 403:
        return f"the token has no right to do that{said}; use a token with write access, or another name."
    if status == 429:
        return f"too many requests{said}; wait a few minutes and try again."
    if status >= 500:
        return f"the Hub failed with {status}{said}; try again: what was already transferred is not sent twice."
    return f"the Hub answered {status}{said}."


def _hidden(text: str, token: str | None) -> str:
    return text.replace(token, "<token>") if token else text
