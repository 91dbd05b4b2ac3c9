"""One run of the evidence: what is trained, on which task, at which rate; in a row of JSON values."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import save_file

from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.rl.training import train_layer
from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs.describe import describe_machine
from peft_onelayer.runs.models import load_causal_lm, to_device, without_progress_bars
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
        kind: "base"; "full"; "block"; LoRA, as "lora-all" (r = 16) and "lora-all-sized" (of a block's size) on all
            linears, and "lora-block" (r = 16); "mask", as many entries of all blocks as a block has, at random;
            "norms", those of all blocks.
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


def random_mask(model: Any, seed: int, file: Path) -> None:
    """Write a mask of as many entries as a block has, drawn without replacement from all entries of all blocks."""
    blocks = find_decoder_stack(model).blocks
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if id(p) in inside}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    generator = np.random.default_rng(seed)
    counts = generator.multivariate_hypergeometric(sizes, sum(p.numel() for p in blocks[0].parameters()))
    masks = {}
    for (name, shape), size, count in zip(shapes.items(), sizes, counts, strict=True):
        mask = torch.zeros(size, dtype=torch.bool)
        mask[torch.from_numpy(generator.choice(size, count, replace=False))] = True
        if count:
            masks[name] = mask.view(shape)
    save_file(masks, file)


def peft_config(run: Run, model: Any, scratch: Path) -> PeftConfig | None:
    """What PEFT is asked to train; None for every parameter. LoRA's alpha is twice its rank.

    Args:
        scratch: folder for the file of a mask, which must be there until the model is wrapped.
    """
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
        case "mask":
            random_mask(model, run.seed, scratch / "mask.safetensors")
            return SingleLayerConfig(layer="all", mask=str(scratch / "mask.safetensors"), **common)
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


def execute(
    setting: Setting,
    run: Run,
    folder: Path,
    also: Callable[[Any, Any], dict[str, Any]] = lambda model, tokenizer: {},
) -> dict[str, Any]:
    """Train and evaluate `run`; nothing is left but the row.

    Args:
        folder: of the base model.
        also: is given the trained model and the tokenizer at the end; its fields go into the row.

    Returns:
        "format", "setting", "run"; "scores" on the test problems in their order, each the mean of its samples, with
        "mean" and "standard_error"; of a run of a search "search_mean"; "parameters" that train, "rewards" by step,
        "tokens_generated", "tokens_trained", "cpu_seconds" and "seconds", "versions".
    """
    start, cpu = time.perf_counter(), time.process_time()
    task = load_task(str(HERE / f"{setting.task}.py"))
    row: dict[str, Any] = {"format": FORMAT, "setting": asdict(setting), "run": asdict(run)}
    with without_progress_bars(), tempfile.TemporaryDirectory() as scratch:
        model: Any
        model, tokenizer = load_causal_lm(str(folder))
        to_device(model)
        if run.kind != "base":
            recipe = make_recipe(
                "grpo", task, prompts=setting.prompts, completions=setting.completions, learning_rate=run.rate
            )
            what = peft_config(run, model, Path(scratch))
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
        row |= also(model, tokenizer)
    row |= {"cpu_seconds": round(time.process_time() - cpu, 1), "seconds": round(time.perf_counter() - start, 1)}
    return row | {"versions": describe_machine()}
