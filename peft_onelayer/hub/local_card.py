"""The card of a folder on this machine, from the records beside the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from peft_onelayer.adapter.reader import AdapterFile, open_adapter
from peft_onelayer.records.evaluation import EvaluationRecord
from peft_onelayer.records.fields import Record
from peft_onelayer.records.files import (
    CARD,
    CONFIG,
    EVALUATION,
    PROFILE,
    RUN,
    WEIGHTS,
    file_digest,
    output,
    read_text,
    write_whole,
)
from peft_onelayer.records.locate import cached_base, is_local
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.run import RunRecord

from .card import PLOT, REWARDS, model_card
from .card_text import merge_cards, split_card

SomeRecord = TypeVar("SomeRecord", bound=Record)


@dataclass(frozen=True)
class Records:
    """What stands beside an adapter; None for what does not."""

    run: RunRecord | None
    evaluation: EvaluationRecord | None
    profile: LayerRanking | None

    @property
    def rewards(self) -> list[float]:
        """The mean rewards of the run, where there are enough for a curve."""
        found = self.run.results.rewards if self.run and self.run.results else []
        return found if len(found) > 1 else []


def read_records(folder: Path, evaluation: Path | None = None) -> Records:
    """The records beside the adapter in `folder`, the evaluation perhaps from another file.

    Raises:
        ValueError: a record with a wrong field, or an evaluation of other weights.
    """
    if evaluation is not None and not evaluation.is_file():
        raise ValueError(f"no file {evaluation}; give what onelayer eval --out wrote.")
    path = evaluation or folder / EVALUATION
    measured = _read(EvaluationRecord, path)
    if measured is not None and measured.adapter is None:
        raise ValueError(f"{path} measured the base alone; evaluate it with --adapter {folder}.")
    if measured is not None and measured.adapter and measured.adapter.sha256 != file_digest(folder / WEIGHTS):
        raise ValueError(f"{path} measured another adapter than {folder}: the weights differ.")
    return Records(_read(RunRecord, folder / RUN), measured, _read(LayerRanking, folder / PROFILE))


def _read(kind: type[SomeRecord], path: Path) -> SomeRecord | None:
    return kind.from_file(path) if path.is_file() else None


def write_card(
    folder: Path | str,
    *,
    evaluation: Path | str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    draw: bool = True,
) -> str:
    """Write README.md of the adapter in `folder` from its records, and keep what a person wrote into the one there.

    Args:
        folder: of an adapter of this method, as `onelayer train` or `save_pretrained` wrote it.
        evaluation: what `onelayer eval --out` wrote of this adapter; by default eval.json beside it, if there is one.
        base_model: the base's Hub id, for an adapter that was trained on a local copy.
        license: of the adapter, such as "apache-2.0"; by default the base's, where its card is on this machine.
        draw: draw the pictures that the card shows; else it shows those that are there.

    Returns:
        The text.

    Raises:
        ValueError: no adapter of this method, a damaged one, or records of another adapter.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"no adapter folder at {folder}; give one with {CONFIG}.")
    with output(folder / CARD):
        adapter = open_adapter(folder)
        records = read_records(folder, None if evaluation is None else Path(evaluation))
        config = dict(adapter.config)
        name = config.get("base_model_name_or_path")
        of_folder = bool(records.run and records.run.settings.model.sha256)
        own_license = license or base_license(config)
        if base_model is not None:
            config["base_model_name_or_path"] = base_model
        if draw:
            draw_pictures(records, folder)
        card = model_card(
            config,
            records.run,
            records.evaluation,
            records.profile,
            parameters=count_parameters(adapter),
            local_base=base_model is None and (of_folder or (bool(name) and is_local(str(name)))),
            license=own_license,
            pictures=[picture for picture in (PLOT, REWARDS) if (folder / picture).is_file()],
        )
        there = folder / CARD
        if there.is_file():
            card = merge_cards(card, read_text(there), license)
        write_whole(there, card)
    return card


def count_parameters(adapter: AdapterFile) -> int:
    """Entries of all tensors of an adapter, by its headers."""
    total = 0
    for name in adapter.names:
        record = adapter.sparse.tensors.get(name) if adapter.sparse else None
        total += math.prod(adapter.stored_parts(name)[""].shape if record is None else record.shape)
    return total


def base_license(config: Mapping[str, Any]) -> str | None:
    """The license that the base's own card gives, where that card is on this machine."""
    name = config.get("base_model_name_or_path")
    if not name:
        return None
    folder = Path(str(name)).expanduser() if is_local(str(name)) else cached_base(dict(config))
    if folder is None or not (folder / CARD).is_file():
        return None
    found = split_card(read_text(folder / CARD))[0].get("license")
    return found if isinstance(found, str) else None


def draw_pictures(records: Records, folder: Path) -> list[str]:
    """Draw the layer profile and the reward curve that the records hold into `folder`; their names."""
    from peft_onelayer.report.plots import plot_ranking, plot_rewards

    drawn = []
    if profile := records.profile:
        title = f"{profile.method} on {profile.task}, each block of {profile.num_layers}"
        plot_ranking(profile, folder / PLOT, title)
        drawn.append(PLOT)
    if records.run and records.rewards:
        settings = records.run.settings
        title, results = f"{settings.algorithm} on {settings.source.name}", records.run.results
        plot_rewards(records.rewards, folder / REWARDS, title, steps=results.reward_steps if results else None)
        drawn.append(REWARDS)
    return drawn
