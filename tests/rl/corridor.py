"""A corridor of four cells to walk, a tokenizer that knows the words for it, and a policy that babbles tool calls.

`replay` works out from the tokens alone what happened in a rollout, as a second opinion on what a trainer noted.
"""

from __future__ import annotations

import random
import re

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

CELLS = 4
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<tool>", "<call>", "</call>"]
WORDS = [
    "walk",
    "fly",
    "left",
    "right",
    "(",
    ")",
    "=",
    ":",
    "cell",
    "0",
    "1",
    "2",
    "3",
    "wall",
    "error",
    "go",
    "done",
    " ",
]


class Corridor:
    """Starts in cell `start`. Reaching the last cell earns 1, walking into a wall costs .25. Cells are seen again."""

    def reset(self, start: int = 0, **row) -> None:
        self._cell, self._score = start, 0.0

    def walk(self, direction: str) -> str:
        """
        Walk one cell.

        Args:
            direction: left or right

        Returns:
            Where you are.
        """
        if direction not in ("left", "right"):
            raise ValueError("error")
        cell = self._cell + (1 if direction == "right" else -1)
        if not 0 <= cell < CELLS:
            self._score -= 0.25
            return f"wall{self._cell}"
        self._cell = cell
        self._score += cell == CELLS - 1
        return f"cell{cell}"

    @property
    def state(self) -> str:
        return f"cell{self._cell}"

    @property
    def score(self) -> float:
        return self._score


def reward(environments, **_) -> list[float]:
    """The score, and a hundredth of the cell: other than what the steps earned."""
    return [environment.score + environment._cell / 100 for environment in environments]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("</?[a-z]+>|[a-z]+|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
        "{% for call in message.get('tool_calls') or [] %}<call>{{ call['function']['name'] }}("
        "{% for key, value in call['function']['arguments'].items() %}{{ key }}={{ value }}{% endfor %})</call>"
        "{% endfor %}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    special = {name: f"<{name[:3]}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<assistant>",
        "fields": {
            "tool_calls": {
                "open_pattern": r"<call>(?P<name>\w+)\(",
                "close_pattern": r"\)</call>",
                "repeats": True,
                "content": "text",
                "transform": {
                    "type": "function",
                    "function": {"name": "{name}", "arguments": {"direction": "{content}"}},
                },
            },
            "content": {"close_pattern": "<eos>", "content": "text"},
        },
    }
    return tokenizer


TOKENIZER = make_tokenizer()
RIGHT, LEFT = "<call>walk(right)</call>", "<call>walk(left)</call>"
TURNS = (
    [RIGHT] * 5 + [LEFT] * 2 + [RIGHT + RIGHT, "go" + LEFT, "<call>fly(right)</call>", "<call>walk(go)</call>", "done"]
)


class Babble:
    """In place of a model's `generate`: each row says one of `turns`, chosen by a seed; all of it is recorded."""

    def __init__(self, seed: int, turns: list[str] = TURNS) -> None:
        self.random, self.turns = random.Random(seed), turns

    def __call__(self, input_ids: torch.Tensor, **_) -> torch.Tensor:
        said = [TOKENIZER(self.random.choice(self.turns) + "<eos>")["input_ids"] for _ in input_ids]
        new = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, said)), batch_first=True)  # 0 is <pad>
        return torch.cat([input_ids, new], dim=1)


def replay(ids: list[int], start: int, calls_run: bool = True):
    """Walk the corridor as the completion `ids` says: states, rewards, and the step of each token (-1: a tool's).

    `calls_run`: whether the calls of the last turn were run, although no answer to them is in the completion.
    """
    environment = Corridor()
    environment.reset(start)
    states, rewards, numbers = [], [], []
    turns, turn, by_model = [], [], True
    for token in ids:
        name = TOKENIZER.convert_ids_to_tokens(token)
        if name == "<tool>" and by_model:  # the first token after the model's turn
            turns.append(turn)
            turn, by_model = [], False
        numbers.append(len(turns) if by_model else -1)
        if by_model:
            turn.append(token)
        elif name == "<assistant>":
            by_model = True
    turns += [turn] if turn else []
    for i, turn in enumerate(turns):
        states.append(environment.state)
        before = environment.score
        if i < len(turns) - 1 or numbers[-1] == -1 or calls_run:
            for name, direction in re.findall(r"<call>(\w+)\((.*?)(?:\)</call>|$)", TOKENIZER.decode(turn)):
                if name == "walk" and direction in ("left", "right"):
                    environment.walk(direction)
        rewards.append(environment.score - before)
    return states, rewards, numbers
