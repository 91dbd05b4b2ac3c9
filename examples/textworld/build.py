"""Train the small agent of this folder from scratch: python examples/textworld/build.py [--out DIR] [--seed N]

It learns to play the games of `textworld:tiny` through tool calls by imitating mixed play: in each step the command
that TextWorld's own winning policy names, with a probability of 40 %, otherwise one of the admissible commands at
random. The result knows the tool, the commands and the way to win, but is as unsure as its teacher, which is the room
that reinforcement learning needs. The model card is written from figures measured on held-out games.

The chat template and the response template, with which TRL writes and reads tool calls, are part of the tokenizer.
"""

import argparse
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from peft_onelayer.records.files import check_folder, staged_directory
from peft_onelayer.rollouts.evaluation import Evaluation, evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import load_task
from peft_onelayer.tasks.textworld import (
    FAMILIES,
    OPPOSITE,
    TINY_CONTAINERS,
    TINY_OBJECTS,
    TINY_ROOMS,
    TINY_SUPPORTERS,
    TextWorldEnvironment,
)

TASK = load_task("textworld:tiny")
DEFAULT_OUT = Path(__file__).parent / "model"
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}

SPECIAL = ("<pad>", "<unk>", "<user>", "<agent>", "<call>", "<result>", "<end>")
GRAMMAR = ("act", "command", ".", ",", "go", "open", "close", "take", "from", "drop", "put", "on", "insert", "into")
ENDINGS = ("won", "over", "invalid")
VOCABULARY = (*SPECIAL, *GRAMMAR, *ENDINGS, *OPPOSITE, *TINY_ROOMS, *TINY_CONTAINERS, *TINY_SUPPORTERS, *TINY_OBJECTS)

# A turn of the agent is `<agent> <call> act command go east <end>`, or `<agent> <end>` when it has nothing to do. The
# tools are not described to the model, which has been trained on the only one.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message.role == "assistant" -%}
    {{ "<agent> " + message.content }}
    {%- for call in message.tool_calls or [] -%}
      {{ " <call> " + call.function.name }}
      {%- for key, value in call.function.arguments.items() -%}{{ " " + key + " " + value }}{%- endfor -%}
    {%- endfor -%}
    {{ " <end>" }}
  {%- elif message.role == "tool" -%}
    {{ " <result> " + message.content + " " }}
  {%- else -%}
    {{ "<user> " + message.content + " " }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<agent>" }}{%- endif -%}
"""
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<agent>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<call> (?P<name>\w+) command ",
            "close_pattern": r"\s*<end>",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": {"command": "{content}"}}},
        },
        "content": {"close_pattern": r"\s*<end>", "content": "text"},
    },
}

EXPERT = 0.4  # share of steps in which the teacher plays TextWorld's winning policy
GAMES, EPISODES_PER_GAME = 1500, 2
BATCH, BATCHES_SORTED = 32, 8  # episodes; those of 8 batches are sorted by length, so that little is padded
LEARNING_RATE, WARMUP_STEPS, STEPS = 3e-3, 30, 220
GAMES_MEASURED, SAMPLES = 128, 4


Episode = tuple[list[int], list[int]]  # token ids, labels


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per word, the templates for chats and tool calls included."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        padding_side="left",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return the untrained model, float32: the shape of the demo model, with a longer context."""
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.07,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    # The head is tied and stays frozen while one block is trained; see examples/tiny_model/build.py.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return model


def play(seed: int) -> list[list[dict]]:
    """Return the chats of the teacher's episodes on train games."""
    rng = random.Random(f"teacher {seed}")
    environment = TextWorldEnvironment(FAMILIES["tiny"])
    chats = []
    for row in TASK.rows("train", GAMES, seed):
        for _ in range(EPISODES_PER_GAME):
            chat: list[dict[str, Any]] = [{"role": "user", "content": environment.reset(**row)}]
            while not environment.done:
                expert = rng.random() < EXPERT and environment.policy_commands
                command = environment.policy_commands[0] if expert else rng.choice(environment.admissible_commands)
                call = {"type": "function", "function": {"name": "act", "arguments": {"command": command}}}
                chat.append({"role": "assistant", "content": "", "tool_calls": [call]})
                chat.append({"role": "tool", "name": "act", "content": environment.act(command)})
            chats.append([*chat, {"role": "assistant", "content": ""}])
    return chats


def tokenize(tokenizer: PreTrainedTokenizerFast, chat: list[dict]) -> Episode:
    """Return the token ids of a chat and the labels: the ids of the agent's turns, -100 elsewhere."""
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    agent, end = tokenizer.convert_tokens_to_ids(["<agent>", "<end>"])
    labels, speaking = [], False
    for token in ids:
        labels.append(token if speaking else -100)
        speaking = token == agent or (speaking and token != end)
    return ids, labels


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Return the rows as one tensor (B, T) int64, filled with `value` on the right."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def draw_batches(episodes: list[Episode], rng: random.Random) -> Iterator[list[Episode]]:
    """Yield batches without end."""
    while True:
        drawn = sorted(rng.sample(episodes, BATCHES_SORTED * BATCH), key=lambda episode: len(episode[0]))
        batches = [drawn[i : i + BATCH] for i in range(0, len(drawn), BATCH)]
        yield from rng.sample(batches, BATCHES_SORTED)


def learning_rate(step: int) -> float:
    """Return the rate of a step, counted from 1: linear warm-up and decay. At a constant rate success jumps about."""
    return LEARNING_RATE * min(step / WARMUP_STEPS, (STEPS + 1 - step) / (STEPS - WARMUP_STEPS))


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Train in place."""
    episodes = [tokenize(tokenizer, chat) for chat in play(seed)]
    lengths = [len(ids) for ids, _ in episodes]
    log(f"{len(episodes)} episodes of up to {max(lengths)} tokens, {statistics.fmean(lengths):.0f} on average")
    batches = draw_batches(episodes, random.Random(f"batches {seed}"))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(1, STEPS + 1):
        batch = next(batches)
        ids, labels = pad([ids for ids, _ in batch], tokenizer.pad_token_id), pad([labels for _, labels in batch], -100)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            log(f"step {step}: loss {loss.item():.3f}")


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- qwen3
- toy-model
- tool-calling
- reinforcement-learning
---

# A small agent for TextWorld

A toy: a decoder of the Qwen3 architecture with {parameters:,} parameters ({layers} blocks of {block:,}, float32),
trained from scratch to play the games of the task `textworld:tiny` through tool calls. It knows {words} words and
nothing else. It is there to try reinforcement learning of one block of an agent on a laptop and in tests; what is
measured on it is no evidence about large models.

A turn is `<agent> <call> act command go east <end>`, the game's answer `<result> attic table . go west , take cup`.
The tokenizer carries the chat template and the response template with which TRL writes and reads them.

## Success

Share of games won, in per cent, with standard errors over games, on {games_measured} held-out games. Sampled:
temperature 1, {samples} episodes per game.

| greedy | sampled |
|---|---|
| {greedy} | {sampled} |

It is meant to be unsure: its teacher played TextWorld's winning policy in {expert:.0%} of the steps and one of the
admissible commands at random in the others.

## Training

`examples/textworld/build.py --seed {seed}`: {steps} steps of {batch} episodes out of {episodes:,} (on {games:,} games),
AdamW, learning rate {rate}, loss on the agent's turns only. It took {minutes:.0f} minutes in one thread, evaluation
included, with Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers},
textworld {textworld}.
"""


def write_card(
    folder: Path,
    model: Qwen3ForCausalLM,
    sampled: Evaluation,
    greedy: Evaluation,
    *,
    seed: int,
    seconds: float,
) -> None:
    """Write README.md with the measured figures."""

    def percent(evaluation: Evaluation) -> str:
        return f"{100 * evaluation.mean:.1f} ± {100 * evaluation.standard_error:.1f}"

    card = CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        block=sum(parameter.numel() for parameter in model.model.layers[0].parameters()),
        words=len(VOCABULARY),
        games_measured=GAMES_MEASURED,
        samples=SAMPLES,
        greedy=percent(greedy),
        sampled=percent(sampled),
        expert=EXPERT,
        seed=seed,
        steps=STEPS,
        batch=BATCH,
        episodes=GAMES * EPISODES_PER_GAME,
        games=GAMES,
        rate=LEARNING_RATE,
        minutes=seconds / 60,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        textworld=TASK.data["textworld"],
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
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: model/ beside this)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the training data (default: 0)")
    arguments = parser.parse_args()
    try:
        check_folder(arguments.out, is_ours)
    except ValueError as error:
        parser.error(str(error))

    torch.set_num_threads(1)  # the matrices are too small for two
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    transformers.logging.disable_progress_bar()
    start = time.monotonic()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, arguments.seed)
    rows = TASK.rows("test", GAMES_MEASURED, 0)
    sampled = evaluate(model, tokenizer, TASK, rows, Sampling(samples=SAMPLES))
    greedy = evaluate(model, tokenizer, TASK, rows, Sampling(greedy=True))
    log(f"success: sampled {sampled.mean:.3f}, greedy {greedy.mean:.3f}")

    with staged_directory(arguments.out, is_ours) as folder:
        model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)  # a fresh one: the used one carries the padding of its last call
        write_card(folder, model, sampled, greedy, seed=arguments.seed, seconds=time.monotonic() - start)
    log(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
