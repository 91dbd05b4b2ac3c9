"""Fetches an adapter from the Hub, and checks it before it is called one.

Only the files that `push` publishes are fetched, by name; nothing is unpickled.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from peft_onelayer.adapter.reader import AdapterFile, open_adapter, read_config
from peft_onelayer.adapter.validation import check_tensors
from peft_onelayer.records.files import (
    CARD,
    CONFIG,
    PROFILE,
    RECORD_LIMIT,
    RUN,
    WEIGHTS,
    check_folder,
    file_digest,
    output,
    read_text,
    staged_directory,
)
from peft_onelayer.records.hub_errors import HubError, hub_errors
from peft_onelayer.records.locate import cached_base

from .card import PLOT, REWARDS
from .card_text import own_text
from .push import RESULTS

FILES = (CONFIG, WEIGHTS, CARD, PROFILE, PLOT, REWARDS, RUN, RESULTS)


@dataclass(frozen=True)
class Pull:
    """An adapter that was fetched; `to_json` is what `onelayer pull --json` prints.

    Attributes:
        repo_id: where it is from.
        adapter: the adapter, opened in its new folder.
        commit: the commit it is from.
        values_checked: whether every value is known to be what was published; False for a sparse adapter whose base is
            not in the Hub's cache, whose digests are compared when it is loaded.
    """

    repo_id: str
    adapter: AdapterFile
    commit: str
    values_checked: bool

    @property
    def files(self) -> list[str]:
        """Paths of the files in the new folder, sorted."""
        folder = self.adapter.folder
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "onelayer-pull-1",
            "repo_id": self.repo_id,
            "folder": str(self.adapter.folder),
            "base_model": self.adapter.config.get("base_model_name_or_path"),
            "layers": self.adapter.layers,
            "num_layers": self.adapter.config["num_layers"],
            "tensors": len(self.adapter.names),
            "encoding": self.adapter.encoding,
            "commit": self.commit,
            "values_checked": self.values_checked,
            "files": self.files,
        }


def pull_adapter(repo_id: str, folder: Path | str, *, revision: str | None = None) -> Pull:
    """Fetch an adapter of this method into a new folder.

    The digests of large files are compared with the Hub's, and every tensor is read and checked, before `folder`
    appears. An interrupted download goes on where it stopped, from the Hub's cache.

    Args:
        repo_id: the repository.
        folder: a new or empty folder, or one that holds an earlier pull of this repository as it was written.
        revision: branch, tag or commit; by default "main".

    Returns:
        The adapter in `folder`, and what was checked.

    Raises:
        ValueError: the repository holds no adapter of this method, or a damaged one (`HubError` for what the Hub
            refuses, `TargetError` for a folder that cannot be used).
    """
    folder = Path(folder)
    check_folder(folder, _is_pulled)
    with output(folder):
        return _pull(repo_id, folder, revision)


def _pull(repo_id: str, folder: Path, revision: str | None) -> Pull:
    with hub_errors(f"pull {repo_id}", repo_id):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        there = {file.rfilename: file for file in info.siblings or [] if file.rfilename in FILES}
        for name in (CONFIG, WEIGHTS):
            if name not in there:
                raise HubError(
                    f"cannot pull {repo_id}: it holds no {name}, so it is no adapter that can be loaded safely."
                )
        for name, file in there.items():
            if name != WEIGHTS and (file.size or 0) > RECORD_LIMIT:
                raise HubError(f"cannot pull {repo_id}: its {name} has {file.size:,} bytes, which is no such file.")
        # The commit, not the branch, so that all files belong together.
        cached = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=[*there]))
    for name, file in there.items():
        if file.lfs and file_digest(cached / name) != file.lfs.sha256:
            raise HubError(
                f"cannot pull {repo_id}: {name} arrived damaged (its SHA-256 is not the Hub's); delete "
                f"{cached.parent.parent} and try again."
            )
    adapter = open_adapter(cached)
    _, known = check_tensors(adapter, cached_base(adapter.config))
    _check_replaced(repo_id, folder, cached.parent)
    with staged_directory(folder, _is_pulled) as staged:
        for name in there:
            (staged / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(cached / name, staged / name)
    return Pull(repo_id, open_adapter(folder), info.sha or "", known)


def _check_replaced(repo_id: str, folder: Path, snapshots: Path) -> None:
    """Raise ValueError for a file in `folder` that no pull of this repository wrote, such as a card with text of one's
    own or an adapter of one's own; what onelayer writes into a card is no change.

    Args:
        snapshots: the commits of the repository in the Hub's cache.
    """
    for name in FILES:
        there, fetched = folder / name, [path for path in snapshots.glob(f"*/{name}") if path.is_file()]
        if not there.is_file():
            continue
        if name == CARD:
            known = own_text(read_text(there)) in ["", *(own_text(read_text(path)) for path in fetched)]
        else:
            known = file_digest(there) in map(file_digest, fetched)
        if not known:
            raise ValueError(
                f"{there} is not what an earlier pull of {repo_id} wrote; choose a new output folder, or move it away "
                "(nothing was changed)."
            )


def _is_pulled(folder: Path) -> bool:
    """Whether the folder holds nothing but what a pull writes."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    try:
        read_config(folder)
    except ValueError:
        return False
    return found <= set(FILES)
