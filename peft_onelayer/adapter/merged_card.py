"""The card of a merged checkpoint, in place of its base's, which describes other weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from peft_onelayer.records.files import CARD, read_text
from peft_onelayer.records.locate import is_local, last_part
from peft_onelayer.records.text import name_blocks, well_formed

KEPT = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")  # of the base's card


def merged_card(base: str | Path, folder: Path, adapters: Sequence[str | Path], layers: Sequence[int]) -> str:
    """README.md of a base with adapters merged into it.

    Args:
        base: the base as it was named.
        folder: its checkpoint, whose card gives the license and what else holds for both.
        adapters: as they were named.
        layers: the blocks that have other weights than the base.
    """
    on_hub = not is_local(str(base))
    name = str(base) if on_hub else last_part(str(base))
    fields: dict[str, Any] = {"base_model": name, "base_model_relation": "finetune"} if on_hub else {}
    fields |= {"tags": ["onelayer", "merged"]} | _kept(folder)
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    link = f"[{name}](https://huggingface.co/{name})" if on_hub else f"`{name}`"
    merged = ", ".join(f"`{last_part(str(a)) if is_local(str(a)) else a}`" for a in adapters)
    return well_formed(
        f"---\n{front}---\n\n# {last_part(name)} with {name_blocks(layers)} trained\n\n"
        f"{link} with {merged} merged into it by `onelayer merge`. The weights of {name_blocks(layers)} are those of "
        "the adapters; all others are the base's. Results in the base's card are of the base, and results in an "
        "adapter's card are of the base with that adapter.\n"
    )


def _kept(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    match = re.match(r"---\r?\n(.*?)\r?\n---", read_text(path), re.DOTALL) if path.is_file() else None
    try:
        fields = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        fields = None
    return {name: fields[name] for name in KEPT if name in fields} if isinstance(fields, dict) else {}
