"""One run of the evidence: what is trained, on which task, at which rate; in a row of JSON values."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig

from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.rl.training import train_layer
from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs.describe import describe_machine
from peft_onelayer.runs.models import load_causal_lm, without_progress_bars
from peft_onelayer.tasks import load_task
from peft_onelayer.tuner import find_decoder_stack

HERE = Path(__file__).parent
FORMAT = "onelayer-evidence-1"
SEARCH_SEED = 1_000_000  # of problems on which no run trains


@dataclass(frozen=True)
class Setting:
    """What all runs of a model and a task share; frozen before the first sweep.

    Attributes:
        model: folder among the models.
        task: file beside this one.
        rates: that are tried for full training and for the middle block, the same for both.
        lora_rates: that are tried for LoRA, as many.
        steps: optimizer steps, of `prompts` x `completions` each.
        problems, samples: of the evaluation on the test split, seed 0, sampled at temperature 1.
        search_problems: of the train split, on which rates are chosen, as many samples each.
    """

    model: str
    task: str
    rates: Sequence[float]
    lora_rates: Sequence[float]
    steps: int = 24
    prompts: int = 4
    completions: int = 8
    problems: int = 256
    samples: int = 4
    search_problems: int = 128

    @property
    def name(self) -> str:
        return f"{self.model}-{self.task}"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        kind: "base", "full", "block", "lora-all", "lora-all-sized", "lora-block" or "norms".
        block: for "block" and "lora-block".
        rate: learning rate; None for the base.
        seed: of training and of its data.
        searched: whether the run is one of a search for a rate, and is evaluated on the search's problems too.
    """

    kind: str
    block: int | None = None
    rate: float | None = None
    seed: int = 0
    searched: bool = False

    def __str__(self) -> str:
        what = self.kind if self.block is None else f"{self.kind} {self.block}"
        return what if self.rate is None else f"{what}, rate {self.rate:g}, seed {self.seed}"


def peft_config(run: Run, model: Any) -> PeftConfig | None:
    """What PEFT is asked to train; None for every parameter. LoRA's alpha is twice its rank."""
    blocks = find_decoder_stack(model).blocks
    linears = [(name, m) for name, m in blocks[0].named_modules() if isinstance(m, torch.nn.Linear)]
    norms = [name for name, m in blocks[0].named_modules() if not list(m.children()) and "norm" in name]
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    to_linears = common | {"target_modules": sorted({name.rpartition(".")[2] for name, _ in linears})}
    match run.kind:
        case "full":
            return None
        case "block":
            assert run.block is not None
            return SingleLayerConfig(layer=run.block, **common)
        case "norms":
            return SingleLayerConfig(layer=f"0-{len(blocks) - 1}", target_modules=norms, **common)
        case "lora-all":
            return LoraConfig(r=16, lora_alpha=32, **to_linears)
        case "lora-all-sized":
            size = sum(parameter.numel() for parameter in blocks[0].parameters())
            rank = round(size / len(blocks) / sum(m.in_features + m.out_features for _, m in linears))
            return LoraConfig(r=rank, lora_alpha=2 * rank, **to_linears)
        case "lora-block":
            return LoraConfig(r=16, lora_alpha=32, layers_to_transform=[run.block], **to_linears)
    raise ValueError(f"no kind of run {run.kind!r}")


def execute(setting: Setting, run: Run, folder: Path) -> dict[str, Any]:
    """Train and evaluate `run`; nothing is left but the row.

    Args:
        folder: of the base model.

    Returns:
        "format", "setting", "run"; "scores" on the test problems in their order, each the mean of its samples, with
        "mean" and "standard_error"; of a run of a search "search_mean"; "parameters" that train, "rewards" by step,
        "tokens_generated", "tokens_trained", "cpu_seconds" and "seconds", "versions".
    """
    start, cpu = time.perf_counter(), time.process_time()
    task = load_task(str(HERE / f"{setting.task}.py"))
    row: dict[str, Any] = {"format": FORMAT, "setting": asdict(setting), "run": asdict(run)}
    with without_progress_bars():
        model: Any
        model, tokenizer = load_causal_lm(str(folder))
        if run.kind != "base":
            recipe = make_recipe(
                "grpo", task, prompts=setting.prompts, completions=setting.completions, learning_rate=run.rate
            )
            what = peft_config(run, model)
            result = train_layer(model, tokenizer, task, what, steps=setting.steps, seed=run.seed, recipe=recipe)
            model = result.model
            row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            row["rewards"] = [round(reward, 4) for reward in result.rewards]
            row |= {"tokens_generated": result.tokens_generated, "tokens_trained": result.tokens_trained}
        sampling = Sampling(samples=setting.samples)
        found = evaluate(model, tokenizer, task, task.rows("test", setting.problems, 0), sampling)
        row |= {"mean": found.mean, "standard_error": found.standard_error, "scores": list(found.scores)}
        if run.searched:
            problems = task.rows("train", setting.search_problems, SEARCH_SEED)
            row["search_mean"] = evaluate(model, tokenizer, task, problems, replace(sampling, seed=1)).mean
    row |= {"cpu_seconds": round(time.process_time() - cpu, 1), "seconds": round(time.perf_counter() - start, 1)}
    return row | {"versions": describe_machine()}
