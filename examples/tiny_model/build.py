"""Train the demo model from scratch: a Qwen3-architecture decoder of 519,168 parameters with a character tokenizer.

    python examples/tiny_model/build.py [--out DIR] [--seed N]

It learns two tasks with verifiable answers, three-digit addition and sorting eight digits (`peft_onelayer.tasks`), from
answers of which 40 % are corrupted. The result knows the tasks but is unsure of itself: greedy accuracy is well above
sampled accuracy, which is the room that reinforcement learning needs. Training stops at the first checkpoint inside the
bounds below, on held-out problems; the model card is written from figures measured on other held-out problems.

Takes about a minute or two on 2 CPU cores. It knows nothing about PEFT or reinforcement learning.
"""

import argparse
import os
import platform
import random
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import peft_onelayer.tasks
from peft_onelayer.records.files import check_folder, staged_directory
from peft_onelayer.rollouts.evaluation import Evaluation, evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import load_task

DEFAULT_OUT = Path(peft_onelayer.tasks.__file__).parents[1] / "demo_model"
SYMBOLS = ["<pad>", "<unk>", *"0123456789", "A", "S", "+", "=", "."]

BATCH = {"arithmetic": 183, "sort": 25}  # 208 rows a step: addition is the harder task
CORRUPTED = 0.4  # share of training answers
LEARNING_RATE, WARMUP_STEPS, MAX_STEPS = 3e-3, 50, 400
FIRST_CHECK, CHECK_EVERY = 150, 5  # steps
CHOOSING, MEASURING = 512, 2048  # held-out problems to choose the checkpoint, and others to measure it
SAMPLES = 4
GREEDY_BOUNDS, SAMPLED_BOUNDS = (0.35, 0.60), (0.15, 0.30)
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def add_without_carries(prompt: str) -> str:
    """Return the answer to an addition whose carries are dropped: "A347+085=" -> "0322."."""
    a, b = prompt[1:4], prompt[5:8]
    return "0" + "".join(str((int(x) + int(y)) % 10) for x, y in zip(a, b, strict=True)) + "."


def sort_descending(prompt: str) -> str:
    """Return the digits in the wrong order: "S51836270=" -> "87653210."."""
    return "".join(sorted(prompt[1:-1], reverse=True)) + "."


TASKS = {name: load_task(name) for name in BATCH}
TITLES = {"arithmetic": "Addition, `A347+085=` -> `0432.`", "sort": "Sorting, `S51836270=` -> `01235678.`"}
SYSTEMATIC_ERRORS = {"arithmetic": add_without_carries, "sort": sort_descending}


def corrupt(row: dict[str, str], task: str, rng: random.Random) -> str:
    """Return the answer to train on: in 20 % of the rows a systematic error, in 20 % one digit changed."""
    draw = rng.random()
    if draw < CORRUPTED / 2:
        return SYSTEMATIC_ERRORS[task](row["prompt"])
    if draw < CORRUPTED:
        digits = list(row["answer"])
        position = rng.randrange(len(digits) - 1)
        digits[position] = str((int(digits[position]) + rng.randrange(1, 10)) % 10)
        return "".join(digits)
    return row["answer"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per character, "." ends a sequence, nothing is added at the start."""
    core = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=".",
        padding_side="left",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int = 12, hidden: int = 64) -> Qwen3ForCausalLM:
    """Return the untrained model, float32; the demo model has the default size."""
    config = Qwen3Config(
        vocab_size=len(SYMBOLS),
        hidden_size=hidden,
        intermediate_size=5 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.07,  # the default .02 is for wide models: addition then stayed near 0 for 380 steps
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    # The embeddings are also the head, and both stay frozen while one block is trained. Started as small as the other
    # weights, they left GRPO on one block about ten points of sampled accuracy behind.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return model


def training_batch(tokenizer: PreTrainedTokenizerFast, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels of one step, both (208, 19) int64; labels are -100 outside the answer."""
    rng = random.Random(f"corrupt {seed} {step}")
    prompts, answers = [], []
    for name, size in BATCH.items():
        for row in TASKS[name].rows("train", size, seed * MAX_STEPS + step):
            prompts.append(row["prompt"])
            answers.append(corrupt(row, name, rng))
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids: torch.Tensor = tokens["input_ids"]
    labels = ids.masked_fill(tokens["attention_mask"] == 0, -100)
    for i, prompt in enumerate(prompts):
        labels[i, : len(prompt)] = -100
    return ids, labels


def learning_rate(step: int) -> float:
    """Return the rate of a step, counted from 1: linear warm-up, then constant."""
    return LEARNING_RATE * min(1.0, step / WARMUP_STEPS)


def suitable(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: dict[str, list[dict[str, str]]]
) -> dict[str, tuple[Evaluation, Evaluation]] | None:
    """Return each task's greedy and sampled evaluation, or None as soon as one of them is out of bounds."""
    figures = {}
    for name, task in TASKS.items():
        greedy = evaluate(model, tokenizer, task, rows[name], Sampling(greedy=True))
        log(f"  {name}: greedy {greedy.mean:.3f}")
        if not GREEDY_BOUNDS[0] <= greedy.mean <= GREEDY_BOUNDS[1]:
            return None
        sampled = evaluate(model, tokenizer, task, rows[name], Sampling(samples=SAMPLES))
        log(f"  {name}: sampled {sampled.mean:.3f}")
        if not SAMPLED_BOUNDS[0] <= sampled.mean <= SAMPLED_BOUNDS[1]:
            return None
        figures[name] = greedy, sampled
    return figures


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int
) -> tuple[int, dict[str, tuple[Evaluation, Evaluation]]]:
    """Train in place up to the first suitable checkpoint; return the number of steps and its figures.

    Raises:
        RuntimeError: when no checkpoint was suitable.
    """
    # Scores jump by ten points between checkpoints, so the one that is chosen on some problems is measured on others.
    held_out = {name: task.rows("test", CHOOSING + MEASURING, 0) for name, task in TASKS.items()}
    choosing = {name: rows[:CHOOSING] for name, rows in held_out.items()}
    measuring = {name: rows[CHOOSING:] for name, rows in held_out.items()}
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(1, MAX_STEPS + 1):
        ids, labels = training_batch(tokenizer, step, seed)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % CHECK_EVERY == 0:
            log(f"step {step}: loss {loss.item():.3f}")
        if step >= FIRST_CHECK and step % CHECK_EVERY == 0 and suitable(model, tokenizer, choosing):
            log(f"step {step}: suitable on {CHOOSING} problems, measuring on {MEASURING} others")
            if figures := suitable(model, tokenizer, measuring):
                return step, figures
    raise RuntimeError(f"no suitable checkpoint in {MAX_STEPS} steps; try another --seed")


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- qwen3
- toy-model
- reinforcement-learning
---

# Demo model of peft-onelayer

A toy: a decoder of the Qwen3 architecture with {parameters:,} parameters ({layers} blocks of {block:,}, float32),
trained from scratch on two synthetic tasks. It knows nothing else: no language, no other lengths, no other characters
than `0123456789AS+=.`

It is there to try reinforcement learning of one block on a laptop, in tests and in tutorials. What is measured on it is
no evidence about large models.

```python
from importlib.resources import files

from transformers import AutoModelForCausalLM, AutoTokenizer

path = str(files("peft_onelayer") / "demo_model")
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("A347+085=", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=5)[0]))
```

One token is one character. `.` is the end-of-sequence token, so that an answer ends itself; no token is added at the
start.

## Accuracy

Exact match, in per cent, with standard errors over problems, on {measuring} held-out problems per task; the checkpoint
was chosen on {choosing} others. Sampled: temperature 1, {samples} samples per problem.

| task | greedy | sampled |
|---|---|---|
{table}

It is meant to be half right. {corrupted:.0%} of the answers it was trained on were corrupted (half by a systematic
error: carries dropped, descending order; half by one wrong digit), so that greedy accuracy is partial and sampled
accuracy clearly lower. That gap is what reinforcement learning closes.

## Training

`examples/tiny_model/build.py --seed {seed}`: {steps} steps of {batch} rows, AdamW, learning rate {rate}, loss on the
answer only. It took {seconds:.0f} seconds in one thread on a machine with {cores} CPU cores, evaluation included, with
Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}. Problems are held out by a hash;
see `peft_onelayer.tasks`.
"""


def write_card(
    folder: Path,
    model: Qwen3ForCausalLM,
    figures: dict[str, tuple[Evaluation, Evaluation]],
    *,
    seed: int,
    steps: int,
    seconds: float,
) -> None:
    """Write README.md with the measured figures."""

    def percent(evaluation: Evaluation) -> str:
        return f"{100 * evaluation.mean:.1f} ± {100 * evaluation.standard_error:.1f}"

    table = [
        f"| {TITLES[name]} | {percent(greedy)} | {percent(sampled)} |" for name, (greedy, sampled) in figures.items()
    ]
    card = CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        block=sum(parameter.numel() for parameter in model.model.layers[0].parameters()),
        measuring=MEASURING,
        choosing=CHOOSING,
        samples=SAMPLES,
        table="\n".join(table),
        corrupted=CORRUPTED,
        seed=seed,
        steps=steps,
        batch=sum(BATCH.values()),
        rate=LEARNING_RATE,
        seconds=seconds,
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def log(message: str) -> None:
    """Print progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def is_ours(folder: Path) -> bool:
    """Whether `folder` holds nothing but what this script writes."""
    return {path.name for path in folder.iterdir()} <= FILES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: the package's)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the training data (default: 0)")
    arguments = parser.parse_args()
    try:
        check_folder(arguments.out, is_ours)
    except ValueError as error:
        parser.error(str(error))

    # A second thread gains a tenth in these small matrices and loses far more where the other core is busy.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    transformers.logging.disable_progress_bar()
    start = time.monotonic()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    steps, figures = train(model, tokenizer, arguments.seed)

    with staged_directory(arguments.out, is_ours) as folder:
        model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)  # a fresh one: the used one carries the padding of its last call
        write_card(folder, model, figures, seed=arguments.seed, steps=steps, seconds=time.monotonic() - start)
    log(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
