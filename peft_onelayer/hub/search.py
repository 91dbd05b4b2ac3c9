"""Finds adapters of this method on the Hub by the tags that their cards carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from huggingface_hub import HfApi

from peft_onelayer.records.hub_errors import hub_errors

from .card_text import TAGS

Sort = Literal["downloads", "likes", "created_at", "last_modified", "trending_score"]


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter on the Hub, as its card describes it.

    Args:
        repo_id: the repository.
        base: Hub id of the base model; None where the card names none.
        layers: the trained blocks.
        task: the task; None where the card names none.
        downloads: of the last 30 days, as the Hub counts them.
        likes: of all time.
        last_modified: when it was last changed.
        private: whether only its owner sees it.
    """

    repo_id: str
    base: str | None
    layers: list[int]
    task: str | None
    downloads: int
    likes: int
    last_modified: datetime | None
    private: bool

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `onelayer search --json` prints them in a list, "adapters"."""
        return asdict(self) | {"last_modified": self.last_modified and self.last_modified.isoformat()}


def search_adapters(
    *,
    base: str | None = None,
    task: str | None = None,
    layer: int | None = None,
    sort: Sort = "downloads",
    limit: int | None = 20,
) -> list[FoundAdapter]:
    """List the adapters of this method that the token may see, most of `sort` first.

    Args:
        base: Hub id of the base model.
        task: the task's name.
        layer: a block that was trained, counted from 0.
        sort: what decides the order.
        limit: at most so many; None for all.

    Raises:
        HubError: the Hub could not be asked.
    """
    wanted = [TAGS[0]]
    wanted += [f"base_model:adapter:{base}"] if base else []
    wanted += [f"task:{task}"] if task else []
    wanted += [f"layer:{layer}"] if layer is not None else []
    with hub_errors("search"):
        models = list(
            HfApi().list_models(
                filter=wanted,
                sort=sort,
                limit=limit,
                expand=["downloads", "likes", "lastModified", "private", "tags"],
            )
        )
    return [
        FoundAdapter(
            repo_id=model.id,
            base=next(iter(_tagged(model.tags, "base_model:adapter:")), None),
            layers=sorted(int(number) for number in _tagged(model.tags, "layer:") if number.isdecimal()),
            task=next(iter(_tagged(model.tags, "task:")), None),
            downloads=model.downloads or 0,
            likes=model.likes or 0,
            last_modified=model.last_modified,
            private=bool(model.private),
        )
        for model in models
    ]


def _tagged(tags: Sequence[str] | None, prefix: str) -> list[str]:
    return [tag.removeprefix(prefix) for tag in tags or [] if tag.startswith(prefix)]
