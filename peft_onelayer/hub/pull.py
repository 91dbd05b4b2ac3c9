"""Fetches an adapter from the Hub, and checks it before it is called one.

Only the files that `push` publishes are fetched, by name; nothing is unpickled. It loads no model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from peft_onelayer.adapter.reader import CONFIG, WEIGHTS, AdapterFile, open_adapter
from peft_onelayer.adapter.validation import check_tensors
from peft_onelayer.records.files import check_folder, staged_directory
from peft_onelayer.records.locate import cached_base

from .errors import HubError, hub_errors
from .push import CARD, PLOT, PROFILE, RESULTS, RUN

FILES = (CONFIG, WEIGHTS, CARD, PROFILE, PLOT, RUN, RESULTS)
SMALL_LIMIT = 32 * 2**20  # bytes, of every file but the weights


@dataclass(frozen=True)
class Pull:
    """An adapter that was fetched.

    Args:
        adapter: it, opened in its new folder.
        commit: the commit it is from.
        values_checked: whether every value is known to be what was published; False for a sparse adapter whose base is
            not in the Hub's cache, whose digests are compared when it is loaded.
    """

    adapter: AdapterFile
    commit: str
    values_checked: bool


def pull_adapter(repo_id: str, folder: Path | str, *, revision: str | None = None) -> Pull:
    """Fetch an adapter of this method into a new folder.

    Every file's digest is compared with the Hub's, and every tensor is read and checked, before `folder` appears. An
    interrupted download goes on where it stopped, from the Hub's cache.

    Args:
        repo_id: the repository.
        folder: a new or empty folder, or one that holds an earlier pull.
        revision: branch, tag or commit; by default "main".

    Returns:
        The adapter in `folder`, and what was checked.

    Raises:
        ValueError: the repository holds no adapter of this method, or a damaged one (`HubError` for what the Hub
            refuses, `TargetError` for a folder that cannot be used).
    """
    from peft_onelayer.records.files import file_digest

    folder = Path(folder)
    check_folder(folder, _is_pulled)
    with hub_errors(f"pull {repo_id}", repo_id):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        there = {file.rfilename: file for file in info.siblings or [] if file.rfilename in FILES}
        for name in (CONFIG, WEIGHTS):
            if name not in there:
                raise HubError(
                    f"cannot pull {repo_id}: it holds no {name}, so it is no adapter that can be loaded safely."
                )
        for name, file in there.items():
            if name != WEIGHTS and (file.size or 0) > SMALL_LIMIT:
                raise HubError(f"cannot pull {repo_id}: its {name} has {file.size:,} bytes, which is no such file.")
        # The commit, not the branch, so that all files belong together.
        cached = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=[*there]))
    with staged_directory(folder, _is_pulled) as staged:
        for name, file in there.items():
            (staged / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(cached / name, staged / name)
            if file.lfs and file_digest(staged / name) != file.lfs.sha256:
                raise HubError(
                    f"cannot pull {repo_id}: {name} arrived damaged (its SHA-256 is not the Hub's); delete "
                    f"{cached.parent.parent} and try again."
                )
        adapter = open_adapter(staged)
        _, known = check_tensors(adapter, cached_base(adapter.config))
    return Pull(open_adapter(folder), info.sha or "", known)


def _is_pulled(folder: Path) -> bool:
    """Whether the folder holds nothing but what a pull writes."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return found <= set(FILES) and isinstance(config, dict) and config.get("peft_type") == "SINGLE_LAYER"
