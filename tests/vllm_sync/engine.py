"""A stand-in for vLLM: an engine with real weights, in the trainer's process (`LLM`) or behind HTTP (`Server`).

It keeps what TRL relies on: weights are loaded by name, strictly; sleep level 2 forgets them; a server is told names,
dtypes and shapes first and then reads bytes; the trainer's side packs as vLLM does. It loads and runs checkpoints with
transformers, so it knows nothing of vLLM's own model classes and the names these expect. The one piece replaced
outright is NCCL: what a trainer broadcasts goes through a queue.
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

VERSION = "0.31.0"  # of vLLM, whose interface this follows: the newest that TRL's is_vllm_available knows
BUFFER_BYTES = 1024**3  # as vLLM's DEFAULT_PACKED_BUFFER_SIZE_BYTES: a small model is sent in one piece, at the end


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    max_tokens: int = 16
    logprobs: int | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    detokenize: bool = True

    def __post_init__(self) -> None:
        if (self.top_p, self.min_p, self.repetition_penalty, self.logprobs or 0) != (1.0, 0.0, 1.0, 0):
            raise NotImplementedError(f"the stand-in samples from the whole distribution only: {self}")


@dataclass
class Logprob:
    logprob: float
    rank: int


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Engine:
    """The weights of a checkpoint, what arrived for them, and generation."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.random = torch.Generator().manual_seed(0)
        self.asleep: set[str] = set()
        self.arrived: dict[str, torch.Tensor] = {}  # since the last completed sync
        self.syncs: list[dict[str, torch.Tensor]] = []  # what arrived in each of them
        self.generations = 0
        self.fail_at: str | None = None  # the parameter whose loading fails
        self.fault: Callable[[], str] | None = None  # what happens to each tensor that arrives: see `_arrive`
        self.late: list[tuple[str, torch.Tensor, torch.Tensor | None]] = []

    @classmethod
    def load(cls, path: str) -> Engine:
        return cls(AutoModelForCausalLM.from_pretrained(path, dtype="auto"), AutoTokenizer.from_pretrained(path))

    @torch.no_grad()
    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            if "weights" in self.asleep:
                raise RuntimeError("weights loaded into a sleeping engine")
            if name == self.fail_at:
                raise RuntimeError(f"out of memory while loading {name}")
            if name not in own or name in self.arrived or own[name].shape != tensor.shape:
                raise ValueError(f"no parameter {name} of shape {tuple(tensor.shape)}, or pushed twice")
            self._arrive(name, tensor, None)
            self.arrived[name] = tensor.clone()

    @torch.no_grad()
    def load_entries(self, name: str, shape: list[int], indices: torch.Tensor, values: torch.Tensor) -> None:
        """Replace entries, with what vLLM's `load_checkpoint_weight_patches` refuses."""
        own = dict(self.model.named_parameters())
        if "weights" in self.asleep or name not in own or list(own[name].shape) != list(shape):
            raise ValueError(f"no parameter {name} of shape {list(shape)}, or it sleeps")
        if indices.dtype != torch.int32 or indices.ndim != 1 or values.shape != indices.shape:
            raise ValueError(f"{name}: expected flat int32 indices and as many values")
        if values.isnan().any() or indices.min() < 0 or indices.max() >= own[name].numel():
            raise ValueError(f"{name}: NaN values, or indices out of range")
        if len(indices.unique()) != len(indices):
            raise ValueError(f"{name}: duplicate indices")
        self._arrive(name, values, indices)

    def _arrive(self, name: str, tensor: torch.Tensor, indices: torch.Tensor | None) -> None:
        """Set the parameter. With a fault "drop" it is not set, and with "late" only behind what arrives next."""
        what, late, self.late = self.fault() if self.fault else "", self.late, []
        if what == "late":
            self.late = [(name, tensor.clone(), indices)]
        for n, t, i in [*([] if what in ("late", "drop") else [(name, tensor, indices)]), *late]:
            target = dict(self.model.named_parameters())[n].data
            if i is None:
                target.copy_(t)
            else:
                target.view(-1)[i.long()] = t.to(target.dtype)
        if what == "repeat":
            self.late = [(name, tensor.clone(), indices)]

    def named_parameters(self):
        """Asked for their digests. What arrived before may be sent again."""
        self.arrived = {}
        return self.model.named_parameters()

    def digests(self) -> dict[str, str]:
        return {
            n: hashlib.sha256(p.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
            for n, p in self.named_parameters()
        }

    def reset_prefix_cache(self) -> None:
        """TRL's last call of a sync."""
        self.syncs.append(self.arrived)
        self.arrived = {}

    @torch.no_grad()
    def sleep(self, level: int) -> None:
        self.asleep = {"weights", "kv_cache"}
        if level == 2:
            for parameter in self.model.parameters():
                parameter.fill_(math.nan)

    def wake_up(self, tags: list[str]) -> None:
        self.asleep -= set(tags)

    @torch.no_grad()
    def generate(self, prompt: list[int] | str, params: SamplingParams) -> RequestOutput:
        if self.asleep:
            raise RuntimeError(f"generation with {', '.join(self.asleep)} asleep")
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        self.generations += 1
        tokens = torch.tensor([prompt] * params.n)  # (n, T)
        logprobs = torch.empty(params.n, 0)
        ranks = torch.empty(params.n, 0, dtype=torch.long)
        for _ in range(params.max_tokens):
            scores = self.model(tokens, attention_mask=torch.ones_like(tokens)).logits[:, -1].float()  # (n, V)
            scores = torch.log_softmax(scores / (params.temperature or 1.0), -1)
            chosen = torch.multinomial(scores.exp(), 1, generator=self.random) if params.temperature else None
            chosen = scores.argmax(-1, keepdim=True) if chosen is None else chosen
            logprob = scores.gather(-1, chosen)
            tokens = torch.cat([tokens, chosen], -1)
            logprobs = torch.cat([logprobs, logprob], -1)
            ranks = torch.cat([ranks, 1 + (scores > logprob).sum(-1, keepdim=True)], -1)
        outputs = []
        for row, row_logprobs, row_ranks in zip(tokens[:, len(prompt) :], logprobs, ranks, strict=True):
            ended = (row == self.tokenizer.eos_token_id).nonzero()
            length = int(ended[0]) + 1 if len(ended) else len(row)
            ids = row[:length].tolist()
            entries = zip(ids, row_logprobs.tolist(), row_ranks.tolist(), strict=False)
            chosen = [{token: Logprob(logprob, rank)} for token, logprob, rank in entries]
            outputs.append(CompletionOutput(ids, None if params.logprobs is None else chosen))
        return RequestOutput(prompt, outputs)


class LLM:
    """vLLM in the trainer's process ("colocate")."""

    def __init__(
        self, model: str | Engine, *, max_model_len: int | None = None, enable_sleep_mode: bool = False, **_
    ) -> None:
        self.engine = model if isinstance(model, Engine) else Engine.load(model)
        self.enable_sleep_mode = enable_sleep_mode
        runner = SimpleNamespace(model=self.engine)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)

    def generate(self, prompts: list, sampling_params: SamplingParams, use_tqdm: bool = True) -> list[RequestOutput]:
        prompts = [p["prompt_token_ids"] if isinstance(p, dict) else p for p in prompts]
        return [self.engine.generate(prompt, sampling_params) for prompt in prompts]

    def reset_prefix_cache(self) -> None:
        self.engine.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        assert self.enable_sleep_mode
        self.engine.sleep(level)

    def wake_up(self, tags: list[str]) -> None:
        assert self.enable_sleep_mode
        self.engine.wake_up(tags)


GROUPS: dict[int, queue.Queue] = {}  # by port


class Communicator:
    """The trainer's end of the weight transfer."""

    def __init__(self, init_info: dict[str, Any]) -> None:
        self.group = SimpleNamespace(store=None, socket=None)  # which TRL lets go of on closing
        self.queue = GROUPS.setdefault(init_info["master_port"], queue.Queue())
        self.fail = False

    def broadcast(self, packed: torch.Tensor, src: int) -> None:
        if self.fail:
            self.queue.put(None)
            raise RuntimeError("the connection was lost")
        self.queue.put(packed.clone())


def packed_nccl_broadcast_producer(iterator, group: Communicator, src: int, post_iter_func) -> None:
    """Sends tensors as bytes, a buffer at a time; until a buffer is full it only holds views of the tensors."""
    views: list[torch.Tensor] = []
    for item in iterator:
        views.append(post_iter_func(item).contiguous().view(torch.uint8).view(-1))
        if sum(map(len, views)) > BUFFER_BYTES:
            group.broadcast(torch.cat(views), src=src)
            views = []
    if views:
        group.broadcast(torch.cat(views), src=src)


class Server:
    """vLLM behind HTTP on 127.0.0.1, as `vllm serve` with a weight-transfer engine."""

    def __init__(self, path: str, backend: str = "nccl", checker: bool = True) -> None:
        self.engine = Engine.load(path)
        self.backend, self.checker = backend, checker  # `/weight_checker` is newer than VERSION
        self.queue: queue.Queue | None = None
        self.updating = False
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        match path.partition("?")[0]:
            case "/health":
                return {}
            case "/v1/models":
                return {"data": [{"id": "stand-in"}]}
            case "/server_info":
                dtype = str(self.engine.model.dtype)
                config = {"logprobs_mode": "processed_logprobs", "dtype": dtype}
                return {"vllm_config": {"weight_transfer_config": {"backend": self.backend}, "model_config": config}}
            case "/weight_checker" if self.checker:
                assert body == {"action": "checksum"}
                return {"checksums": {f"dp0:pp0:pcp0:tp0:{n}": d for n, d in self.engine.digests().items()}}
            case "/get_world_size":
                return {"world_size": 1}
            case "/init_weight_transfer_engine":
                info = body["init_info"]
                assert info["packed"] and info["world_size"] == 2
                self.queue = GROUPS.setdefault(info["master_port"], queue.Queue())
            case "/pause" | "/resume":
                pass
            case "/pause" | "/resume":
                pass
            case "/start_weight_update":
                self.updating = True
            case "/update_weights":
                assert self.updating
                receive = self.receive if self.backend == "nccl" else self.receive_entries
                receive(**body["update_info"])
            case "/finish_weight_update":
                self.updating = False
            case "/reset_prefix_cache":
                self.engine.reset_prefix_cache()
                return {"success": True}
            case "/v1/completions":
                return self.complete(body)
            case other:
                raise LookupError(f"no endpoint {other}")
        return {}

    def receive(self, names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> None:
        """Read the bytes of the announced tensors, then load them."""
        dtypes = [getattr(torch, name) for name in dtype_names]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        received = torch.empty(0, dtype=torch.uint8)
        while len(received) < sum(sizes):
            packed = self.queue.get(timeout=60)
            if packed is None:
                raise RuntimeError("the trainer went away")
            received = torch.cat([received, packed])
        for name, dtype, shape, part in zip(names, dtypes, shapes, received.split(sizes), strict=True):
            self.engine.load_weights([(name, part.clone().view(dtype).view(shape))])

    def receive_entries(
        self, names: list[str], dtype_names: list[str], shapes: list[list[int]], num_updates_list: list[int]
    ) -> None:
        """As vLLM's `SparseNCCLWeightTransferEngine`: for each name positions and values, then all are applied."""
        patches = []
        for name, dtype, shape, count in zip(names, dtype_names, shapes, num_updates_list, strict=True):
            indices, values = (self.queue.get(timeout=60) for _ in range(2))
            assert len(indices) == len(values) == count and values.dtype == getattr(torch, dtype)
            patches.append((name, shape, indices, values))
        for patch in patches:
            self.engine.load_entries(*patch)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        fields = {key: value for key, value in body.items() if key in SamplingParams.__dataclass_fields__}
        choices = []
        for prompt in body["prompt"]:
            request = self.engine.generate(prompt, SamplingParams(**fields))
            for output in request.outputs:
                choice = {"prompt_token_ids": request.prompt_token_ids, "token_ids": output.token_ids, "logprobs": None}
                if output.logprobs is not None:
                    tokens = [f"token_id:{token}" for token in output.token_ids]
                    values = [
                        entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)
                    ]
                    top = [{token: value} for token, value in zip(tokens, values, strict=True)]
                    choice["logprobs"] = {"tokens": tokens, "token_logprobs": values, "top_logprobs": top}
                choices.append(choice)
        return {"choices": choices}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.respond()

            def do_POST(self) -> None:
                self.respond()

            def respond(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                try:
                    status, content = 200, server.answer(self.path, json.loads(body or "{}"))
                except Exception as error:  # becomes the client's error; TRL retries 500
                    status, content = 400, {"error": repr(error)}
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_) -> None:
                pass

        return Handler


class CheckpointWeightPatch(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


def load_checkpoint_weight_patches(model: Engine, patches: list[CheckpointWeightPatch]) -> None:
    for patch in patches:
        assert patch.values.dtype == patch.dtype
        model.load_entries(patch.name, list(patch.shape), patch.indices, patch.values)


def modules() -> dict[str, ModuleType]:
    """The part of the package `vllm` that TRL imports, for `sys.modules`."""
    contents = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "RequestOutput": RequestOutput, "__version__": VERSION},
        "vllm.sampling_params": {"StructuredOutputsParams": dict},
        "vllm.utils": {},
        "vllm.utils.network_utils": {"get_ip": lambda: "127.0.0.1", "get_open_port": lambda: 0},
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.checkpoint_weight_patch": {
            "CheckpointWeightPatch": CheckpointWeightPatch,
            "load_checkpoint_weight_patches": load_checkpoint_weight_patches,
        },
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": Communicator},
        "vllm.distributed.weight_transfer.packed_tensor": {
            "packed_nccl_broadcast_producer": packed_nccl_broadcast_producer
        },
    }
    made = {}
    for name, members in contents.items():
        made[name] = module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(members)
    return made
