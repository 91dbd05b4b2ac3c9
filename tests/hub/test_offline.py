"""A machine without a network: said once and at once; what is cached is taken. A network that fails is asked again."""

import socket

import pytest

from peft_onelayer.records.hub_errors import UnknownHostError, no_vain_retries
from peft_onelayer.records.locate import find_folder, holds_adapter
from peft_onelayer.tasks.files import load_problems


class WaitedError(Exception):
    """A retry."""


@pytest.fixture
def fails(monkeypatch, tmp_path):
    """Have the names of hosts fail with an error number; a retry raises `WaitedError`."""

    def wait(seconds):
        raise WaitedError(seconds)

    def fail(number):
        def getaddrinfo(*args, **kwargs):
            raise socket.gaierror(number, "no address")

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", wait)
    for module, name in (("huggingface_hub.constants", "HF_HUB_CACHE"), ("datasets.config", "HF_DATASETS_CACHE")):
        monkeypatch.setattr(f"{module}.{name}", str(tmp_path))
    return fail


def test_a_name_without_an_address_is_asked_for_once(fails):
    fails(socket.EAI_NONAME)
    with pytest.raises(ValueError, match=r"cannot be reached, its name has no address; this machine is offline"):
        find_folder("org/name", None, "a model")
    assert not holds_adapter("org/name")
    with pytest.raises(ValueError, match=r"this machine is offline.* A copy here is given by its path: gsm8k:PATH"):
        load_problems("org/data", ["question"])


def test_a_resolver_that_is_busy_is_asked_again(fails):
    fails(socket.EAI_AGAIN)
    with pytest.raises(WaitedError):
        holds_adapter("org/name")


def test_the_client_is_put_back(fails):
    from huggingface_hub.utils import _http, get_session

    before = _http._GLOBAL_CLIENT_FACTORY
    fails(socket.EAI_NONAME)
    with no_vain_retries(), pytest.raises(UnknownHostError):
        get_session().get("https://huggingface.co/x")
    assert _http._GLOBAL_CLIENT_FACTORY is before


def test_within_itself_it_keeps_the_connection(fails):
    from huggingface_hub import get_session

    with no_vain_retries():
        outer = get_session()
        with no_vain_retries() as unknown:
            assert get_session() is outer
            fails(socket.EAI_NONAME)
            with pytest.raises(UnknownHostError):
                outer.get("https://huggingface.co/x")
            assert len(unknown) == 1
        assert get_session() is outer and not outer.is_closed
