"""GRPO and GiGPO on one block of the small agent: python examples/textworld/study.py [--seeds 0 1 2] [--out DIR]

For every algorithm and seed it trains one middle block on games of `textworld:tiny` and measures the share of
held-out games won before and after, sampled at temperature 1, on the same games. The two algorithms have the same
games, settings and seeds; GRPO's own reward is the score at the end of an episode, which GiGPO also credits to steps.

Writes runs/<algorithm>-<seed>.json as each run ends (what is found there is not repeated), results.json, curves.png and
README.md.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_onelayer.report.plots import BLUE, ORANGE, new_figure
from peft_onelayer.rl.algorithms import load_algorithm
from peft_onelayer.rl.recipe import Recipe, demo_recipe
from peft_onelayer.rl.training import train_layer
from peft_onelayer.rollouts.evaluation import Evaluation, evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import load_task

HERE = Path(__file__).parent
ALGORITHMS = {"grpo": BLUE, "gigpo": ORANGE}
BLOCK = 6  # of 12
PROMPTS_PER_STEP, GENERATIONS_PER_PROMPT = 8, 8
LEARNING_RATE = 2e-3
HELD_OUT_GAMES, SAMPLES = 256, 2
HELD_OUT_SEED = 1  # the model card has the games of seed 0


def recipe(name: str, steps: int) -> Recipe:
    """Return the settings of a run: the demo's, without a KL term, and the loss settings of the algorithm."""
    algorithm = load_algorithm(name)
    settings = {
        **demo_recipe(load_task("textworld:tiny"), steps).settings,
        **algorithm.settings,
        "beta": 0.0,
        "per_device_train_batch_size": PROMPTS_PER_STEP * GENERATIONS_PER_PROMPT,
        "learning_rate": LEARNING_RATE,
    }
    return Recipe(algorithm, settings)


def load_agent() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the small agent and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(HERE / "model"), AutoTokenizer.from_pretrained(HERE / "model")


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, games: int) -> Evaluation:
    """Return the sampled success on held-out games, always the same ones."""
    task = load_task("textworld:tiny")
    return evaluate(model, tokenizer, task, task.rows("test", games, HELD_OUT_SEED), Sampling(samples=SAMPLES))


def measure_base(games: int) -> dict[str, Any]:
    """Measure the agent as it is; return what is kept of it."""
    evaluation = measure(*load_agent(), games)
    log(f"before: {evaluation.mean:.3f} ± {evaluation.standard_error:.3f}")
    return figures(evaluation)


def run(name: str, seed: int, steps: int, games: int) -> dict[str, Any]:
    """Train and measure; return what is kept of the run."""
    model, tokenizer = load_agent()
    start = time.monotonic()
    result = train_layer(
        model,
        tokenizer,
        load_task("textworld:tiny"),
        BLOCK,
        steps=steps,
        seed=seed,
        recipe=recipe(name, steps),
        on_step=lambda step, reward: log(f"{name} seed {seed} step {step}: reward {reward:.3f}"),
    )
    seconds = time.monotonic() - start
    after = measure(result.model, tokenizer, games)
    log(f"{name} seed {seed}: {after.mean:.3f} ± {after.standard_error:.3f} after {seconds:.0f} s")
    return {
        "algorithm": name,
        "seed": seed,
        "steps": steps,
        "rewards": [round(reward, 6) for reward in result.rewards],
        "after": figures(after),
        "seconds": round(seconds, 1),
    }


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what is in the file; if there is none, make it first."""
    if not path.exists():
        unfinished = path.with_suffix(".partial")
        unfinished.write_text(json.dumps(make()) + "\n", encoding="utf-8")
        unfinished.rename(path)
    return json.loads(path.read_text(encoding="utf-8"))


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation for JSON."""
    return {
        "mean": evaluation.mean,
        "standard_error": evaluation.standard_error,
        "games": evaluation.n,
        "samples": evaluation.samples,
        "scores": evaluation.scores,
    }


def paired(after: list[list[float]], before: list[list[float]]) -> tuple[float, float]:
    """Return the mean of `after - before` and its standard error over games; both hold one list of games per run."""
    pairs = zip(zip(*after, strict=True), zip(*before, strict=True), strict=True)
    differences = [statistics.fmean(a) - statistics.fmean(b) for a, b in pairs]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def plot(runs: list[dict[str, Any]], path: Path, window: int = 5) -> None:
    """Draw the success of each step's rollouts, smoothed; a thin line per seed, a thick one for their mean."""
    figure, axes = new_figure()
    for name, colour in ALGORITHMS.items():
        curves = [smooth(r["rewards"], window) for r in runs if r["algorithm"] == name]
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.35, linewidth=1)
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        axes.plot(
            range(1, len(mean) + 1), mean, color=colour, linewidth=2, label=f"{name}, mean of {len(curves)} seeds"
        )
    axes.set(
        title=f"textworld:tiny, block {BLOCK} trained",
        xlabel="step",
        ylabel=f"train games won (mean of {window} steps)",
        ylim=(0, 1),
    )
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def smooth(values: list[float], window: int) -> list[float]:
    """Return the running mean over the last `window` values."""
    return [statistics.fmean(values[max(0, i - window) : i]) for i in range(1, len(values) + 1)]


README = """\
# Agents: GRPO and GiGPO on TextWorld

`build.py` trains a small agent from scratch by imitation of half-random play and writes it to [model/](model/);
`study.py` trains one of its blocks with reinforcement learning and writes this page. Both run on a CPU in one thread.

```
python examples/textworld/build.py
python examples/textworld/study.py
```

The games are those of the task `textworld:tiny`: three rooms, an object to be put where it belongs, at most 8 commands,
a reward of 1 when the game is won and nothing before. No held-out game has the content of a train game
(`peft_onelayer/tasks/textworld.py`).

## Results

Share of {games} held-out games won, in per cent, {samples} episodes per game sampled at temperature 1. Before training
it is {before}. Standard errors are over games, those of gains and differences paired by game.

| algorithm | seed | after | gain | gain / standard error |
|---|---|---|---|---|
{table}

GiGPO minus GRPO, over the seeds: {difference} points (the standard error does not cover the spread between seeds).

![Success of the rollouts during training](curves.png)

Block {block} of 12 was trained, {steps} steps of {prompts} games x {generations} episodes with new games in every step,
AdamW, learning rate {rate} with a linear decay, no KL term, loss type `grpo`, advantages divided by the group's
standard deviation; GiGPO with gamma .95 and omega 1. Both algorithms ran with the same
settings, which were first guesses and tuned for neither.
A run took {seconds:.0f} s on average on a machine with {cores} CPU cores that had other work to do (Python {python},
torch {torch}, transformers {transformers}, trl {trl}, textworld {textworld}).

A toy of half a million parameters on games of one kind: it shows that the parts work together, and is no evidence about
large models.
"""


def write_page(base: dict[str, Any], runs: list[dict[str, Any]], folder: Path) -> None:
    """Write results.json, curves.png and README.md."""
    scores = {name: [r["after"]["scores"] for r in runs if r["algorithm"] == name] for name in ALGORITHMS}

    def percent(mean: float, error: float) -> str:
        return f"{100 * mean:.1f} ± {100 * error:.1f}"

    table = []
    for r in sorted(runs, key=lambda r: (list(ALGORITHMS).index(r["algorithm"]), r["seed"])):
        r["gain"], r["gain_error"] = paired([r["after"]["scores"]], [base["scores"]])
        after = percent(r["after"]["mean"], r["after"]["standard_error"])
        gained = percent(r["gain"], r["gain_error"])
        table.append(f"| {r['algorithm']} | {r['seed']} | {after} | {gained} | {r['gain'] / r['gain_error']:.1f} |")
    for name in ALGORITHMS:
        mean = statistics.fmean(r["after"]["mean"] for r in runs if r["algorithm"] == name)
        gain, error = paired(scores[name], [base["scores"]] * len(scores[name]))
        table.append(f"| {name} | mean | {100 * mean:.1f} | {percent(gain, error)} | {gain / error:.1f} |")
    difference, difference_error = paired(scores["gigpo"], scores["grpo"])
    results = {
        "block": BLOCK,
        "learning_rate": LEARNING_RATE,
        "before": base,
        "gigpo_minus_grpo": {"difference": difference, "standard_error": difference_error},
        "runs": runs,
    }
    (folder / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    plot(runs, folder / "curves.png")
    page = README.format(
        games=base["games"],
        before=percent(base["mean"], base["standard_error"]),
        samples=SAMPLES,
        table="\n".join(table),
        difference=percent(difference, difference_error),
        block=BLOCK,
        steps=runs[0]["steps"],
        prompts=PROMPTS_PER_STEP,
        generations=GENERATIONS_PER_PROMPT,
        rate=LEARNING_RATE,
        seconds=statistics.fmean(r["seconds"] for r in runs),
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        trl=trl.__version__,
        textworld=load_task("textworld:tiny").data["textworld"],
    )
    (folder / "README.md").write_text(page, encoding="utf-8")


def log(message: str) -> None:
    """Print progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this one)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=40, help="training steps of a run (default: 40)")
    parser.add_argument("--games", type=int, default=HELD_OUT_GAMES, help=f"held-out games (default: {HELD_OUT_GAMES})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are too small for two
    transformers.logging.disable_progress_bar()
    folder = arguments.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    base = kept(folder / "before.json", lambda: measure_base(arguments.games))
    runs = []
    for seed in arguments.seeds:
        for name in ALGORITHMS:
            make = partial(run, name, seed, arguments.steps, arguments.games)
            runs.append(kept(folder / f"{name}-{seed}.json", make))
    write_page(base, runs, arguments.out)
    log(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
