"""What a GRPO step of one block costs beside what else one could train, by CPU time in one process and one thread.

    python examples/benchmarks/peers.py MODEL [--layer 15] [--steps 3] [--only NAME ...] [--profile NAME]

8 prompts with 8 completions of 6 tokens: sums of two numbers after three examples. TRL's defaults, the base in
bfloat16 (by the float32 units on a CPU without instructions for it), the same data, rewards and learning rate for all.
One step warms up; the others are measured, and generation apart from the rest. Ratios are to full-parameter training
and to LoRA on all linear layers, as far as these were run, and beside those to full-parameter training stand the ratios
of the multiplications that are needed.
"""

import argparse
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from bench import row
from datasets import Dataset
from peft import LNTuningConfig, LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import packed_prompts, scored_positions, shared_prefix, shared_prompts, use_float32_units

OURS = (shared_prefix, shared_prompts, packed_prompts, scored_positions)  # what `onelayer train` calls
PROMPTS, GROUP, TOKENS = 8, 8, 6
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(count: int) -> list[dict[str, str]]:
    generator, made = random.Random(0), []
    for _ in range(count):
        *shown, (a, b) = [(generator.randint(10, 99), generator.randint(10, 99)) for _ in range(4)]
        made.append({"prompt": "".join(f"{x} + {y} = {x + y}\n" for x, y in shown) + f"{a} + {b} ="})
    return made


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Differs from completion to completion, so that the advantages are not zero."""
    return [float(sum(ids) % 17) for ids in completion_ids]


class TimedGRPOTrainer(GRPOTrainer):
    generation = 0.0  # CPU seconds, since the step began

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = super()._generate_single_turn(*args, **kwargs)
        self.generation += time.process_time() - start
        return result


class Steps(TrainerCallback):
    """Keeps the CPU seconds of every step, and of its generation."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start, self.trainer.generation = time.process_time(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append((time.process_time() - self.start, self.trainer.generation))


def peers(layer: int) -> dict[str, tuple[Any, dict[str, Any], tuple[Callable, ...]]]:
    """By name: what trains (a PEFT configuration, None for everything, "freeze"), options of GRPO, and our calls."""
    block = SingleLayerConfig(layer=layer, task_type="CAUSAL_LM")
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    norms = [f"layers.{layer}.{name}_layernorm" for name in ("input", "post_attention")]
    module = LoraConfig(r=1, target_modules=rf".*layers\.{layer + 1}\.self_attn\.q_proj", task_type="CAUSAL_LM")
    module.modules_to_save = [f"layers.{layer}"]
    return {
        "ours": (block, {}, OURS),
        "ours, beta .04": (block, {"beta": 0.04}, OURS),
        "full": (None, {}, ()),
        "LoRA, all linears": (LoraConfig(**lora), {}, ()),
        "ours, without our calls": (block, {}, ()),
        "ours, beta .04, without our calls": (block, {"beta": 0.04}, ()),
        "LoRA, the block": (LoraConfig(**lora | {"target_modules": LINEARS}, layers_to_transform=[layer]), {}, ()),
        "freezing": ("freeze", {}, ()),
        "LN_TUNING, the block": (LNTuningConfig(target_modules=norms, task_type="CAUSAL_LM"), {}, ()),
        "modules_to_save": (module, {}, ()),
        "full, with our calls": (None, {}, OURS[1:]),
        "LoRA, all linears, with our calls": (LoraConfig(**lora), {}, OURS[1:]),
    }


def measure(
    peer: tuple, model_name: str, layer: int, steps: int, profiled: bool = False, together: int = PROMPTS * GROUP
) -> tuple[float, float]:
    """The median CPU seconds of a step, in passes of so many rows together, and of its generation."""
    config, options, calls = peer
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
    if config == "freeze":
        model.requires_grad_(False)
        model.get_decoder().layers[layer].requires_grad_(True)
    timed = Steps()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TimedGRPOTrainer(
            model,
            reward_funcs=reward,
            args=GRPOConfig(
                scratch,
                max_steps=1 + steps,
                per_device_train_batch_size=together,
                gradient_accumulation_steps=PROMPTS * GROUP // together,
                num_generations=GROUP,
                max_completion_length=TOKENS,
                generation_kwargs={"min_new_tokens": TOKENS},
                learning_rate=1e-5,
                lr_scheduler_type="constant",
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                **options,
            ),
            train_dataset=Dataset.from_list(rows(PROMPTS * (1 + steps))),
            processing_class=AutoTokenizer.from_pretrained(model_name),
            peft_config=None if config == "freeze" else config,
            callbacks=[timed],
        )
        trainer.remove_callback(PrinterCallback)
        timed.trainer = trainer
        for call in calls:
            call(trainer)
        if not profiled:
            trainer.train()
        else:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                trainer.train()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40))
    whole, generation = zip(*timed.times[1:], strict=True)
    return statistics.median(whole), statistics.median(generation)


def needed(name: str, model_name: str, layer: int) -> float:
    """Multiplications of a step by weights: every prompt generates once for its group and, with our calls, is passed
    once for it. Checkpointing runs a block again where it has a backward pass. The head scores completions alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_name))
    blocks, head = model.get_decoder().layers, model.lm_head.weight.numel()
    above, size = len(blocks) - layer, sum(parameter.numel() for parameter in blocks[0].parameters())
    passes, scores = len(blocks) + 2 * above, 2  # again, and the gradient of the input or, at the block, of its weights
    if name.startswith("full"):
        passes, scores = 4 * len(blocks), 3
    elif name.startswith("LoRA, all linears"):
        passes = 3 * len(blocks)
    if "beta" in name:  # of the reference, from the block up
        passes, scores = passes + above, scores + 1
    prompt = len(AutoTokenizer.from_pretrained(model_name)(rows(1)[0]["prompt"])["input_ids"])
    completions = PROMPTS * GROUP
    generation = len(blocks) * (PROMPTS * prompt + completions * (TOKENS - 1))
    packed = (name.startswith("ours") and "without" not in name) or "with our calls" in name
    trained = passes * ((PROMPTS if packed else completions) * prompt + completions * TOKENS)
    return size * (generation + trained) + head * completions * TOKENS * (1 + scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--profile", nargs="+", default=[])
    given = parser.parse_args()
    torch.set_num_threads(1)
    use_float32_units()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: dict[str, float] = {}
    print("what trains                       step   generation   of full   of LoRA on all linears", flush=True)
    for name, peer in peers(given.layer).items():
        if given.only is not None and name not in given.only:
            continue
        try:
            step, generation = measure(peer, given.model, given.layer, given.steps, name in given.profile)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            print(f"{name:32} fails: {' '.join(str(error).split())[:120]}", flush=True)
            continue
        found[name] = step
        print(f"{name:32} {step:5.1f} s {generation:9.1f} s", flush=True)
    print()
    for name, step in found.items():
        if "full" in found and name != "full":
            least = [needed(way, given.model, given.layer) for way in (name, "full")]
            row(f"GRPO step, {name} / full, CPU time", step / found["full"], least[0] / least[1])
        ratios = [f"{step / found[to]:9.2f}" if to in found else " " * 9 for to in ("full", "LoRA, all linears")]
        print(f"{name:32} {step:5.1f} s              {ratios[0]} {ratios[1]:>12}", flush=True)


if __name__ == "__main__":
    main()
