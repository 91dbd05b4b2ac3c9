"""The peak of what torch allocates on a CPU, beside what is estimated of the same run."""

import gc
import tempfile

import torch
from transformers import AutoTokenizer

from peft_onelayer import load_task
from peft_onelayer.rl.recipe import make_recipe, of_full_training
from peft_onelayer.rl.training import prompts_needed, train_rows
from peft_onelayer.runs.memory import Batches, estimate_memory, lora

METHODS = {"block": lambda k: [k], "full": lambda k: None, "LoRA": lambda k: lora()}


def measured_peak(run):
    """The most bytes that the CPU's allocator had given out at one time during `run`, by torch's profiler."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def estimated_and_measured(model, method, layer, tokenizer, prompts, completions, **fields):
    """GRPO for two steps on sums: the estimate of its memory, and the peak that was measured."""
    train, task = METHODS[method](layer), load_task("arithmetic")
    given = {"learning_rate": 1e-4, "generation_kwargs": {"min_new_tokens": task.max_completion_tokens}, **fields}
    recipe = make_recipe("grpo", task, given, prompts=prompts, completions=completions)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(tokenizer)
    dtype, own = model.dtype, sum(parameter.nbytes for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        arguments = recipe.config(
            output_dir=folder, seed=0, max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True
        )
        rows = task.rows("train", prompts_needed(recipe.algorithm, arguments), 0)
        peak = measured_peak(lambda: train_rows(model, tokenizer, recipe, arguments, rows, layers=train, task=task))
    if method == "full":
        arguments = of_full_training(arguments, recipe, dtype)
    each, generated = arguments.per_device_train_batch_size, prompts * completions
    batches = Batches(
        rows=each,
        prompt=max(len(tokenizer(row["prompt"])["input_ids"]) for row in rows),
        completion=task.max_completion_tokens,
        passes=arguments.gradient_accumulation_steps,
        generated=generated,
        group=completions,
        kept=generated if arguments.beta else generated - each,
        shared=min(each, completions),
        reference=arguments.beta > 0,
    )
    return estimate_memory(config, METHODS[method](layer), batches, arguments), own + peak
