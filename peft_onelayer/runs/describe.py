"""run.json: what is needed to repeat a training run, and to tell whether a resumed one is the same run.

It does not know how a run is made; the caller adds the command, the data, the layers and the results.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from peft_onelayer.tuner import find_decoder_stack
from peft_onelayer.tuner.model import commit_hash

FORMAT = "onelayer-run-1"
PACKAGES = ("peft-onelayer", "peft", "trl", "transformers", "torch", "accelerate", "datasets")
# Where a run is kept and how it reports is no part of what it is.
NOT_SETTINGS = {"output_dir", "run_name", "report_to", "disable_tqdm", "save_total_limit", "hub_token", "push_to_hub"}


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """The base: name, Hub commit or, for a folder, SHA-256 of its configuration and weights; dtype and sizes."""
    folder = Path(model.name_or_path)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))] if folder.is_dir() else []
    return {
        "name": model.name_or_path,
        "revision": commit_hash(model),
        "sha256": {path.name: file_digest(path) for path in files},
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_layers": len(find_decoder_stack(model).blocks),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def describe_machine() -> dict[str, Any]:
    """Versions and hardware: on others the same run may round differently."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "machine": f"{platform.system()} {platform.machine()}",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
    }


def describe_config(config: TrainingArguments) -> dict[str, Any]:
    """All fields of a TRL configuration as JSON values, without those of `NOT_SETTINGS`."""
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_SETTINGS}
    return json.loads(json.dumps(fields, default=str, sort_keys=True))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The entries in which two nested dicts differ, as "name: old -> new".

    >>> differences({"seed": 0, "config": {"beta": 0.0}}, {"seed": 1, "config": {"beta": 0.0}})
    ['seed: 0 -> 1']
    """
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a} -> {b}")
    return found
