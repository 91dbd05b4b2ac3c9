"""vLLM as TRL drives it, in the trainer's process or behind HTTP: what it takes, what it holds, and how it is sent.

The calls are those of the vLLM that TRL names (`trl.import_utils.is_vllm_available`); see docs/trainers.md.
"""

from __future__ import annotations

import importlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from peft_onelayer.records.text import one_line

from .policy_weights import Entries, digest, held_as

NamedTensors = Iterable[tuple[str, torch.Tensor]]
Manifest = dict[str, list[Any]]  # what a server is told before it is sent tensors: "names", "dtype_names", "shapes"
CHUNK_BYTES = 1024**3  # of entries announced at a time, as vLLM's DEFAULT_PACKED_BUFFER_SIZE_BYTES
SECONDS = 1800  # as TRL's `weight_sync_timeout`


class Engine(Protocol):
    """What a sync needs of an engine.

    Attributes:
        name: of the engine, in messages.
        takes_tensors, takes_entries: what can be sent.
    """

    name: str
    takes_tensors: bool
    takes_entries: bool

    def names(self) -> list[str]:
        """Of the parameters that the engine holds, also while it sleeps.

        Raises:
            ValueError: it cannot tell, or holds parts of parameters only.
        """

    def digests(self, names: Collection[str]) -> dict[str, list[str]]:
        """SHA-256 of the bytes of the engine's own parameters `names`, perhaps of more; one for each replica.

        Raises:
            ValueError: it cannot tell, or holds parts of parameters only.
        """

    def dtype(self, name: str, of_base: torch.dtype) -> torch.dtype:
        """In which the engine holds the tensor `name` of the checkpoint, of which the base's dtype is given."""

    def send_tensors(self, manifest: Manifest, tensors: NamedTensors) -> None:
        """Have whole tensors loaded by name."""

    def send_entries(self, entries: Iterable[Entries]) -> None:
        """Have entries of tensors replaced."""


def manifest_of(rows: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Manifest:
    """Names, dtypes and shapes as TRL announces them."""
    found: Manifest = {"names": [], "dtype_names": [], "shapes": []}
    for name, dtype, shape in rows:
        found["names"].append(name)
        found["dtype_names"].append(str(dtype).removeprefix("torch."))
        found["shapes"].append(list(shape))
    return found


class InProcess:
    """vLLM in the trainer's process ("colocate").

    Args:
        llm: vLLM's `LLM`, as `VLLMGeneration` keeps it.
    """

    name = "the engine in this process"
    takes_tensors = True

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self._dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        self._patching = _patching()
        self.takes_entries = self._patching is not None

    @property
    def model(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.model_runner.model

    def names(self) -> list[str]:
        return list(self._dtypes)

    def digests(self, names: Collection[str]) -> dict[str, list[str]]:
        return {name: [digest([parameter])] for name, parameter in self.model.named_parameters() if name in names}

    def dtype(self, name: str, of_base: torch.dtype) -> torch.dtype:
        found = held_as(name, self._dtypes)
        return of_base if found is None else self._dtypes[found[0]]

    def send_tensors(self, manifest: Manifest, tensors: NamedTensors) -> None:
        for name, tensor in tensors:
            self.model.load_weights([(name, tensor)])

    def send_entries(self, entries: Iterable[Entries]) -> None:
        assert self._patching is not None
        patch, load = self._patching
        load(self.model, [patch(e.name, e.full_shape, e.values.dtype, e.values, e.indices) for e in entries])


def _patching() -> tuple[Any, Any] | None:
    """vLLM's class and function for entries in the coordinates of a checkpoint; None: this vLLM has none."""
    try:
        module = importlib.import_module("vllm.model_executor.model_loader.checkpoint_weight_patch")
    except ImportError:
        return None
    return module.CheckpointWeightPatch, module.load_checkpoint_weight_patches


class Server:
    """vLLM behind HTTP, started with VLLM_SERVER_DEV_MODE=1 and a weight-transfer engine.

    The backend `nccl` takes whole tensors, `sparse_nccl` entries.

    Args:
        url: of the server.
        send: has whole tensors loaded, by TRL's own client.
        group: gives the communicator that tensors are broadcast by, once it is there.

    Raises:
        ValueError: another backend.
    """

    def __init__(self, url: str, send: Callable[[Manifest, NamedTensors], None], group: Callable[[], Any]) -> None:
        self.url, self._send, self._group = url, send, group
        self.name = f"the vLLM server at {url}"
        config = self._ask("/server_info?config_format=json")["vllm_config"]
        backend = (config["weight_transfer_config"] or {}).get("backend")
        if backend not in ("nccl", "sparse_nccl"):
            raise ValueError(
                f"{self.name} has the weight-transfer backend {backend!r}; start it with "
                """--weight-transfer-config '{"backend": "nccl"}', or "sparse_nccl" to be sent changed entries only."""
            )
        self.takes_tensors, self.takes_entries = backend == "nccl", backend == "sparse_nccl"
        self._dtype = getattr(torch, config["model_config"]["dtype"].removeprefix("torch."))

    def names(self) -> list[str]:
        return list(self.digests(()))

    def digests(self, names: Collection[str]) -> dict[str, list[str]]:
        try:
            checksums = self._ask("/weight_checker", {"action": "checksum"})["checksums"]
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.name} does not tell the digests of its weights (POST /weight_checker: {one_line(error, 150)}); "
                "it needs a vLLM that has this call, with VLLM_SERVER_DEV_MODE=1."
            ) from None
        found: dict[str, list[str]] = {}
        for key, value in checksums.items():  # "dp0:pp0:pcp0:tp0:model.norm.weight"
            *ranks, name = key.split(":")
            if any(rank.startswith("tp") and rank != "tp0" for rank in ranks):
                raise ValueError(
                    f"{self.name} shares each tensor among several GPUs, so that its digests are those of parts; "
                    "leave out sync_trained_layer, or serve without tensor parallelism."
                )
            found.setdefault(name, []).append(value)
        return found

    def dtype(self, name: str, of_base: torch.dtype) -> torch.dtype:
        return self._dtype if of_base.is_floating_point else of_base

    def send_tensors(self, manifest: Manifest, tensors: NamedTensors) -> None:
        self._send(manifest, iter(tensors))

    def send_entries(self, entries: Iterable[Entries]) -> None:
        self._ask("/start_weight_update", {})
        for chunk in _chunks(entries):
            info = manifest_of((e.name, e.values.dtype, e.full_shape) for e in chunk)
            info["num_updates_list"] = [len(e.indices) for e in chunk]
            # As vLLM's own sender does it: the server waits for the broadcasts while it answers. After a failed one
            # nobody waits for the answer, which would never come.
            executor = ThreadPoolExecutor(max_workers=1)
            try:
                answer = executor.submit(self._ask, "/update_weights", {"update_info": info})
                if answer.done():
                    answer.result()
                for e in chunk:
                    self._group().broadcast(e.indices, src=0)
                    self._group().broadcast(e.values, src=0)
                answer.result()
            finally:
                executor.shutdown(wait=False)
        self._ask("/finish_weight_update", {})

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET, or POST with a body. Raises OSError where the server does not answer, or answers with an error."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise OSError(f"{error.code} {error.reason}: {error.read().decode(errors='replace')}") from None


def _chunks(entries: Iterable[Entries]) -> Iterator[list[Entries]]:
    """Groups of at most CHUNK_BYTES, or of one tensor's."""
    chunk: list[Entries] = []
    for entry in entries:
        if chunk and sum(e.nbytes for e in chunk) + entry.nbytes > CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(entry)
    if chunk:
        yield chunk
