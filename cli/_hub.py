"""What the commands that talk to the Hub share: no noise, and an end to waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ._errors import user_error
from ._model import quiet_hub

WAIT = 3  # times HF_HUB_DOWNLOAD_TIMEOUT, 30 s by default: a commit is answered after the Hub has checked it


@contextmanager
def hub_session() -> Iterator[None]:
    """Requests that give up on a silent server, nothing printed by huggingface_hub, and errors as one line."""
    import warnings

    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client():
        made = default_client_factory()
        made.timeout = WAIT * constants.HF_HUB_DOWNLOAD_TIMEOUT  # huggingface_hub's own client waits forever
        return made

    set_client_factory(client)
    try:
        with user_error(ValueError), quiet_hub(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="huggingface_hub")
            yield
    finally:
        set_client_factory(default_client_factory)
