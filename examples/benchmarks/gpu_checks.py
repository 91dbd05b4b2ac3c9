"""What has to be exact, checked on the device: the figures of each check are a row of gpu.py."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import gpu_models as models
import torch
from gpu_models import base_weights, copied, differing, freezing, masters, move, wrapped
from gpu_rows import Row, Rows
from peft import PeftModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from peft_onelayer import SingleLayerConfig, export_adapter, merge_into_checkpoint

PART = "checks"
CHECKPOINTING = {"off": None, "non-reentrant": False, "reentrant": True}
ROWS, LENGTH = 4, 96


class Checks:
    """The checks, on a small model (`shape`) and, where they say so, on the model of the measurements."""

    def __init__(self, rows: Rows, device: torch.device, shape: dict[str, int]) -> None:
        self.rows, self.device, self.shape = rows, device, shape
        self.layers = shape["num_hidden_layers"]

    def build(self, dtype: torch.dtype) -> Any:
        return models.build(self.shape, dtype, self.device)

    def tokens(self, seed: int = 0, rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
        return models.tokens(rows, length, self.device, self.shape["vocab_size"], seed)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> torch.Tensor:
        return model.eval()(self.tokens()).logits

    def run(self, case: str, check: Callable[[], Row], most: float = 40) -> None:
        self.rows.check(PART, case, 5, most, check)

    def all(self, large: Any) -> None:
        """`large` is the model of the measurements, in bfloat16."""
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            for kind, reentrant in CHECKPOINTING.items():
                self.run(
                    f"gradients of blocks 0, middle, last, two equal plain freezing's, {name}, checkpointing {kind}",
                    partial(self.of_small, dtype, reentrant),
                )
            self.run(f"three AdamW steps equal plain freezing's, {name}", partial(self.training, dtype))
        self.run(
            "gradients equal plain freezing's, middle block of the measured model, bfloat16",
            lambda: self.gradients(large, False, [self.large_middle(large)]),
        )
        self.run("gradients under autocast to bfloat16 equal plain freezing's, float32", self.autocast)
        self.run("merge and unmerge are bit-equal", self.merging)
        self.run("disable_adapter gives the base's logits", self.disabling)
        self.run("masters stay float32 through .to, .half, .cpu and back", self.casting)
        self.run("save, load, sparse export, device_map, merge into files", self.files)
        self.run("one batch with two adapters generates what each does alone", self.mixed_batch)
        self.run("eight threads share one wrapped model", self.threads)
        if self.device.type == "cuda":
            self.run("blocks below the trained one offloaded to the CPU", self.offloaded)
            self.run("float16 with a GradScaler equals plain freezing", self.scaled)
            self.run("forward on a side stream", self.side_stream)

    def of_small(self, dtype: torch.dtype, reentrant: bool | None) -> Row:
        return self.gradients(self.build(dtype), reentrant)

    @staticmethod
    def large_middle(large: Any) -> int:
        return len(large.model.layers) // 2

    def gradients(self, base: Any, reentrant: bool | None, blocks: list[Any] | None = None, context: Any = None) -> Row:
        """Gradients and losses of the wrapped model and of plain freezing, and whether the latter repeat themselves.

        Where the device's attention kernels do not repeat themselves, the math kernels decide.
        """
        context = context or nullcontext()
        with context:
            row = self._gradients(base, reentrant, blocks)
        if not row["reference_repeats"]:
            with context, sdpa_kernel(SDPBackend.MATH):
                row = {**self._gradients(base, reentrant, blocks), "kernels": "math; the default ones do not repeat"}
        return row

    def _gradients(self, base: Any, reentrant: bool | None, blocks: list[Any] | None) -> Row:
        wrong: list[str] = []
        repeats, count, largest = True, 0, 0.0
        for layer in blocks or [0, self.layers // 2, self.layers - 1, [1, 2]]:
            reference = copied(base).requires_grad_(False).train()
            for index in [layer] if isinstance(layer, int) else layer:
                reference.model.layers[index].requires_grad_(True)
            first = self.backward(reference)
            again = self.backward(reference)
            repeats = repeats and not differing(first, again)
            del reference
            model = wrapped(copied(base), layer)
            if reentrant is not None:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.get_base_model().enable_input_require_grads()
            got = self.backward(model.train(), masters(model))
            expected = {n: g.to(torch.float32) if n != "loss" else g for n, g in first.items()}
            wrong += [f"{layer}:{name}" for name in differing(got, expected)]
            shared = got.keys() & expected.keys()
            largest = max(largest, *(float((got[n] - expected[n]).abs().max()) for n in shared))
            count += len(got) - 1
            if any(not grad.abs().sum() for grad in got.values()):
                wrong.append(f"{layer}: a gradient of zeros")
        return {
            "ok": not wrong and repeats,
            "reference_repeats": repeats,
            "tensors": count,
            "differing": len(wrong),
            "largest_difference": largest,
            "such_as": wrong[:2],
        }

    def backward(self, model: Any, parameters: dict[str, nn.Parameter] | None = None) -> dict[str, torch.Tensor]:
        """Gradients by name, and the loss, of one pass from none."""
        parameters = models.trained(model) if parameters is None else parameters
        model.zero_grad()
        tokens = self.tokens()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        model.zero_grad()
        return {**grads, "loss": loss.detach()}

    def training(self, dtype: torch.dtype) -> Row:
        """Weights after AdamW. The reference rounds float32 masters of its own into the model after every step."""
        base, layer = self.build(dtype), self.layers // 2
        model, reference = wrapped(copied(base), layer).train(), freezing(copied(base), layer).train()
        weights = models.trained(reference)
        own = {name: p.detach().float().clone().requires_grad_() for name, p in weights.items()}
        ours = torch.optim.AdamW(masters(model).values(), lr=1e-3)
        theirs = torch.optim.AdamW(own.values(), lr=1e-3)
        for seed in range(3):
            tokens = self.tokens(seed)
            model(input_ids=tokens, labels=tokens).loss.backward()
            ours.step()
            ours.zero_grad()
            reference(input_ids=tokens, labels=tokens).loss.backward()
            for name, weight in weights.items():
                own[name].grad = weight.grad.float()  # type: ignore[union-attr]
            theirs.step()
            reference.zero_grad()
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(own[name])
        got = {name: p.detach() for name, p in masters(model).items()}
        wrong = differing(got, {name: p.detach() for name, p in own.items()})
        frozen = differing(base_weights(model), base_weights(base))
        return {
            "ok": not wrong and not frozen,
            "differing": len(wrong),
            "frozen_changed": len(frozen),
            "tensors": len(got),
        }

    def autocast(self) -> Row:
        context = torch.autocast(self.device.type, torch.bfloat16)
        return self.gradients(self.build(torch.float32), False, context=context)

    def merging(self) -> Row:
        failures = []
        for dtype in (torch.float32, torch.bfloat16):
            model = wrapped(self.build(dtype), 2)
            before = base_weights(model)
            move(model)
            active = self.logits(model)
            model.merge_adapter()
            merged = self.logits(model)
            model.unmerge_adapter()
            checks = {
                "merged": torch.equal(merged, active),
                "unmerged weights": not differing(base_weights(model), before),
                "unmerged": torch.equal(self.logits(model), active),
                "unloaded": torch.equal(self.logits(copied(model).merge_and_unload(safe_merge=True)), active),
            }
            failures += [f"{name} in {dtype}" for name, good in checks.items() if not good]
        return {"ok": not failures, "failed": failures}

    def disabling(self) -> Row:
        base = self.build(torch.bfloat16)
        expected = self.logits(base)
        model = wrapped(base, "mid-2")
        fresh = torch.equal(self.logits(model), expected)
        move(model)
        with model.disable_adapter():
            off = torch.equal(self.logits(model), expected)
        return {"ok": fresh and off and not torch.equal(self.logits(model), expected), "fresh": fresh, "disabled": off}

    def casting(self) -> Row:
        model = wrapped(self.build(torch.bfloat16), 2)
        move(model)
        start = {name: p.detach().clone() for name, p in masters(model).items()}
        wrong = []
        ways: dict[str, Callable[[], Any]] = {
            "to(bfloat16)": lambda: model.to(torch.bfloat16),
            "half": lambda: model.half(),  # which rounds the base
            "cpu and back": lambda: (model.cpu(), model.to(self.device)),
            "copy": lambda: copied(model),
        }
        for name, way in ways.items():
            way()
            if differing({n: p.detach() for n, p in masters(model).items()}, start):
                wrong.append(name)
        if any(p.device.type != self.device.type for p in model.parameters()):
            wrong.append("device")
        return {"ok": not wrong, "failed": wrong}

    def files(self) -> Row:
        """Everything through a folder; the base is loaded with device_map."""
        failed: list[str] = []
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self.build(torch.bfloat16).save_pretrained(folder / "base")

            def load(path: Path = folder / "base") -> Any:
                return AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=self.device.type)

            model = wrapped(load(), 2)
            move(model, scale=0.02)
            expected, saved = self.logits(model), {n: p.detach() for n, p in masters(model).items()}
            model.save_pretrained(folder / "dense")
            for options in ({}, {"low_cpu_mem_usage": True}):
                again = PeftModel.from_pretrained(load(), folder / "dense", **options)
                if differing({n: p.detach() for n, p in masters(again).items()}, saved):
                    failed.append(f"loaded masters {options}")
                if not torch.equal(self.logits(again), expected):
                    failed.append(f"loaded logits {options}")
            exported = export_adapter(folder / "dense", folder / "sparse", "sparse", base=folder / "base")
            if not torch.equal(self.logits(PeftModel.from_pretrained(load(), folder / "sparse")), expected):
                failed.append("sparse")
            export_adapter(folder / "dense", folder / "peft", "peft", base=folder / "base")
            if not torch.equal(self.logits(PeftModel.from_pretrained(load(), folder / "peft")), expected):
                failed.append("peft export")
            for name in ("dense", "sparse"):
                merge_into_checkpoint(folder / "base", folder / name, folder / f"merged-{name}")
                if not torch.equal(self.logits(load(folder / f"merged-{name}")), expected):
                    failed.append(f"merged {name}")
            return {"ok": not failed, "failed": failed, "sparse_bytes": exported.bytes}

    @torch.no_grad()
    def mixed_batch(self) -> Row:
        names = ["default", "__base__", "b", "b", "default"]
        model = wrapped(self.build(torch.float32), 1)
        model.add_adapter("b", SingleLayerConfig(layer=[1, 3], task_type="CAUSAL_LM"))
        move(model, "default", 1)
        move(model, "b", 2)
        ids = self.tokens(rows=len(names), length=16)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        mask = torch.ones_like(ids)
        together = model.eval().generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)
        equal = 0
        for row, name in enumerate(names):
            own = {"input_ids": ids[row : row + 1], "attention_mask": mask[:1], **options}
            if name == "__base__":
                with model.disable_adapter():
                    alone = model.generate(**own)
            else:
                model.set_adapter(name)
                alone = model.generate(**own)
            equal += torch.equal(alone[0], together[row])
        return {"ok": equal == len(names), "rows_equal": equal, "rows": len(names)}

    def threads(self) -> Row:
        model = wrapped(self.build(torch.bfloat16), 2)
        move(model)
        expected, wrong, errors = self.logits(model), [0], []

        def work() -> None:
            try:
                for _ in range(10):
                    wrong[0] += not torch.equal(self.logits(model), expected)
            except Exception as error:  # of a thread: the row has to say it
                errors.append(f"{type(error).__name__}: {error}"[:200])

        workers = [threading.Thread(target=work, daemon=True) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
        whole = len(masters(model)) == 11 and torch.equal(self.logits(model), expected)
        return {"ok": not wrong[0] and not errors and whole, "wrong": wrong[0], "errors": errors[:2], "whole": whole}

    def offloaded(self) -> Row:
        """accelerate's hooks move the blocks below to the device for each pass; the trained block stays there."""
        with tempfile.TemporaryDirectory() as scratch:
            self.build(torch.bfloat16).save_pretrained(scratch)
            places: dict[str, Any] = {f"model.layers.{i}": "cpu" if i < 2 else 0 for i in range(self.layers)}
            places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 0)
            plain = AutoModelForCausalLM.from_pretrained(scratch, dtype="auto", device_map={"": 0})
            parted = AutoModelForCausalLM.from_pretrained(scratch, dtype="auto", device_map=places)
            both = [wrapped(plain, 3).train(), wrapped(parted, 3).train()]
            wrong = differing(*(self.backward(model, masters(model)) for model in both))
            return {"ok": not wrong, "differing": len(wrong)}

    def scaled(self) -> Row:
        """Mixed precision with float16 and a loss scale, two steps."""
        base, layer, results = self.build(torch.float32), 2, []
        for model in (wrapped(copied(base), layer), freezing(copied(base), layer)):
            parameters = masters(model) if isinstance(model, PeftModel) else models.trained(model)
            optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
            scaler = torch.amp.GradScaler(self.device.type, init_scale=256.0)
            for seed in range(2):
                tokens = self.tokens(seed)
                with torch.autocast(self.device.type, torch.float16):
                    loss = model.train()(input_ids=tokens, labels=tokens).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            results.append({name: p.detach() for name, p in parameters.items()})
        wrong = differing(*results)
        start = {n: p.detach() for n, p in base.named_parameters()}
        moved = sum(not torch.equal(p, start[name]) for name, p in results[0].items())
        return {"ok": not wrong and moved == len(results[0]), "differing": len(wrong), "moved": moved}

    def side_stream(self) -> Row:
        model = wrapped(self.build(torch.bfloat16), 2)
        move(model)
        expected = self.logits(model)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = self.logits(model)
        torch.cuda.current_stream().wait_stream(stream)
        return {"ok": torch.equal(got, expected)}

    def compiled(self) -> None:
        """Last, because the compiler takes long."""
        for backend in ("aot_eager", "inductor") if self.device.type == "cuda" else ("aot_eager",):
            case = f"torch.compile, one graph, forward and backward, {backend}"
            self.rows.check(PART, case, 30, 90, partial(self._compiled, backend))

    def _compiled(self, backend: str) -> Row:
        with fresh_compiler():
            base = models.build({**self.shape, "num_hidden_layers": 3}, torch.bfloat16, self.device)
            model = wrapped(copied(base), 1).train()
            reference = freezing(copied(base), 1).train()
            got = self.compiled_gradients(model, masters(model), backend)
            expected = self.compiled_gradients(reference, models.trained(reference), backend)
            expected = {name: value.float() for name, value in expected.items()}
            wrong = differing(got, expected)
            apart = max(relative(got[name], expected[name]) for name in got)
            eager = self.backward(model, masters(model))
            from_eager = max(relative(got[name], eager[name].float()) for name in got)
            return {
                "ok": apart < 0.02,
                "bit_equal_to_compiled_freezing": not wrong,
                "differing": len(wrong),
                "relative_difference": apart,
                "relative_to_eager": from_eager,
            }

    def compiled_gradients(
        self, model: Any, parameters: dict[str, nn.Parameter], backend: str
    ) -> dict[str, torch.Tensor]:
        run = torch.compile(model, fullgraph=True, backend=backend)
        tokens = self.tokens()
        logits = run(input_ids=tokens, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        found = {name: p.grad.float() for name, p in parameters.items() if p.grad is not None}
        model.zero_grad()
        return {**found, "loss": loss.detach().float()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@contextmanager
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()
