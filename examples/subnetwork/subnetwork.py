"""The subnetwork that RL changes, trained alone: python examples/subnetwork/subnetwork.py --out results.json

The test of arXiv 2505.11711 on the embedded demo model: train all blocks, take the entries that changed, train these
alone from the same base with the same data and seed, and compare the two results: accuracy, and the share of all
entries of the blocks that are equal within 1e-5 and 1e-4 in the base dtype. Beside it as many entries at random.

The masks come from `make_mask`, the runs are those of `onelayer train`: --layer all, with and without --mask.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_onelayer import make_mask
from peft_onelayer.adapter.checkpoint import Checkpoint
from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.rollouts.evaluation import Evaluation, evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.runs import TrainingSettings, train
from peft_onelayer.runs.models import load_adapter
from peft_onelayer.tasks import load_task

TOLERANCES = (0.0, 1e-5, 1e-4)


def equal_shares(base: Path, run: Path, full: Path) -> list[float]:
    """The share of the blocks' entries that differ by no more than each tolerance, in the base's dtype; a frozen entry
    is the base's."""
    checkpoint, a, b = Checkpoint(base), open_adapter(run), open_adapter(full)
    within, total = [0] * len(TOLERANCES), 0
    for name in b.names:
        base_tensor = checkpoint.read(checkpoint.stored_as[name])
        there = b.tensor(name, base_tensor).double()
        here = (a.tensor(name, base_tensor) if name in a.keys else base_tensor).double()
        total += here.numel()
        within = [
            n + int(((here - there).abs() <= tolerance).sum()) for n, tolerance in zip(within, TOLERANCES, strict=True)
        ]
    return [count / total for count in within]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task("arithmetic")
    rows = task.rows("test", options.problems, options.seed)
    demo = str(files("peft_onelayer") / "demo_model")
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(demo)
        tokenizer.save_pretrained(root / "base")
        model = AutoModelForCausalLM.from_pretrained(demo, dtype=getattr(torch, options.dtype))
        model.save_pretrained(root / "base")

        def score(run: Path | None) -> Evaluation:
            base = AutoModelForCausalLM.from_pretrained(root / "base", dtype="auto")
            policy = base if run is None else load_adapter(base, run)
            return evaluate(policy, tokenizer, task, rows, Sampling(samples=4, seed=options.seed))

        def run(name: str, mask: Path | None) -> Path:
            settings = TrainingSettings(
                model=str(root / "base"),
                task="arithmetic",
                layer="all",
                mask=None if mask is None else str(mask),
                out=root / name,
                steps=options.steps,
                learning_rate=options.learning_rate,
                seed=options.seed,
                eval_problems=0,
                config={"save_strategy": "no"},
            )
            train(settings)
            return root / name

        full = run("full", None)
        masks: dict[str, Path | None] = {"full": None, "subnetwork": root / "subnetwork.safetensors"}
        changed = make_mask(root / "base", full, root / "subnetwork.safetensors")
        share = changed.trained / changed.entries
        masks["random"] = root / "random.safetensors"
        make_mask(root / "base", full, root / "random.safetensors", random=share, seed=options.seed)
        measured = score(None)
        found["base"] = {"accuracy": measured.mean, "error": measured.standard_error}
        for name, mask in masks.items():
            folder_of_run = full if mask is None else run(name, mask)
            measured = score(folder_of_run)
            found[name] = {
                "entries": 1.0 if mask is None else share,
                "accuracy": measured.mean,
                "error": measured.standard_error,
                "equal_to_full": dict(
                    zip(map(str, TOLERANCES), equal_shares(root / "base", folder_of_run, full), strict=True)
                ),
            }
            print(name, json.dumps(found[name]), flush=True)
    about = {"dtype": options.dtype, "masters": "float32", "steps": options.steps, "seed": options.seed}
    about |= {"learning_rate": options.learning_rate, "problems": options.problems, "samples": 4}
    text = json.dumps({"about": about, **found}, indent=2)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
