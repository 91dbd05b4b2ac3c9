"""What run.json says of the base model, of the machine, and of a trainer's configuration."""

from __future__ import annotations

import functools
import json
import os
import platform
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from peft_onelayer.records.files import model_digests
from peft_onelayer.records.privacy import without_secrets
from peft_onelayer.records.run import BaseModel
from peft_onelayer.tuner import find_decoder_stack
from peft_onelayer.tuner.base import commit_hash

PACKAGES = ("peft-onelayer", "peft", "trl", "transformers", "torch", "accelerate", "datasets")
# Where a run is kept and how it reports is no part of what it is.
NOT_SETTINGS = {"output_dir", "run_name", "report_to", "disable_tqdm", "save_total_limit", "hub_token", "push_to_hub"}


def describe_model(model: PreTrainedModel) -> BaseModel:
    """The base: name, Hub commit or, for a folder, SHA-256 of its configuration and weights; dtype and sizes."""
    return BaseModel(
        name=model.name_or_path,
        revision=commit_hash(model),
        sha256=model_digests(model.name_or_path),
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=len(find_decoder_stack(model).blocks),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def describe_machine() -> dict[str, Any]:
    """Versions and hardware: on others the same run may round differently."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version()} | _versions(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "machine": f"{platform.system()} {platform.machine()}",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
    }


@functools.cache  # reading a package's metadata takes milliseconds, and a sweep in one process asks for every run
def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def describe_config(config: TrainingArguments) -> dict[str, Any]:
    """All fields of a TRL configuration as JSON values, without those of `NOT_SETTINGS` and without secrets."""
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_SETTINGS}
    return without_secrets(json.loads(json.dumps(fields, default=str, sort_keys=True)))


def is_main_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
