"""Finds the folder that a name stands for: one on this machine, or a copy of a Hub repository in the Hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import CARD, CONFIG, PROFILE, RUN, WEIGHTS, read_fields
from .text import one_line, printable

ADAPTER_FILES = (CONFIG, WEIGHTS, RUN, PROFILE, CARD)  # of an adapter's repository, what is fetched
# The same weights once more in other formats; `fnmatch` patterns of paths relative to the model's folder.
OTHER_FORMATS = (
    *("pytorch_model*", "tf_model*", "flax_model*", "rust_model*", "consolidated*", "original/*", "onnx/*"),
    *("*.gguf", "*.pth", "*.onnx", "*.onnx_data"),
)


def is_local(name: str) -> bool:
    """Whether a name is that of a folder, there or not, rather than of a repository on the Hub.

    >>> is_local("Qwen/Qwen3-1.7B-Base"), is_local("/models/qwen"), is_local("./qwen"), is_local("a/b/c")
    (False, True, True, True)
    """
    written_so = name.startswith((".", "~", "/", os.sep)) or name.count("/") > 1 or "\\" in name
    return written_so or Path(name).expanduser().exists()


def check_revision(name: str | Path, revision: str | None, option: str = "--revision") -> None:
    """Raise ValueError for a revision that was asked for of a folder on this machine, which has only one.

    >>> check_revision("./qwen", "main")
    Traceback (most recent call last):
    ValueError: --revision main is for a repository on the Hub, and ./qwen is a folder here; leave it out.
    """
    if revision is not None and is_local(str(name)):
        raise ValueError(
            f"{option} {printable(revision, 80)} is for a repository on the Hub, and {name} is a folder here; leave it "
            "out."
        )


def last_part(path: str) -> str:
    """The last part of a path of any system.

    >>> last_part("/home/me/models/qwen/")
    'qwen'
    """
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path[:1]


def check_model_name(name: str, revision: str | None = None) -> None:
    """Raise ValueError for the name of a folder that is not there or holds no model, or for a folder's revision."""
    folder = Path(name).expanduser()
    if not is_local(name):
        return
    if not folder.is_dir():
        raise ValueError(f"no model folder at {folder}; give a folder with config.json, or a model id on the Hub.")
    if not (folder / "config.json").is_file():
        if holds_adapter(name):
            base = printable(read_fields(folder / CONFIG).get("base_model_name_or_path"))
            raise ValueError(f"{folder} is an adapter of {base} and no model; give the base model here.")
        raise ValueError(f"{folder} holds no config.json, so it is not a model folder.")
    check_revision(name, revision)


def check_order(base: str | Path, adapter: str | Path, command: str) -> None:
    """Raise ValueError for an adapter in the place of the base and a model in the place of the adapter.

    Args:
        command: with {base} and {adapter} in their right places.
    """
    first, second = Path(base).expanduser(), Path(adapter).expanduser()
    if (first / CONFIG).is_file() and (second / "config.json").is_file() and not (second / CONFIG).exists():
        right = command.replace("{base}", str(adapter)).replace("{adapter}", str(base))
        raise ValueError(f"{base} is an adapter and {adapter} a model; the base comes first: {right}")


def check_output_last(first: str, out: Path, command: str) -> None:
    """Raise ValueError for an output that holds an adapter or a model, and a first name that is nothing yet.

    Args:
        command: in its right order.
    """
    kind = "an adapter" if (out / CONFIG).is_file() else "a model" if (out / "config.json").is_file() else ""
    if kind and (is_local(first) or "/" not in first) and not Path(first).expanduser().exists():
        raise ValueError(f"{out} is {kind} and {first} is not there; the output comes last: {command}")


def base_elsewhere(folder: Path) -> str | None:
    """The base that the adapter in `folder` names, where it was a folder when the adapter was trained and is none here.

    `push` leaves the last part of a folder's path, and in run.json its digests.
    """
    base = read_fields(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or Path(base).expanduser().is_dir():
        return None
    if is_local(base):
        return base
    try:
        digests = read_fields(folder / RUN)["settings"]["model"]["sha256"]
    except (ValueError, KeyError, TypeError):
        return None
    return base if "/" not in base and digests else None


def check_base_of(folder: Path, instead: str) -> None:
    """Raise ValueError where the base that the adapter in `folder` names was a folder that is not here.

    Args:
        instead: what to type then, with {base} in the place of the base.
    """
    if base := base_elsewhere(folder):
        raise ValueError(
            f"{folder} is an adapter of the model in a folder {printable(base)}, and no such folder is here; name the "
            f"model: {instead.replace('{base}', path_to(base))}"
        )


def path_to(base: str) -> str:
    """A base that was a folder elsewhere, in a command to be completed."""
    return f"PATH/TO/{printable(last_part(base))}"


def adapter_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter. From the Hub only the files of `ADAPTER_FILES` are fetched, never the base.

    Raises:
        ValueError: neither a folder here nor found on the Hub.
    """
    text = str(name)
    if "/" not in text and not is_local(text):  # no adapter on the Hub is without an owner
        raise ValueError(f"no adapter folder at {text}; give a folder with {CONFIG}, or a Hub id such as me/{text}.")
    folder = find_folder(name, revision, "an adapter", allow=ADAPTER_FILES)
    inside = folder / "adapter"  # where `onelayer demo` puts it
    if not (folder / CONFIG).exists() and (inside / CONFIG).exists():
        raise ValueError(f"{folder} holds no {CONFIG}; did you mean {inside}?")
    return folder


def check_adapter_folder(folder: Path, name: str) -> None:
    """Raise ValueError unless the two files that make an adapter are in `folder`: an adapter_model.bin would be
    unpickled."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            inside = folder / "adapter"  # where `onelayer demo` puts it
            hint = f"; did you mean {inside}?" if (inside / file).is_file() else "."
            model = file == CONFIG and (folder / "config.json").is_file()
            what = "a model and no adapter" if model else "not an adapter that can be loaded"
            raise ValueError(f"{name} holds no {file}, so it is {what}{hint}")


def holds_adapter(name: str) -> bool:
    """Whether a folder or a repository on the Hub holds an adapter's configuration; False where the Hub cannot say."""
    if is_local(name):
        return (Path(name).expanduser() / CONFIG).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    from .hub_errors import no_vain_retries

    try:
        with no_vain_retries():
            hf_hub_download(name, CONFIG)
    except (OSError, ValueError, HTTPError):  # not there, no such repository, or no Hub: what loads it says which
        return False
    return True


def base_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a base model. From the Hub its safetensors files and all others but `OTHER_FORMATS` are fetched.

    Raises:
        ValueError: neither a folder here nor found on the Hub.
    """
    return find_folder(name, revision, "a model", ignore=OTHER_FORMATS)


def cached_base(config: dict[str, Any]) -> Path | None:
    """The base that adapter_config.json names, where the Hub's cache on this machine has it."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name or is_local(name) or not isinstance(revision, str | None):
        return None
    return cached_model(name, revision)


def cached_model(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model on the Hub, where the Hub's cache on this machine has its config.json and all weights that
    transformers loads; None where it has a part of them."""
    folder = cached_snapshot(name, revision)
    return folder if folder is not None and weight_files(folder) else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model that transformers loads; [] where one is missing or none is named."""
    from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE

    files = [folder / SAFETENSORS_SINGLE_FILE]
    if not files[0].is_file():
        try:
            files = sorted(
                {folder / file for file in read_fields(folder / SAFETENSORS_INDEX_FILE)["weight_map"].values()}
            )
        except (ValueError, KeyError, AttributeError, TypeError):
            return []
    return files if all(file.is_file() for file in files) else []


def cached_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that a branch, tag or commit of a model on the Hub was when it was last loaded; None for a folder and
    where the Hub's cache holds no config.json of it."""
    folder = cached_snapshot(name, revision)
    return None if folder is None else folder.name


def cached_snapshots(name: str) -> list[Path]:
    """The folders of all commits of a model on the Hub of which the Hub's cache has a file."""
    from huggingface_hub import constants

    if not name or is_local(name):
        return []
    return sorted((Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots").glob("*"))


def cached_snapshot(name: str, revision: str | None = None) -> Path | None:
    """The folder in the Hub's cache where a model's config.json is."""
    from huggingface_hub import try_to_load_from_cache

    if is_local(name):
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name of a repository
        return None
    return Path(found).parent if isinstance(found, str) else None


def hub_identity(folder: Path) -> tuple[str | None, str | None]:
    """(Hub id, commit) of a folder as far as huggingface_hub left a trace of them: in its cache, or by a download into
    a local folder, which records the commit alone."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name
    trace = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    return None, trace.read_text(encoding="utf-8").split("\n")[0] if trace.is_file() else None


def find_folder(
    name: str | Path, revision: str | None, what: str, allow: Sequence[str] | None = None, ignore: Sequence[str] = ()
) -> Path:
    """The folder `name`, or a copy of the repository `name` in the Hub's cache.

    Args:
        what: is looked for, such as "a model", for the message.
        allow: patterns of the files to fetch; None for all but those of `ignore`.

    Raises:
        ValueError: neither a folder here nor found on the Hub.
    """
    folder, text = Path(name).expanduser(), str(name)
    if is_local(text):
        if not folder.is_dir():
            raise ValueError(f"no {what.split()[-1]} folder at {folder}; give a folder, or an id on the Hub.")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    from .hub_errors import hub_reason, no_vain_retries

    try:
        with no_vain_retries():
            found = snapshot_download(
                text,
                revision=revision,
                allow_patterns=None if allow is None else list(allow),
                ignore_patterns=list(ignore) or None,
            )
        return Path(found)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:  # RuntimeError: of hf_xet
        why = hub_reason(error, text) or one_line(error)
        raise ValueError(f"{text} is neither {what} folder here nor found on the Hub: {why}") from error
