"""An inference server for the trainers that want one: the endpoints of `vllm serve` that TRL calls, and a real model.

It generates with, and scores by, the weights it was last sent, on 127.0.0.1.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import vllm
from torch import nn

from peft_onelayer.rl.policy_weights import digest


class Engine:
    def __init__(self, model: nn.Module, eos_token_id: int, parts: bool = False) -> None:
        self.parts = parts  # whether later pushes may be of a part
        self.model = model.eval()
        self.eos_token_id = eos_token_id
        self.calls: list[str] = []  # the endpoints in order, without generation
        self.sent: list[list[str]] = []  # the names in each push
        self.asked = False  # to score a sequence
        self.lock = threading.Lock()
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self._answer(json.loads(self.rfile.read(length) or "{}"))

            def _answer(self, payload: dict[str, Any]) -> None:
                with engine.lock:
                    body = json.dumps(engine.answer(self.path.partition("?")[0], payload)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/completions":
            return self.score(payload) if "prompt_logprobs" in payload else self.generate(payload)
        if path == "/v1/models":
            return {"data": [{"id": "policy", "max_model_len": 64}]}
        if path == "/server_info":
            # Started with --enable-lora: TRL has to find out that this adapter is none, and to push merged weights.
            lora, parallel = {"max_lora_rank": 8, "max_loras": 8}, {"data_parallel_size": 1}
            model = {"dtype": str(self.model.dtype)}
            config = {"model_config": model, "lora_config": lora, "parallel_config": parallel}
            return {"vllm_config": {**config, "weight_transfer_config": {"backend": "nccl"}}}
        if path == "/weight_checker":
            return {"checksums": {f"dp0:pp0:pcp0:tp0:{n}": digest([p]) for n, p in self.model.named_parameters()}}
        if path == "/get_world_size":
            return {"world_size": 1}
        self.calls.append(path)
        if path == "/update_weights":
            self.receive(payload["update_info"])
        return {}

    def receive(self, manifest: dict[str, list]) -> None:
        """The announced names are the model's own, in the first push all of them, and the tensors are as announced."""
        tensors = vllm.SENT.get(timeout=60)
        own = dict(self.model.named_parameters())
        self.sent.append(manifest["names"])
        assert (self.parts and self.sent[1:]) or sorted(manifest["names"]) == sorted(own), manifest["names"]
        columns = (manifest[key] for key in ("names", "dtype_names", "shapes"))
        for name, dtype, shape, tensor in zip(*columns, tensors, strict=True):
            assert (str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) == (dtype, shape), name
            assert tensor.shape == own[name].shape and tensor.dtype == own[name].dtype
            own[name].data.copy_(tensor)

    @torch.no_grad()
    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """(T, V): row t is the distribution of the token after the first t + 1."""
        return self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)

    def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        tokens, found, generator = list(payload["prompt"]), [], torch.Generator().manual_seed(payload["seed"])
        for _ in range(payload["max_tokens"]):
            log_probs = self.log_probs(tokens)[-1]
            token = int(torch.multinomial(log_probs.exp(), 1, generator=generator))
            tokens.append(token)
            found.append(float(log_probs[token]))
            if token == self.eos_token_id:
                break
        new = tokens[len(payload["prompt"]) :]
        return {"choices": [{"token_ids": new, "logprobs": {"token_logprobs": found}}]}

    def score(self, payload: dict[str, Any]) -> dict[str, Any]:
        self.asked, prompts = True, payload["prompt"]
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        return {"choices": [{"prompt_logprobs": self.prompt_logprobs(p, payload["prompt_logprobs"])} for p in prompts]}

    def prompt_logprobs(self, tokens: list[int], top: int) -> list[dict | None]:
        rows: list[dict | None] = [None]
        for log_probs, actual in zip(self.log_probs(tokens), tokens[1:], strict=False):
            order = log_probs.argsort(descending=True).tolist()
            kept = dict.fromkeys([*order[:top], actual])
            rows.append({str(t): {"logprob": float(log_probs[t]), "rank": order.index(t) + 1} for t in kept})
        return rows
