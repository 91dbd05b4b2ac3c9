"""What a training step and decoding cost for one block, all parameters, LoRA and plain freezing, side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_models as models
import torch
from gpu_models import Sizes, copied, freezing, lora, measured, wrapped
from gpu_rows import Row, Rows
from peft import PeftModel
from torch import nn


class Costs:
    def __init__(self, rows: Rows, device: torch.device, sizes: Sizes, base: Any) -> None:
        self.rows, self.device, self.sizes, self.base = rows, device, sizes, base

    def variants(self) -> dict[str, Callable[[], Any]]:
        """Ways of training, the baseline first. Only one of them trains float32 masters of everything."""
        first, middle, last = self.sizes.blocks
        base = self.base
        return {
            "full, bfloat16 without masters": lambda: copied(base).requires_grad_(True),
            f"ours, block {middle}": lambda: wrapped(copied(base), middle),
            f"ours, block {last}": lambda: wrapped(copied(base), last),
            f"ours, block {first}": lambda: wrapped(copied(base), first),
            f"LoRA r={models.RANK}, all linears": lambda: lora(copied(base)),
            f"LoRA r={models.RANK}, block {middle}": lambda: lora(copied(base), middle),
            f"freezing, block {middle}, bfloat16 without masters": lambda: freezing(copied(base), middle),
            "full, float32 masters": lambda: copied(base).requires_grad_(True).float(),
        }

    def steps(self, checkpointing: bool) -> None:
        group = f"checkpointing {'on' if checkpointing else 'off'}"
        for index, (name, make) in enumerate(self.variants().items()):
            step = partial(self.step, make, name, checkpointing, group, index == 0)
            self.rows.check("training step", name, 12, 40, step)

    def step(
        self,
        make: Callable[[], Any],
        name: str,
        checkpointing: bool,
        group: str,
        baseline: bool,
        rows: int | None = None,
        prompt: int | None = None,
    ) -> Row:
        """Forward, backward and AdamW of a policy-gradient loss on the completion's tokens."""
        sizes, device = self.sizes, self.device
        rows, prompt, completion = rows or sizes.rows, prompt or sizes.prompt, sizes.completion
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if isinstance(model, PeftModel):  # as TRL does
                model.enable_input_require_grads()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=device.type == "cuda")
        ids = models.tokens(rows, prompt + completion, device, sizes.shape["vocab_size"])
        mask = torch.ones_like(ids)
        advantages = torch.linspace(-1, 1, rows, device=device)

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16):  # as TRL does on a GPU
                out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=completion + 1)
                logits, targets = out.logits[:, :-1].transpose(1, 2), ids[:, -completion:]
                logps = -nn.functional.cross_entropy(logits, targets, reduction="none")  # (rows, completion)
                loss = -(advantages[:, None] * logps).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        figures = measured(run, device, sizes.repeats, sizes.warm)
        state = sum(
            value.numel() * value.element_size()
            for entry in optimizer.state.values()
            for value in entry.values()
            if isinstance(value, torch.Tensor)
        )
        operations = self.operations(name, checkpointing, rows, prompt)
        return {
            "group": group,
            "baseline": baseline,
            **figures,
            "operations": operations,
            "tflops": operations / figures["seconds"] / 1e12,
            "trained": sum(p.numel() for p in parameters),
            "optimizer_bytes": state,
            "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        }

    def operations(self, name: str, checkpointing: bool, rows: int, prompt: int) -> float:
        """Multiplications and additions of matrix products that a step by this method needs at least."""
        shape, length = self.sizes.shape, prompt + self.sizes.completion
        layers = self.sizes.layers
        weights = sum(p.numel() for p in self.base.model.layers[0].parameters())
        attention = 2 * 2 * shape["num_attention_heads"] * shape["head_dim"] * length / 2  # a token, causal
        block = 2 * weights + attention
        head = 2 * shape["hidden_size"] * shape["vocab_size"] * (self.sizes.completion / length)
        forward = layers * block + head
        if name.startswith("full"):
            per_token = 3 * forward + checkpointing * layers * block
        else:
            lowest = 0 if "all linears" in name else int(name.split("block ")[1].split(",")[0])
            above = (layers - lowest) * block
            own = 0 if name.startswith("LoRA") else 2 * weights
            per_token = forward + head + above + own + checkpointing * above
        return per_token * rows * length

    def decoding(self) -> None:
        middle = self.sizes.blocks[1]
        makers: dict[str, Callable[[], Any]] = {
            "bare base": lambda: copied(self.base),
            f"ours, block {middle}": lambda: wrapped(copied(self.base), middle),
            f"LoRA r={models.RANK}, all linears": lambda: lora(copied(self.base)),
        }
        for name, make in makers.items():
            self.rows.check("decoding", name, 15, 60, partial(self.decode, name, make))

    def decode(self, name: str, make: Callable[[], Any]) -> None:
        sizes, device = self.sizes, self.device
        model = make().eval()
        for rows in sizes.decoding_rows:
            ids = models.tokens(rows, 64 if sizes.prompt >= 64 else 8, device, sizes.shape["vocab_size"])
            options = {"max_new_tokens": sizes.decoded, "min_new_tokens": sizes.decoded, "do_sample": False}
            mask = torch.ones_like(ids)

            @torch.no_grad()
            def run(ids: torch.Tensor = ids, mask: torch.Tensor = mask, options: Any = options) -> None:
                model.generate(input_ids=ids, attention_mask=mask, **options)

            figures = measured(run, device, sizes.repeats, 1)
            self.rows.write(
                "decoding",
                name,
                group=f"{rows} rows",
                baseline=name == "bare base",
                **figures,
                tokens_per_second=rows * sizes.decoded / figures["seconds"],
            )

    def machine(self) -> None:
        """What the device can do, and the bytes of a weight sync."""
        if self.device.type == "cuda":
            self.rows.check("machine", "bfloat16 product of 8192 x 8192 matrices", 5, 20, self.peak_rate)
        self.rows.check("weight sync", "bytes of one block and of the model", 1, 10, self.synchronization)

    def peak_rate(self) -> Row:
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        figures = measured(lambda: a @ b, self.device, 10, 3)
        return {**figures, "tflops": 2 * 8192**3 / figures["seconds"] / 1e12}

    def synchronization(self) -> Row:
        """Bytes of the weights in the base's dtype."""
        block = sum(p.numel() * p.element_size() for p in self.base.model.layers[self.sizes.blocks[1]].parameters())
        whole = sum(p.numel() * p.element_size() for p in self.base.parameters())
        return {"block_bytes": block, "model_bytes": whole, "share": block / whole, "blocks": self.sizes.layers}

    def growth(self) -> None:
        """With the block's index; at the middle block, with the prompt's length and the rows."""
        layers, middle = self.sizes.layers, self.sizes.blocks[1]
        every = f"LoRA r={models.RANK}, all linears"

        def block(layer: int) -> Any:
            return wrapped(copied(self.base), layer)

        for layer in sorted({round(i * (layers - 1) / 7) for i in range(8)}):
            self.grown(f"ours, block {layer}", partial(block, layer), "block", layer == 0)
        for prompt in (64, 256, 1024) if self.sizes.prompt >= 64 else (4,):
            group = f"prompt of {prompt}"
            self.grown(f"ours, block {middle}", partial(block, middle), group, True, prompt=prompt)
            self.grown(every, lambda: lora(copied(self.base)), group, False, prompt=prompt)
        for rows in (4, 8, 16) if self.sizes.prompt >= 64 else (2,):
            self.grown(f"ours, block {middle}, {rows} rows", partial(block, middle), "rows", rows == 8, rows=rows)

    def grown(self, name: str, make: Callable[[], Any], group: str, baseline: bool, **options: int) -> None:
        self.rows.check("growth", name, 8, 25, partial(self.step, make, name, True, group, baseline, **options))
