"""Layer profiles: those that the package ships, and those published beside an adapter."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from peft_onelayer.records.files import PROFILE, read_text
from peft_onelayer.records.locate import is_local
from peft_onelayer.records.ranking import LayerRanking


def shipped_profiles() -> list[str]:
    """The models whose profile comes with the package.

    >>> "Qwen/Qwen3-1.7B-Base" in shipped_profiles()
    True
    """
    return sorted(path.name.removesuffix(".json").replace("--", "/") for path in _shipped().iterdir())


def load_profile(name: str, *, revision: str | None = None) -> LayerRanking:
    """The layer profile of a model that the package ships, or the one published beside an adapter.

    Args:
        name: a model of `shipped_profiles()`; a layer_profile.json or a folder that holds one; or else the id of a
            repository on the Hub that does.
        revision: branch, tag or commit there.

    Raises:
        ValueError: no such profile, or a file that is none (`HubError` where the Hub could not be asked).

    >>> profile = load_profile("Qwen/Qwen3-1.7B-Base")
    >>> max(range(profile.num_layers), key=lambda layer: profile.scores[layer])
    10
    """
    if revision is None and name in shipped_profiles():
        shipped = _shipped() / (name.replace("/", "--") + ".json")
        return LayerRanking.from_json(shipped.read_text(encoding="utf-8"), name)
    path = Path(name).expanduser()
    path = path / PROFILE if path.is_dir() else path
    if path.is_file():
        return LayerRanking.from_file(path)
    if is_local(name) or name.count("/") != 1:
        known = ", ".join(shipped_profiles())
        raise ValueError(f"no layer profile {name}: give one of {known}, a {PROFILE}, or the Hub id of an adapter.")
    path, commit = _download(name, revision)
    source = f"{name} at {commit[:12]}"
    ranking = LayerRanking.from_json(read_text(path), source)
    return replace(ranking, source=ranking.source or source)


def _shipped() -> Any:
    return files("peft_onelayer") / "profiles"


def _download(repo_id: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import HfApi, hf_hub_download

    from peft_onelayer.records.hub_errors import HubError, hub_errors

    with hub_errors(f"read the layer profile of {repo_id}", repo_id):
        info = HfApi().model_info(repo_id, revision=revision)
        if PROFILE not in {file.rfilename for file in info.siblings or []}:
            raise HubError(f"cannot read the layer profile of {repo_id}: it holds no {PROFILE}.")
        return Path(hf_hub_download(repo_id, PROFILE, revision=info.sha)), info.sha or ""
