"""`onelayer generate`: what a model and its adapters answer, side by side; without --prompt a conversation.

--json prints an object of the format "onelayer-generate-1".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
        typer.Option("--prompt", help="What to answer; repeatable. [default: read line by line]", show_default=False),
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
    """Show what the base and its adapters answer to the same prompts, from one model in memory."""
    from peft_onelayer.runs.early import check_generation

    texts = prompt or []
    with user_error(ValueError, OSError):
        check_generation(model, adapters or (), revision, allow_other_base=allow_other_base)
        if not all(text.strip() for text in texts):
            raise ValueError("--prompt holds no text; give some")
        if not texts and not sys.stdin.isatty():
            texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
            if not texts:
                raise ValueError("no prompt was given; give --prompt TEXT, or lines on the standard input")
    with status("loading ..."):
        from peft_onelayer.runs.generation import Speakers

    with user_error(ValueError, OSError, ImportError):
        speakers = Speakers(
            model,
            adapters or (),
            revision=revision,
            trust_remote_code=trust_remote_code,
            chat=chat,
            allow_other_base=allow_other_base,
            progress=TerminalProgress(),
        )
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        for text in texts:
            speakers.check(text)
        asked = texts or _typed(speakers)
        if as_json:
            _print_json(speakers, list(asked), options)
            return
        for text in asked:
            for name in speakers.names:
                print(f"{plain(name)}: ", end="", flush=True)
                speakers.answer(name, text, _write, **options)
                print(flush=True)


def _typed(speakers: Speakers) -> Iterator[str]:
    """Lines that a person types, until an empty one or the end, each checked as it comes."""
    note("type a prompt; an empty line ends")
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line.strip():
            return
        speakers.check(line)
        yield line


def _write(text: str) -> None:
    """A piece of an answer as it comes, without what could steer the terminal."""
    print("".join(c if c.isprintable() or c in "\n\t" else "?" for c in text), end="", flush=True)


def _print_json(speakers: Speakers, prompts: list[str], options: dict[str, Any]) -> None:
    answers = []
    for text in prompts:
        said = {name: speakers.answer(name, text, lambda piece: None, **options) for name in speakers.names}
        answers.append({"prompt": text, "answers": said})
    print_json({"format": "onelayer-generate-1", "prompts": answers})
