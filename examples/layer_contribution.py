"""Layer contribution of a few blocks, for one algorithm: python examples/layer_contribution.py --algorithm dr_grpo

Trains block k alone for each k asked for, and once every parameter, from the same base with the same seed, and prints
C(k) = (S_k - S_base) / (S_full - S_base) of arXiv 2607.01232, S the sampled accuracy on held-out problems. grpo and
dr_grpo train the embedded demo model on arithmetic, gigpo the small agent of examples/textworld on its games.

One seed, a few blocks and toy models: what it shows is how the figure is made, and that each run trains what it says.
"""

from __future__ import annotations

import argparse
import copy
import json
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_onelayer import layer_contribution
from peft_onelayer.rl.algorithms import load_algorithm
from peft_onelayer.rl.recipe import Recipe, demo_recipe
from peft_onelayer.rl.training import train_layer
from peft_onelayer.rollouts.evaluation import Evaluation, evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import load_task

AGENT = Path(__file__).parent / "textworld" / "model"
# A learning rate that suits one block is ten times too high for all of them (measured on the demo model).
RATES = {"one": 3e-3, "all": 3e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=("grpo", "dr_grpo", "gigpo"), default="grpo")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 5, 11])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)

    agent = options.algorithm == "gigpo"
    path = str(AGENT if agent else files("peft_onelayer") / "demo_model")
    base, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    task = load_task("textworld:tiny" if agent else "arithmetic")
    algorithm = load_algorithm(options.algorithm)
    demo = demo_recipe(task, options.steps).settings
    batch = {"per_device_train_batch_size": 96} if agent else {}
    rows = task.rows("test", options.problems, options.seed)

    def measure(model) -> Evaluation:
        return evaluate(model, tokenizer, task, rows, Sampling(samples=4, seed=options.seed))

    def train(layer: int | None) -> Evaluation:
        model = copy.deepcopy(base)
        rate = RATES["all" if layer is None else "one"]
        recipe = Recipe(algorithm, {**demo, **algorithm.settings, **batch, "beta": 0.0, "learning_rate": rate})
        result = train_layer(model, tokenizer, task, layer, steps=options.steps, seed=options.seed, recipe=recipe)
        trained = result.model if layer is None else result.model.merge_and_unload()
        before = dict(base.named_parameters())
        changed = {name for name, p in trained.named_parameters() if not torch.equal(p, before[name])}
        expected = {name for name in before if layer is None or name.startswith(f"model.layers.{layer}.")}
        if changed != expected:
            raise SystemExit(
                f"block {layer}: {len(changed ^ expected)} tensors changed, or not, against what was asked"
            )
        return measure(trained)

    print(f"{options.algorithm} on {task.name}: {options.steps} steps, seed {options.seed}, {len(rows)} problems x 4")
    start, full = measure(base), train(None)
    print(f"base      {start.mean:.3f} +- {start.standard_error:.3f}")
    print(f"full      {full.mean:.3f} +- {full.standard_error:.3f}  (learning rate {RATES['all']:g})")
    report = {"algorithm": options.algorithm, "task": task.name, "base": start.mean, "full": full.mean, "layers": {}}
    for layer in options.layers:
        one = train(layer)
        c = layer_contribution(one.scores, start.scores, full.scores)
        shown = f"undefined: {c.reason}" if c.value is None else f"C = {c.value:.2f} +- {c.standard_error:.2f}"
        print(f"block {layer:<3} {one.mean:.3f} +- {one.standard_error:.3f}  {shown}")
        report["layers"][layer] = {"mean": one.mean, "contribution": c.value}
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
