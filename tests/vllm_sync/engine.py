"""A stand-in for vLLM: an engine with real weights, in the trainer's process (`LLM`) or behind HTTP (`Server`).

It keeps what TRL relies on: weights are loaded by name, strictly; sleep level 2 forgets them; a server is told names,
dtypes and shapes first and then reads bytes; the trainer's side packs as vLLM does. It loads and runs checkpoints with
transformers, so it knows nothing of vLLM's own model classes and the names these expect. The one piece replaced
outright is NCCL: what a trainer broadcasts goes through a queue.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

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

    def __init__(self, path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.random = torch.Generator().manual_seed(0)
        self.asleep: set[str] = set()
        self.arrived: dict[str, torch.Tensor] = {}  # since the last completed sync
        self.syncs: list[dict[str, torch.Tensor]] = []  # what arrived in each of them
        self.generations = 0
        self.fail_at: str | None = None  # the parameter whose loading fails

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
            own[name].copy_(tensor)
            self.arrived[name] = tensor.clone()

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

    def __init__(self, model: str, *, max_model_len: int | None = None, enable_sleep_mode: bool = False, **_) -> None:
        self.engine = Engine(model)
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

    def __init__(self, path: str) -> None:
        self.engine = Engine(path)
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
                config = {"logprobs_mode": "processed_logprobs"}
                return {"vllm_config": {"weight_transfer_config": {"backend": "nccl"}, "model_config": config}}
            case "/get_world_size":
                return {"world_size": 1}
            case "/init_weight_transfer_engine":
                info = body["init_info"]
                assert info["packed"] and info["world_size"] == 2
                self.queue = GROUPS.setdefault(info["master_port"], queue.Queue())
            case "/start_weight_update":
                self.updating = True
            case "/update_weights":
                assert self.updating
                self.receive(**body["update_info"])
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


def modules() -> dict[str, ModuleType]:
    """The part of the package `vllm` that TRL imports, for `sys.modules`."""
    contents = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "RequestOutput": RequestOutput, "__version__": VERSION},
        "vllm.sampling_params": {"StructuredOutputsParams": dict},
        "vllm.utils": {},
        "vllm.utils.network_utils": {"get_ip": lambda: "127.0.0.1"},
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
