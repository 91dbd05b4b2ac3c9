"""Uploads through Xet, the client's default: hf_xet against a content store that takes what it gets, or fails."""

import itertools

import pytest
from loopback import TOKEN, Fault
from safetensors.torch import load_file, save_file
from worker import Worker

pytestmark = pytest.mark.more
NUMBERS = itertools.count(1)
QUICK = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
QUICK |= {"HF_XET_CLIENT_RETRY_MAX_DURATION": "1s"}


@pytest.fixture(scope="module")
def _worker(_server):
    environment = {name: value for name, value in _server.environment.items() if name != "HF_HUB_DISABLE_XET"}
    worker = Worker(environment | QUICK)
    yield worker
    worker.close()


@pytest.fixture
def push(_worker, hub, quick):
    """Push the adapter with weights that were never sent before."""

    def run():
        count = next(NUMBERS)
        weights = quick / "adapter_model.safetensors"
        save_file({name: tensor + count for name, tensor in load_file(weights).items()}, weights)
        (quick / "eval.json").unlink(missing_ok=True)
        return _worker("push", quick, "me/gsm", environment={"HF_TOKEN": TOKEN})

    return run


def test_it_goes_up_through_xet_and_not_through_lfs(push, hub):
    answer = push()
    assert answer.code == 0, answer.err
    assert (
        hub.seen("GET .*/xet-write-token/main") == 1 and hub.seen("POST /cas/.*xorb") and hub.seen("POST /cas/.*shard")
    )
    assert hub.seen("lfs/objects/batch") == 0 and hub.seen("PUT /upload") == 0
    assert hub.files("me/gsm")["adapter_model.safetensors"] == b"kept by Xet"


@pytest.mark.parametrize(
    ("faults", "cas"),
    [
        ([Fault("/cas/.*xorb", 500, 10**6)], ""),
        ([Fault("/cas/.*xorb", 403, 10**6)], ""),
        ([Fault("/cas/.*shard", 500, 10**6)], ""),
        ([Fault("/cas/.*shard", "drop", 10**6)], ""),
        ([Fault("/cas/.*shard", 200, 10**6)], ""),  # something else than Xet's answer
        ([Fault("xet-write-token", 403, 10**6)], ""),
        ([Fault("xet-write-token", 500, 10**6)], ""),
        ([Fault("xet-write-token", 200, 10**6)], ""),
        ([], "http://127.0.0.1:9"),
        ([], "no address"),
    ],
    ids=str,
)
def test_its_errors_are_one_line_and_the_next_push_completes(push, hub, faults, cas):
    hub.faults, hub.cas = faults, cas
    answer = push()
    assert (answer.code, answer.out, len(answer.err)) == (1, "", 1), answer
    assert answer.err[0].startswith("onelayer: cannot push to me/gsm: ") and len(answer.err[0]) < 700, answer.err
    assert "Xet" in answer.err[0] and "try again" in answer.err[0] and TOKEN not in answer.err[0]
    assert sorted(hub.files("me/gsm")) == [".gitattributes"]
    hub.faults, hub.cas = [], ""
    assert push().code == 0 and "adapter_model.safetensors" in hub.files("me/gsm")
