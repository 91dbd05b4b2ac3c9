"""GRPO through TRL on the device: what it leaves, and what one step costs."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_models as models
import torch
from datasets import Dataset
from gpu_models import Sizes, base_weights, copied, differing, freezing, masters, synchronize, wrapped
from gpu_rows import Row, Rows
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import packed_prompts, scored_positions, shared_prefix, shared_prompts
from peft_onelayer.rl.recipe import device_settings

PART = "GRPO checks"


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs from completion to completion, so that the advantages are not zero."""
    return [float(sum(ids) % 17) for ids in completion_ids]


CALLS = (shared_prompts, packed_prompts, scored_positions)  # that `onelayer train` makes, whatever trains


class TimedGRPOTrainer(GRPOTrainer):
    """Keeps the seconds of every generation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.generation: list[float] = []
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        synchronize(self.accelerator.device)
        start = time.perf_counter()
        result = super()._generate_single_turn(*args, **kwargs)
        synchronize(self.accelerator.device)
        self.generation.append(time.perf_counter() - start)
        return result


class StepTimes(TrainerCallback):
    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, 0.0
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self.device.type == "cuda":  # the first step warms up
            torch.cuda.reset_peak_memory_stats(self.device)
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter() - self.start)


def trainer(
    model: Any,
    folder: Path,
    prompts: list[str],
    group: int,
    new_tokens: int,
    peft_config: Any = None,
    callbacks: Any = (),
    **options: Any,
) -> TimedGRPOTrainer:
    """GRPO with TRL's defaults (on a GPU bfloat16 autocast; checkpointing), all prompts in every step."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": len(prompts) * group,
        "num_generations": group,
        "max_completion_length": new_tokens,
        "generation_kwargs": {"min_new_tokens": new_tokens},
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-4,
        "max_grad_norm": 0.0,
        **device_settings(),
        **options,
    }
    made = TimedGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=models.tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
    made.remove_callback(PrinterCallback)
    return made


class GRPOChecks:
    def __init__(self, rows: Rows, device: torch.device, shape: dict[str, int]) -> None:
        self.rows, self.device, self.shape, self.layer = rows, device, shape, 2

    def all(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.folder = Path(scratch)
            models.build(self.shape, torch.float32, self.device).save_pretrained(self.folder / "base")
            for beta in (0.0, 0.05):
                case = f"3 steps leave plain freezing's weights, float32 without autocast, beta {beta}"
                self.rows.check(PART, case, 8, 45, partial(self.equal, beta))
            for beta in (0.0, 0.05):
                for way in ("peft_config", "wrapped"):
                    case = f"3 steps move the block and nothing else, bfloat16 base, beta {beta}, {way}"
                    self.rows.check(PART, case, 8, 30, partial(self.moves, beta, way))
            self.rows.check(PART, "a resumed run is the uninterrupted one", 10, 40, self.resumed)

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=dtype)  # the trainer moves it

    def train(self, model: Any, beta: float, steps: int = 3, resume: str | None = None, **options: Any) -> Any:
        out = Path(tempfile.mkdtemp(dir=self.folder))
        # 16 prompts: transformers resumes a run whose epochs are one step long with other random numbers
        options = {"beta": beta, "max_steps": steps, "per_device_train_batch_size": 16, **options}
        made = trainer(model, out, models.prompts(16, 8), 4, 8, **options)
        made.train(resume_from_checkpoint=resume)
        return made

    def equal(self, beta: float) -> Row:
        # With bf16=True accelerate puts autocast around the forward of what the trainer holds. generate() of a PEFT
        # model calls the forward of the base inside it, so it samples without autocast, and a plain model with it.
        config = SingleLayerConfig(layer=self.layer, task_type="CAUSAL_LM")
        ours = self.train(self.load(), beta, peft_config=config, bf16=False)
        plain = self.train(freezing(self.load(), self.layer), beta, bf16=False)
        got = {n: p.detach() for n, p in masters(ours.model).items()}
        expected = {n: p.detach() for n, p in models.trained(plain.model).items()}
        start = dict(self.load().named_parameters())
        still = [name for name, p in got.items() if torch.equal(p.cpu(), start[name])]
        wrong = differing(got, expected)
        largest = max(float((got[name] - expected[name]).abs().max()) for name in got.keys() & expected.keys())
        return {
            "ok": not wrong and not still,
            "differing": len(wrong),
            "tensors": len(got),
            "largest_difference": largest,
            "unmoved": len(still),
            "losses": self.logged(ours, "loss"),
            "losses_of_freezing": self.logged(plain, "loss"),
            "kl": self.logged(ours, "kl"),
            "bf16": ours.args.bf16,
            "device": str(ours.args.device),
        }

    def logged(self, made: Any, field: str) -> list[float]:
        return [round(entry[field], 7) for entry in made.state.log_history if field in entry]

    def moves(self, beta: float, way: str) -> Row:
        base = self.load(torch.bfloat16)
        frozen = base_weights(base)
        config = SingleLayerConfig(layer=self.layer, task_type="CAUSAL_LM")
        start = {n: p.float() for n, p in frozen.items() if n.startswith(f"model.layers.{self.layer}.")}
        options: dict[str, Any] = {"peft_config": config}
        if way == "wrapped":
            base, options = wrapped(base, self.layer), {}
        made = self.train(base, beta, **options)
        got = {n: p.detach().cpu() for n, p in masters(made.model).items()}
        changed = differing({n: p.cpu() for n, p in base_weights(made.model).items()}, frozen)
        still = [name for name, p in got.items() if torch.equal(p, start[name])]
        wide = all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in got.values())
        crossed = [float((p.bfloat16() != start[n].bfloat16()).float().mean()) for n, p in got.items()]
        return {
            "ok": not changed and not still and wide and len(got) == 11,
            "frozen_changed": len(changed),
            "unmoved": len(still),
            "entries_changed_in_bfloat16": statistics.fmean(crossed),
            "kl": self.logged(made, "kl"),
        }

    def resumed(self) -> Row:
        """With the default of a GPU: bfloat16 autocast over a bfloat16 base."""

        def made() -> Any:
            return wrapped(self.load(torch.bfloat16), self.layer)

        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
        whole = self.train(made(), 0.0, 4, **options)
        again = self.train(made(), 0.0, 4, **options)
        resumed = self.train(made(), 0.0, 4, str(Path(whole.args.output_dir) / "checkpoint-2"), **options)
        weights = [{n: p.detach() for n, p in masters(run.model).items()} for run in (whole, again, resumed)]
        repeats = not differing(weights[0], weights[1])
        return {"ok": repeats and not differing(weights[0], weights[2]), "repeats": repeats}


class GRPOCosts:
    """Whole GRPO steps: `sizes.prompts` x `sizes.group` completions of `sizes.new_tokens`."""

    def __init__(self, rows: Rows, device: torch.device, sizes: Sizes, base: Any) -> None:
        self.rows, self.device, self.sizes, self.base = rows, device, sizes, base

    def all(self, beta: float) -> None:
        middle = self.sizes.blocks[1]
        ours = SingleLayerConfig(layer=middle, task_type="CAUSAL_LM")
        rank = {"r": models.RANK, "lora_alpha": 2 * models.RANK, "task_type": "CAUSAL_LM"}
        lora = LoraConfig(target_modules="all-linear", **rank)
        variants: dict[str, tuple[Callable[[], Any], Any, tuple[Callable[[Any], Any], ...]]] = {
            "full, bfloat16 without masters": (lambda: copied(self.base).requires_grad_(True), None, ()),
            f"ours, block {middle}": (lambda: copied(self.base), ours, ()),
            f"ours, block {middle}, with our calls": (lambda: copied(self.base), ours, (shared_prefix, *CALLS)),
            "full, bfloat16 without masters, with our calls": (
                lambda: copied(self.base).requires_grad_(True),
                None,
                CALLS,
            ),
            f"LoRA r={models.RANK}, all linears": (lambda: copied(self.base), lora, ()),
            f"freezing, block {middle}, bfloat16 without masters": (
                lambda: freezing(copied(self.base), middle),
                None,
                (),
            ),
        }
        if not beta:
            variants["full, float32 masters"] = (lambda: copied(self.base).requires_grad_(True).float(), None, ())
        with tempfile.TemporaryDirectory() as scratch:
            self.folder = Path(scratch)
            if beta:
                self.base.save_pretrained(self.folder / "base")  # TRL loads a whole model's reference from a folder
            for index, (name, (make, config, calls)) in enumerate(variants.items()):
                self.rows.check(
                    "GRPO step",
                    name,
                    20,
                    75,
                    partial(self.steps, make, config, calls, beta, index == 0),
                )

    def steps(
        self,
        make: Callable[[], Any],
        peft_config: Any,
        calls: tuple[Callable[[Any], Any], ...],
        beta: float,
        baseline: bool,
    ) -> Row:
        sizes, times, model = self.sizes, StepTimes(self.device), make()
        model.config._name_or_path = str(self.folder / "base")
        options = {"beta": beta, "max_steps": sizes.grpo_steps + 1, "learning_rate": 1e-6}
        made = trainer(
            model,
            self.folder / "out",
            models.prompts(sizes.prompts, sizes.prompt),
            sizes.group,
            sizes.new_tokens,
            peft_config,
            [times],
            **options,
        )
        for call in calls:
            call(made)
        made.train()
        generation = made.generation[1:]
        seconds = statistics.median(times.times[1:])
        cuda = self.device.type == "cuda"
        return {
            "group": f"beta {beta}",
            "baseline": baseline,
            "seconds": seconds,
            "times": [round(t, 3) for t in times.times],
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else None,
            "generation_seconds": statistics.median(generation),
            "generation_share": sum(generation) / sum(times.times[1:]),
            "beyond_generation_seconds": statistics.median(
                t - g for t, g in zip(times.times[1:], generation, strict=True)
            ),
            "losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry],
        }
