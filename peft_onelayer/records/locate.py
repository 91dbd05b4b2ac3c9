"""Finds the folder that a name stands for: one on this machine, or a copy of a Hub repository in the Hub's cache.

It does not look at what the files hold.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "run.json", "layer_profile.json", "README.md")
# The same weights once more in other formats; `fnmatch` patterns of paths relative to the model's folder.
OTHER_FORMATS = (
    *("pytorch_model*", "tf_model*", "flax_model*", "rust_model*", "consolidated*", "original/*", "onnx/*"),
    *("*.gguf", "*.pth", "*.onnx", "*.onnx_data"),
)


def adapter_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter. From the Hub only the files of `ADAPTER_FILES` are fetched, never the base.

    Raises:
        ValueError: neither a folder here nor found on the Hub.
    """
    folder = _folder(name, revision, "an adapter", allow=ADAPTER_FILES)
    inside = folder / "adapter"  # where `onelayer demo` puts it
    if not (folder / ADAPTER_FILES[0]).exists() and (inside / ADAPTER_FILES[0]).exists():
        raise ValueError(f"{folder} holds no {ADAPTER_FILES[0]}; did you mean {inside}?")
    return folder


def base_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a base model. From the Hub its safetensors files and all others but `OTHER_FORMATS` are fetched.

    Raises:
        ValueError: neither a folder here nor found on the Hub.
    """
    return _folder(name, revision, "a model", ignore=OTHER_FORMATS)


def hub_identity(folder: Path) -> tuple[str | None, str | None]:
    """(Hub id, commit) of a folder as far as huggingface_hub left a trace of them: in its cache, or by a download into
    a local folder, which records the commit alone."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/"), folder.name
    trace = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    return None, trace.read_text().split("\n")[0] if trace.is_file() else None


def _folder(
    name: str | Path, revision: str | None, what: str, allow: Sequence[str] | None = None, ignore: Sequence[str] = ()
) -> Path:
    folder = Path(name).expanduser()
    text = str(name)
    if folder.exists() or text.startswith((".", "~", os.sep)) or text.count("/") > 1:
        if not folder.is_dir():
            raise ValueError(f"no folder at {folder}; give the folder of {what} or its id on the Hub.")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(
            snapshot_download(
                text,
                revision=revision,
                allow_patterns=None if allow is None else list(allow),
                ignore_patterns=list(ignore) or None,
            )
        )
    except (OSError, ValueError, HTTPError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{text} is neither a folder here nor {what} found on the Hub: {reason}") from error
