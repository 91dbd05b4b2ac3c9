"""Layer profiles: how much each block of a model is worth, as shipped with the package or published beside an adapter.

It does not know how a profile was measured, and loads no model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

FORMATS = ("onelayer-profile-1", "onelayer-ranking-1", "onelayer-sweep-1")  # shipped, of a probe, of a sweep
FILE = "layer_profile.json"
LIMIT = 2**20  # bytes; a model of 100 layers takes 10,000


@dataclass(frozen=True)
class LayerProfile:
    """What is known of the blocks of one model.

    Args:
        model: the base model's Hub id.
        num_layers: number of blocks.
        measure: "contribution" for C(k) = (S_k - S_base) / (S_full - S_base) of arXiv 2607.01232; else the name of the
            probe that made the scores.
        scores: one per block, higher is better; None where not measured.
        partial: whether some blocks were not measured.
        base: score of the untrained model, in the source's units; None where not known.
        full: score after training every parameter, likewise.
        algorithm: what the blocks were trained with, where known.
        data: what they were trained on, where known.
        source: where the figures come from: a paper, a file, or a repository on the Hub with its commit.
    """

    model: str
    num_layers: int
    measure: str
    scores: list[float | None]
    partial: bool
    base: float | None
    full: float | None
    algorithm: str | None
    data: str | None
    source: str


def shipped_profiles() -> list[str]:
    """The models whose profile comes with the package.

    >>> "Qwen/Qwen3-1.7B-Base" in shipped_profiles()
    True
    """
    return sorted(path.name.removesuffix(".json").replace("--", "/") for path in _shipped().iterdir())


def load_profile(name: str, *, revision: str | None = None) -> LayerProfile:
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
    shipped = _shipped() / (name.replace("/", "--") + ".json")
    if revision is None and name in shipped_profiles():
        return parse_profile(shipped.read_text(), name)
    path = Path(name).expanduser()
    path = path / FILE if path.is_dir() else path
    if path.is_file():
        return parse_profile(_read(path), str(path))
    if path.name == FILE or name.startswith((".", "/", "~")) or name.count("/") != 1:
        known = ", ".join(shipped_profiles())
        raise ValueError(f"no layer profile {name}: give one of {known}, a {FILE}, or the Hub id of an adapter.")
    path, commit = _download(name, revision)
    return parse_profile(_read(path), f"{name} at {commit[:12]}")


def parse_profile(text: str, source: str) -> LayerProfile:
    """Read a shipped profile or a layer_profile.json.

    Args:
        source: what `LayerProfile.source` says of a file that names none.

    Raises:
        ValueError: none of `FORMATS`, or scores that do not fit the number of layers.
    """
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} holds no layer profile: it is not JSON ({str(error)[:80]}).") from None
    kind = data.get("format") if isinstance(data, dict) else None
    if kind not in FORMATS:
        raise ValueError(f'{source} holds no layer profile: expected a "format" of {", ".join(FORMATS)}.')
    contribution = data.get("contribution")
    scores = data.get("scores") if contribution is None else contribution
    depth = data.get("num_layers")
    if not isinstance(scores, list) or type(depth) is not int or len(scores) != depth:
        raise ValueError(f"{source} holds no layer profile: it needs num_layers and one score for each layer.")
    if any(not _is_score(score) for score in scores):
        raise ValueError(f"{source} holds a score that is neither a finite number nor null.")
    measure = data.get("method") if contribution is None else "contribution"
    if not isinstance(measure, str) or not isinstance(data.get("model"), str):
        raise ValueError(f"{source} holds no layer profile: it names no model, or not how it was measured.")
    return LayerProfile(
        model=data["model"],
        num_layers=depth,
        measure=measure,
        scores=scores,
        partial=any(score is None for score in scores),
        base=data.get("base"),
        full=data.get("full"),
        algorithm=data.get("algorithm"),
        data=data.get("data") or data.get("task"),
        source=data.get("source") or source,
    )


def _is_score(score: object) -> bool:
    return score is None or (type(score) in (int, float) and math.isfinite(score))  # type: ignore[arg-type]


def _read(path: Path) -> str:
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, too many for a layer profile.")
    return path.read_text(errors="replace")


def _shipped() -> Any:
    return files("peft_onelayer") / "profiles"


def _download(repo_id: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import HfApi, hf_hub_download

    from .errors import HubError, hub_errors

    with hub_errors(f"read the layer profile of {repo_id}", repo_id):
        info = HfApi().model_info(repo_id, revision=revision)
        if FILE not in {file.rfilename for file in info.siblings or []}:
            raise HubError(f"cannot read the layer profile of {repo_id}: it holds no {FILE}.")
        return Path(hf_hub_download(repo_id, FILE, revision=info.sha)), info.sha or ""
