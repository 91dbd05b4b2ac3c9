"""A model and adapters of it answering the same prompts, from one copy of the base in memory.

An adapter that changes the base when it loads (PiSSA) has that copy to itself, and another answers for the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from peft_onelayer.records.files import CONFIG, read_fields
from peft_onelayer.records.locate import (
    adapter_folder,
    check_adapter_folder,
    check_base_of,
    check_model_name,
    holds_adapter,
)
from peft_onelayer.records.text import one_line, printable
from peft_onelayer.tuner import SingleLayerConfig

from .models import fingerprint, load_adapter, load_causal_lm, quiet_logs, to_device, without_progress_bars
from .progress import Progress

BASE = "base"


class Speakers:
    """The base and its adapters, each with its own side of a conversation.

    Args:
        model: a base, or an adapter, which names its base: folders or Hub ids.
        adapters: more of them, on the same base.
        revision: Hub revision of the base.
        trust_remote_code: run the Python code that comes with the base.
        chat: give prompts as messages of a user; None for: if the tokenizer has a chat template.
        conversation: whether such a prompt continues the conversation, or stands by itself.
        allow_other_base: take adapters of our method on a base that they were not trained on.
        progress: is told what goes on.

    Attributes:
        names: "base", and the adapters as they were given.

    Raises:
        ValueError: in one line: a model or an adapter that is not there, or does not fit.
    """

    def __init__(
        self,
        model: str,
        adapters: Sequence[str] = (),
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat: bool | None = None,
        conversation: bool = True,
        allow_other_base: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.conversation = conversation
        self.progress = progress = progress or Progress()
        names, given = list(adapters), revision
        with without_progress_bars(), quiet_logs():
            if holds_adapter(model):
                names.insert(0, model)
                fields = read_fields(adapter_folder(model) / CONFIG)
                model, revision = fields.get("base_model_name_or_path") or "", given or fields.get("revision")
                if not model:
                    raise ValueError(f"{names[0]} does not name its base model; give the base, then the adapter.")
                check_base_of(adapter_folder(names[0]), f"onelayer generate {{base}} {names[0]}")
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{twice[0]} is given twice; name each adapter once.")
            check_model_name(model, given)
            folders = [adapter_folder(name) for name in names]
            for name, folder in zip(names, folders, strict=True):
                check_adapter_folder(folder, name)
            load = partial(_load, model, revision, trust_remote_code, progress)
            base, self.tokenizer = load()
            self.chat = bool(self.tokenizer.chat_template) if chat is None else chat
            if self.chat and not self.tokenizer.chat_template:
                raise ValueError(f"--chat needs a chat template, which the tokenizer of {model} has not; use --plain")
            self.model, changed = _with_adapters(base, folders, allow_other_base)
            self.base = load()[0] if changed else self.model
        self.names = [BASE, *names]
        self.said: dict[str, list[dict[str, str]]] = {name: [] for name in self.names}

    def check(self, prompt: str) -> None:
        """Look at a prompt before anybody answers it, and tell of characters that the tokenizer does not know.

        Raises:
            ValueError: a prompt without tokens, or one that leaves the model no room.
        """
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        if not ids and not self.chat:
            raise ValueError("the prompt holds no token; give some text")
        self._read([{"role": "user", "content": prompt}])
        kept = self.tokenizer.decode(ids, skip_special_tokens=True).casefold()
        if lost := sorted({c for c in prompt if not c.isspace() and c.casefold() not in kept}):
            self.progress.note(
                f"warning: the tokenizer does not know {printable(' '.join(lost), 60)}, so the model does not read the "
                "prompt as it was given"
            )

    def answer(
        self,
        name: str,
        prompt: str,
        on_text: Callable[[str], None],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """Answer `prompt`, which continues the conversation with `name` where there is one and prompts are messages.

        Args:
            name: one of `names`.
            prompt: the user's text, which `check` took.
            on_text: is given the text piece by piece.
            max_tokens: where the answer is cut.
            temperature: of sampling; 0 for greedy decoding.
            seed: of sampling, the same for every speaker.

        Raises:
            ValueError: a prompt that leaves the model no room.
        """
        messages = [*self.said[name], {"role": "user", "content": prompt}]
        ids, room = self._read(messages)
        inputs = torch.tensor([ids], device=self.model.device)
        streamer = _Stream(self.tokenizer, on_text)
        set_seed(seed)
        sampled = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        with self._speaking(name) as model, torch.no_grad():
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_tokens if room is None else min(max_tokens, room),
                streamer=streamer,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                **sampled,
            )
        text = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        if self.chat and self.conversation:
            self.said[name] = [*messages, {"role": "assistant", "content": text}]
        return text

    def _read(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], int | None]:
        """What the model reads of a conversation, of its last text alone without a chat, and the room for an answer."""
        if self.chat:
            written = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            ids = written["input_ids"]
        else:
            ids = self.tokenizer(messages[-1]["content"]).input_ids
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room and len(ids) >= room:
            raise ValueError(f"the prompt has {len(ids)} tokens, and the model has room for {room}; give a shorter one")
        return ids, room - len(ids) if room else None

    @contextmanager
    def _speaking(self, name: str) -> Iterator[PreTrainedModel | PeftModel]:
        if name != BASE:
            self.model.set_adapter(_key(self.names.index(name) - 1), inference_mode=True)
            yield self.model
        elif isinstance(self.base, PeftModel):
            with self.base.disable_adapter():
                yield self.base
        else:
            yield self.base


def _load(
    model: str, revision: str | None, trust_remote_code: bool, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with progress.status(f"loading {model} ..."):
        base, tokenizer = load_causal_lm(model, revision, trust_remote_code=trust_remote_code)
    to_device(base)
    return base, tokenizer


def _with_adapters(
    base: PreTrainedModel, folders: Sequence[Path], allow_other_base: bool
) -> tuple[PreTrainedModel | PeftModel, bool]:
    """The base with its adapters, and whether loading the only one changed the base."""
    if not folders:
        return base, False
    before = fingerprint(base)
    model = load_adapter(base, folders[0], allow_other_base)
    changed = not before <= fingerprint(base)
    _check_alone(folders[0], changed, folders)
    for i, folder in enumerate(folders[1:], start=1):
        try:
            if allow_other_base and read_fields(folder / CONFIG).get("peft_type") == "SINGLE_LAYER":
                model.add_adapter(_key(i), SingleLayerConfig.from_pretrained(str(folder), allow_other_base=True))
            model.load_adapter(str(folder), _key(i))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{folder} does not load beside {folders[0]}: {one_line(error)}") from error
        _check_alone(folder, not before <= fingerprint(base), folders)
    return model.eval(), changed


def _check_alone(folder: Path, changed: bool, folders: Sequence[Path]) -> None:
    if changed and len(folders) > 1:
        raise ValueError(
            f"{folder} changes the weights of the base when it loads, as PiSSA does, so that no other adapter can "
            "answer beside it; give it alone"
        )


def _key(i: int) -> str:
    """PEFT's name of the adapter number i; a name may hold no dot."""
    return "default" if i == 0 else f"adapter{i}"


class _Stream(TextStreamer):
    """Hands on the text behind the prompt as it comes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)
