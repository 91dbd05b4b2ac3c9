"""What is measured beside the runs: rankings by a probe, and what training did to another task and to plain text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from one_run import HERE, Run, Setting
from planned import DEPTH, SEEDS, best_block, best_rate

from peft_onelayer.probe.probe import probe_layers
from peft_onelayer.probe.race import BudgetError, NothingToLearnError
from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs.describe import describe_machine
from peft_onelayer.runs.models import load_causal_lm, to_device, without_progress_bars
from peft_onelayer.tasks import load_task

PROBE_FORMAT = "onelayer-evidence-probe-1"
BUDGETS, PROBE_SEEDS, LONG = (0.25, 0.1, 0.5), (0, 1, 2, 3, 4), 150  # LONG: steps, the default of `onelayer probe`
PLAIN_TEXT = HERE / "plain_text.txt"  # frozen; paragraphs between empty lines
OTHER = {"sums": "repeated", "repeated": "sums"}  # the task that was not trained
Probe = dict[str, Any]


def probe_runs(setting: Setting) -> list[Probe]:
    """The rankings to make, in their order: "method", "budget" as a share of a run of "steps", and "seed"."""
    found: list[Probe] = [{"method": "prior", "budget": 0.0, "seed": 0, "steps": setting.steps}]
    for steps in (setting.steps, LONG):
        for budget in BUDGETS:
            for seed in PROBE_SEEDS:
                found += [{"method": m, "budget": budget, "seed": seed, "steps": steps} for m in ("auto", "race")]
    return found


def execute_probe(setting: Setting, probe: Probe, folder: Path) -> dict[str, Any]:
    """Rank the blocks for the runs of `setting`, no learning rate given.

    Args:
        folder: of the base model.

    Returns:
        "format", "setting", "probe"; "ranking", a layer profile, or None with "failed", why there is none;
        "cpu_seconds", "seconds", "versions".
    """
    start, cpu = time.perf_counter(), time.process_time()
    row: dict[str, Any] = {"format": PROBE_FORMAT, "setting": asdict(setting), "probe": probe, "ranking": None}
    task = load_task(str(HERE / f"{setting.task}.py"))
    with without_progress_bars():
        model, tokenizer = load_causal_lm(str(folder))
        to_device(model)
        recipe = make_recipe("grpo", task, prompts=setting.prompts, completions=setting.completions)
        options: dict[str, Any] = {"training_steps": probe["steps"], "recipe": recipe, "seed": probe["seed"]}
        options |= {"budget": probe["budget"]} if probe["budget"] else {}
        try:
            ranking = probe_layers(model, tokenizer, task, method=probe["method"], **options)
            row["ranking"] = ranking.to_dict() | {"model": setting.model, "task": setting.task}
        except (BudgetError, NothingToLearnError) as error:
            row["failed"] = str(error)
    row |= {"cpu_seconds": round(time.process_time() - cpu, 1), "seconds": round(time.perf_counter() - start, 1)}
    return row | {"versions": describe_machine()}


def retention_runs(setting: Setting, rows: Sequence[dict[str, Any]]) -> list[Run]:
    """The runs to repeat for what they kept, those that can be named yet: the base, all parameters, the middle block,
    the best one, and LoRA on all linears, at their tuned rates."""
    best, found = best_block(rows, setting), [Run("base")]
    for seed in SEEDS:
        for kind, blocks in (("full", [None]), ("block", [DEPTH[setting.model] // 2, best]), ("lora-all", [None])):
            rate = best_rate(rows, kind)
            if rate is not None:
                found += [Run(kind, k, rate, seed) for k in blocks if kind != "block" or k is not None]
    return list(dict.fromkeys(found))


def retention_of(setting: Setting, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What a model kept: {"retention": {"text", "other"}}.

    "text" has "nats" and "tokens" of each paragraph of `PLAIN_TEXT`; "other", of the task that was not trained, "task",
    "scores" on its test problems, "mean" and "standard_error".
    """
    nats, tokens = [], []
    model.eval()
    for paragraph in PLAIN_TEXT.read_text(encoding="utf-8").split("\n\n"):
        ids = tokenizer(" ".join(paragraph.split()), return_tensors="pt").input_ids.to(model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        nats.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
        tokens.append(ids.shape[1] - 1)
    task = load_task(str(HERE / f"{OTHER[setting.task]}.py"))
    problems = task.rows("test", setting.problems, 0)
    found = evaluate(model, tokenizer, task, problems, Sampling(samples=setting.samples))
    other = {"task": OTHER[setting.task], "mean": found.mean, "standard_error": found.standard_error}
    return {"retention": {"text": {"nats": nats, "tokens": tokens}, "other": other | {"scores": list(found.scores)}}}
