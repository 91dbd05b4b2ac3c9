"""The models of the study: python examples/study/bases.py [--out DIR] [--only NAME ...]

Three pretrained toys of other seeds, depths and widths, and models in which one known block was damaged after strong
training, so that training this block recovers most: bases that violate the depth prior. Every model is written to a
folder of its own with a `base.json` that says how it was made; what is there is kept.

A damaged base starts from a pretrained one that full-parameter GRPO has made strong on one task; the strength of the
damage is found by bisection, so that sampled accuracy on training problems falls to about a tenth.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.records.files import staged_directory
from peft_onelayer.rl.recipe import Recipe, demo_recipe
from peft_onelayer.rl.training import train_layer
from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import load_task

HERE = Path(__file__).parent
DEFAULT_OUT = HERE / "bases"
STRONG_STEPS, STRONG_RATE = 150, 3e-4
DAMAGED_ACCURACY = (0.08, 0.13)  # sampled, on training problems
BISECTIONS = 12


@dataclass(frozen=True)
class Pretrained:
    """A toy trained from scratch by examples/tiny_model/build.py."""

    name: str
    seed: int
    layers: int
    hidden: int


@dataclass(frozen=True)
class Damaged:
    """`origin` made strong on `task`, then damaged in `block`."""

    name: str
    origin: str
    task: str
    block: int
    kind: str


PRETRAINED = (
    Pretrained("wide12", seed=0, layers=12, hidden=64),
    Pretrained("deep8", seed=0, layers=8, hidden=80),
    Pretrained("short6", seed=0, layers=6, hidden=80),
)
DAMAGED = (
    Damaged("noise0", "wide12", "arithmetic", 0, "noise"),
    Damaged("quiet1", "deep8", "arithmetic", 1, "quiet"),
    Damaged("negate2", "deep8", "sort", 2, "negate"),
    Damaged("noise6", "deep8", "arithmetic", 6, "noise"),
    Damaged("negate8", "wide12", "arithmetic", 8, "negate"),
    Damaged("quiet3", "wide12", "arithmetic", 3, "quiet"),
    Damaged("reinit0", "deep8", "sort", 0, "reinit"),
    Damaged("noise11", "wide12", "sort", 11, "noise"),
    Damaged("reinit1", "short6", "arithmetic", 1, "reinit"),
    Damaged("norms4", "short6", "arithmetic", 4, "norms"),
    Damaged("noise5", "short6", "sort", 5, "noise"),
    Damaged("quiet0", "short6", "arithmetic", 0, "quiet"),
)


def pretrain(base: Pretrained, folder: Path) -> dict:
    """Train the toy and write it."""
    spec = importlib.util.spec_from_file_location("tiny_model_build", HERE.parent / "tiny_model" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    # wider bounds than the demo model's, on fewer problems
    vars(build).update(GREEDY_BOUNDS=(0.0, 1.0), SAMPLED_BOUNDS=(0.12, 0.35), MEASURING=512)
    torch.manual_seed(base.seed)
    tokenizer = build.build_tokenizer()
    model = build.build_model(tokenizer, layers=base.layers, hidden=base.hidden)
    steps, figures = build.train(model, tokenizer, base.seed)
    model.save_pretrained(folder)
    build.build_tokenizer().save_pretrained(folder)
    return {"steps": steps, "sampled": {name: sampled.mean for name, (_, sampled) in figures.items()}}


def strengthen(origin: Path, task_name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Full-parameter GRPO on the task."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(origin), AutoTokenizer.from_pretrained(origin)
    task = load_task(task_name)
    recipe = demo_recipe(task, STRONG_STEPS)
    recipe = Recipe(recipe.algorithm, {**recipe.settings, "learning_rate": STRONG_RATE})
    result = train_layer(model, tokenizer, task, None, steps=STRONG_STEPS, seed=1000, recipe=recipe)
    assert isinstance(result.model, PreTrainedModel)
    return result.model, tokenizer


def damaged_weights(kind: str, weights: dict[str, torch.Tensor], strength: float, seed: int) -> dict[str, torch.Tensor]:
    """Return a block's parameters with damage of this strength; 0 changes nothing.

    noise: Gaussian, in units of each matrix's standard deviation, which leaks into its norm. quiet: the same, then
    each row scaled back to its norm. negate: down_proj and o_proj towards their negative (at 2). reinit: down_proj and
    o_proj towards new random matrices of the same standard deviation (at 1). norms: the layer norms' weights scaled.
    """
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, weight in weights.items():
        matrix, output = weight.dim() == 2, name.endswith(("down_proj.weight", "o_proj.weight"))
        drawn = torch.randn(weight.shape, generator=generator)
        new = weight
        if kind == "noise" and matrix:
            new = weight + strength * weight.std() * drawn
        elif kind == "quiet" and matrix:
            new = weight + strength * weight.std() * drawn
            new = new * (weight.norm(dim=1, keepdim=True) / new.norm(dim=1, keepdim=True))
        elif kind == "negate" and output:
            new = weight * (1 - strength)
        elif kind == "reinit" and output:
            new = (1 - strength) * weight + strength * weight.std() * drawn
        elif kind == "norms" and name.endswith("layernorm.weight"):
            new = weight * (1 + strength)
        out[name] = new
    return out


def damage(base: Damaged, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Damage the block in place; the strength is bisected between 0 and one that ruins the model."""
    task = load_task(base.task)
    rows = task.rows("train", 256, 77)
    block = model.model.layers[base.block]
    intact = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}

    def accuracy(strength: float) -> float:
        with torch.no_grad():
            for name, weight in damaged_weights(base.kind, intact, strength, seed=base.block).items():
                block.get_parameter(name).copy_(weight)
        return evaluate(model, tokenizer, task, rows, Sampling(samples=4)).mean

    low, high = 0.0, 1.0
    while (at_high := accuracy(high)) > DAMAGED_ACCURACY[1] and high < 64:
        low, high = high, 2 * high
    strength, reached = high, at_high
    for _ in range(BISECTIONS):
        if DAMAGED_ACCURACY[0] <= reached <= DAMAGED_ACCURACY[1]:
            break
        strength = (low + high) / 2
        reached = accuracy(strength)
        low, high = (strength, high) if reached > DAMAGED_ACCURACY[1] else (low, strength)
    return {"strength": strength, "sampled": {base.task: reached}}


def make(base: Pretrained | Damaged, out: Path) -> Path:
    """Make the base, and what it starts from, unless they are there."""
    out.mkdir(parents=True, exist_ok=True)
    folder = out / base.name
    if folder.exists():
        return folder
    if isinstance(base, Pretrained):
        with staged_directory(folder, lambda _: False) as staged:
            made = pretrain(base, staged)
            (staged / "base.json").write_text(json.dumps({**asdict(base), **made}, indent=2) + "\n")
    else:
        origin = make(next(p for p in PRETRAINED if p.name == base.origin), out)
        strong = out / f"strong-{base.origin}-{base.task}"
        if not strong.exists():
            model, tokenizer = strengthen(origin, base.task)
            with staged_directory(strong, lambda _: False) as staged:
                model.save_pretrained(staged)
                tokenizer.save_pretrained(staged)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(strong), AutoTokenizer.from_pretrained(strong)
        made = damage(base, model, tokenizer)
        with staged_directory(folder, lambda _: False) as staged:
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            (staged / "base.json").write_text(json.dumps({**asdict(base), **made}, indent=2) + "\n")
    print(f"{base.name}: {made}", file=sys.stderr, flush=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--only", nargs="+", help="names of bases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.disable_progress_bar()
    for base in (*PRETRAINED, *DAMAGED):
        if not options.only or base.name in options.only:
            make(base, options.out)


if __name__ == "__main__":
    main()
