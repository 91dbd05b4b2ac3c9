import os
import sys

import pytest

from vllm_sync import engine


@pytest.fixture(scope="package", autouse=True)
def stand_in():
    """TRL decides on import whether there is a vLLM, so it is imported anew here, and as it was afterwards."""
    mine = ("trl", "vllm")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in mine}
    sys.modules.update(engine.modules())
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in mine]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(autouse=True)
def environment():
    """TRL sets RANK, WORLD_SIZE and the like for vLLM in its own process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def serve(monkeypatch):
    """Starts a server for a checkpoint."""
    from trl.generation.vllm_client import VLLMClient

    # NCCL needs CUDA and TRL checks for it. "cuda" without an index is the current device, and is never touched.
    init_communicator = VLLMClient.init_communicator
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: init_communicator(self, "cuda"))
    servers = []

    def start(path: str, **options) -> engine.Server:
        servers.append(engine.Server(path, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
