"""The text of a card as a file that people edit: which parts are ours, and what is kept of a card that was there.

Our parts stand between HTML comments, which no page shows. A new card replaces these parts and keeps all else: text
around them, fields of the front matter that we do not set, and that a part was taken out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from peft_onelayer.records.locate import is_local
from peft_onelayer.rl.algorithms import ALGORITHMS
from peft_onelayer.tasks import TASKS
from peft_onelayer.tasks.files import SUFFIXES

FIRST = "title"  # of the parts
TAGS = ("onelayer", "reinforcement-learning")
_HINT = "; onelayer writes anew what stands between such marks, and keeps the text around them"
_PART = re.compile(r"<!-- onelayer: (?P<name>\w+)[^>]*-->\n?(?P<text>.*?)<!-- /onelayer -->\n?", re.DOTALL)
_FRONT = re.compile(r"---\r?\n(?P<yaml>.*?)\r?\n---\r?\n", re.DOTALL)
_OF_A_RESULT = ("model-index",)  # fields that speak of one evaluation, and go with it
# What TRL's trainers write beside each checkpoint (trl/templates/*_model_card.md): with a link to the user's logs, and
# how to load a whole model.
_BY_TRL = re.compile(
    r"^# Model Card for [^\n]*\n+This model is a fine-tuned version of [^\n]*\n"
    r"It has been trained using \[TRL\][^\n]*\n"
    r"(?P<rest>.*?)^Cite TRL as:\s*```bibtex\n.*?\n```[ ]*\n?",
    re.DOTALL | re.MULTILINE,
)
_HEADINGS = {"## Quick start", "## Training procedure", "### Framework versions", "## Citations"}
_FIELDS_BY_TRL = ("model_name", "licence")
# What PEFT writes of an adapter, and what we wrote before there were marks: nothing that a person wrote.
_TEMPLATES = (
    ("# Model Card for Model ID", "[More Information Needed]"),
    ("A PEFT adapter of `peft-onelayer`:", "## What was trained"),
)


def part(name: str, text: str) -> str:
    """A part of ours between its marks; an empty one too, so that one that is missing was taken out.

    >>> part("limits", "None.")
    '<!-- onelayer: limits -->\\nNone.\\n<!-- /onelayer -->'
    """
    text = f"{text.strip()}\n" if text else ""
    return f"<!-- onelayer: {name}{_HINT if name == FIRST else ''} -->\n{text}<!-- /onelayer -->"


def merge_cards(ours: str, theirs: str, license: str | None = None, *, fields_only: bool = False) -> str:
    """Our card, with what a person wrote into the card that was there.

    Args:
        ours: of `model_card`.
        theirs: the whole text of a README.md; a template that nobody filled in counts as nothing.
        license: goes before the one that a person wrote.
        fields_only: take only the fields of their front matter.
    """
    theirs = _without_trl(theirs)
    if _is_template(theirs):
        return ours
    our_fields, our_body = split_card(ours)
    their_fields, their_body = split_card(theirs)
    parts = {match["name"]: match[0] for match in _PART.finditer(our_body)}
    if fields_only:
        body = our_body
    elif not _PART.search(their_body):
        body = f"{their_body.strip()}\n\n{our_body.lstrip()}" if their_body.strip() else our_body
    else:
        body = _PART.sub(lambda match: parts.get(match["name"], ""), their_body)
    fields = _fields(our_fields, their_fields) | ({"license": license} if license else {})
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{body.strip()}\n"


def own_text(card: str) -> str:
    """What of a card a person wrote around our parts."""
    card = _without_trl(card)
    if _is_template(card):
        return ""
    return _PART.sub("", split_card(card)[1]).strip()


def is_edited(card: str, ours: str) -> bool:
    """Whether a card holds text that is not ours, or lacks a part of `ours`."""
    parts = {match["name"] for match in _PART.finditer(card)}
    missing = {match["name"] for match in _PART.finditer(ours)} - parts
    return bool(own_text(card) or (parts and missing))


def _without_trl(card: str) -> str:
    """A card without what TRL wrote into it; one in which a person has added a heading there stays as it is."""
    found = _BY_TRL.search(card)
    if not found or set(re.findall(r"^#{1,6} .*?(?=\s*$)", found["rest"], re.MULTILINE)) - _HEADINGS:
        return card
    front = _FRONT.match(card)
    start = front.end() if front and front.end() <= found.start() else 0
    names = "|".join(_FIELDS_BY_TRL)
    fields = re.sub(rf"^(?:{names}):[^\n]*\n", "", card[:start], flags=re.MULTILINE)
    return fields + card[start : found.start()] + card[found.end() :]


def _is_template(card: str) -> bool:
    return not _PART.search(card) and any(all(text in card for text in template) for template in _TEMPLATES)


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """(front matter, text); a front matter that is no YAML mapping counts as none.

    >>> split_card("---\\nlicense: mit\\n---\\n# Mine")
    ({'license': 'mit'}, '# Mine')
    """
    if not (match := _FRONT.match(card)):
        return {}, card
    try:
        fields = yaml.safe_load(match["yaml"])
    except yaml.YAMLError:
        fields = None
    return (fields if isinstance(fields, dict) else {}), card[match.end() :]


def _fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields over theirs; lists hold both, without those of our tags that are no longer true; a license and
    languages that a person gave stay."""
    kept = {name: value for name, value in theirs.items() if name not in _OF_A_RESULT}
    if "base_model" in kept and is_local(str(kept["base_model"])):  # as PEFT writes it for a base from a folder
        del kept["base_model"]
    found: dict[str, Any] = kept | dict(ours)
    found |= {name: kept[name] for name in ("license", "language") if name in kept}
    for name in ("tags", "datasets"):
        other = [entry for entry in kept.get(name) or [] if not (_is_ours if name == "tags" else _is_file)(entry)]
        if listed := [*(ours.get(name) or []), *other]:
            found[name] = list(dict.fromkeys(listed))
        else:
            found.pop(name, None)
    return found


def _is_file(dataset: Any) -> bool:
    """Whether a trainer that wrote the card trained on a file of its own, which the Hub would look for among its data
    sets."""
    return str(dataset).endswith(SUFFIXES) or is_local(str(dataset))


def _is_ours(tag: Any) -> bool:
    text = str(tag)
    ours = {*TAGS, *ALGORITHMS, *TASKS}
    return text.partition(":")[0] in ("task", "layer", "base_model") or text.partition(":")[0] in ours
