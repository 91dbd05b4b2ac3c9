"""`onelayer generate`: what a model and its adapters answer, side by side.

Prompts that are given or piped are answered each by itself, a piped one as soon as its line is there. What is typed at
a terminal is a conversation, in which every model reads its own answers. --json prints an object of the format
"onelayer-generate-1", once all prompts are there.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import user_error
from ._options import AllowOtherBase, Chat, Json, Revision, Seed, TrustRemoteCode
from ._output import TerminalProgress, note, plain, print_json, status

if TYPE_CHECKING:
    from peft_onelayer.runs.generation import Speakers


def generate(
    model: Annotated[str, typer.Argument(help="A base model or an adapter, which names its base: folder or Hub id.")],
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER...]", help="More adapters of the same base.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="What to answer, each by itself; repeatable. [default: the lines of a pipe, each by itself; at a "
            "terminal a conversation]",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 for greedy decoding.")] = 0.0,
    seed: Seed = 0,
    chat: Chat = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_other_base: AllowOtherBase = False,
    as_json: Json = False,
) -> None:
    """Show what the base and its adapters answer to the same prompts, from one model in memory.

    Prompts that are given or piped are answered each by itself; what is typed at a terminal is a conversation.
    """
    from peft_onelayer.runs.early import check_generation

    texts: Iterable[str] = prompt or []
    typed = not prompt and sys.stdin.isatty()
    with user_error(ValueError, OSError):
        check_generation(model, adapters or (), revision, allow_other_base=allow_other_base)
        if not all(text.strip() for text in texts):
            raise ValueError("--prompt holds no text; give some")
        if not prompt and not typed:
            lines = (line.rstrip("\n") for line in sys.stdin if line.strip())
            if (first := next(lines, None)) is None:
                raise ValueError("no prompt was given; give --prompt TEXT, or lines on the standard input")
            texts = itertools.chain([first], lines)
    with status("loading ..."):
        from peft_onelayer.runs.generation import Speakers

    with user_error(ValueError, OSError, ImportError):
        speakers = Speakers(
            model,
            adapters or (),
            revision=revision,
            trust_remote_code=trust_remote_code,
            chat=chat,
            conversation=typed,
            allow_other_base=allow_other_base,
            progress=TerminalProgress(),
        )
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        asked: Iterable[str] = _checked(speakers, _typed() if typed else texts)
        if prompt or as_json:
            asked = list(asked)  # all are checked before one is answered
        if as_json:
            _print_json(speakers, asked, options)
            return
        for text in asked:
            for name in speakers.names:
                print(f"{plain(name)}: ", end="", flush=True)
                speakers.answer(name, text, _write, **options)
                print(flush=True)


def _checked(speakers: Speakers, texts: Iterable[str]) -> Iterator[str]:
    """The prompts, each checked as it comes."""
    for text in texts:
        speakers.check(text)
        yield text


def _typed() -> Iterator[str]:
    """Lines that a person types, until an empty one or the end."""
    note("type a prompt; an empty line ends")
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line.strip():
            return
        yield line


def _write(text: str) -> None:
    """A piece of an answer as it comes, without what could steer the terminal."""
    print("".join(c if c.isprintable() or c in "\n\t" else "?" for c in text), end="", flush=True)


def _print_json(speakers: Speakers, prompts: Iterable[str], options: dict[str, Any]) -> None:
    answers = []
    for text in prompts:
        said = {name: speakers.answer(name, text, lambda piece: None, **options) for name in speakers.names}
        answers.append({"prompt": text, "answers": said})
    print_json({"format": "onelayer-generate-1", "prompts": answers})
