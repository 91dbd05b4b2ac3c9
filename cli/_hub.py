"""What the commands that may talk to the Hub share: no noise, and an end to waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft_onelayer.seams import check

from ._errors import user_error

WAIT = 3  # times HF_HUB_DOWNLOAD_TIMEOUT, 30 s by default: a commit is answered after the Hub has checked it


@contextmanager
def hub_session() -> Iterator[None]:
    """Requests that give up on a silent server, nothing printed by huggingface_hub, and errors as one line."""
    import warnings

    check(__name__)
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    from peft_onelayer.records.hub_errors import no_vain_retries

    def client():
        made = default_client_factory()
        made.timeout = WAIT * constants.HF_HUB_DOWNLOAD_TIMEOUT  # huggingface_hub's own client waits forever
        return made

    set_client_factory(client)
    try:
        with no_vain_retries(), user_error(ValueError), quiet_hub(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="huggingface_hub")
            yield
    finally:
        set_client_factory(default_client_factory)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the Hub's lines about retries and its progress bars: what fails is said once, by an error."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            enable_progress_bars()
