"""transformers' Trainer and TRL's trainers on two processes: they train, agree, and save once."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tuner.helpers import masters, same

from distributed.launch import run_on_two
from models import build

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainers")
    run_on_two(Path(__file__).with_name("trainer_worker.py"), folder)
    return folder


@pytest.mark.more
@pytest.mark.parametrize("kind", ["trainer", "sft", "grpo"])
def test_trains_on_two_processes_and_saves_once(folder, kind):
    found = torch.load(folder / "trainers.pt")[kind]
    assert found["wrapper"] == "DistributedDataParallel" and found["base_unchanged"]
    trained = found["weights"][0]
    assert same(trained, found["weights"][1]) and len(trained) == 11
    assert not any(torch.equal(w, found["before"][name]) for name, w in trained.items())

    written = {path.name for path in (folder / kind / "process-0").rglob("*") if path.is_file()}
    assert written >= ADAPTER_FILES
    assert not [path for path in (folder / kind / "process-1").rglob("*adapter*") if path.is_file()]
    for saved in ("adapter", "checkpoint-2"):
        path = folder / kind / "process-0" / saved
        assert {file.name for file in path.iterdir()} >= ADAPTER_FILES
        assert len(load_file(path / "adapter_model.safetensors")) == 11
        loaded = PeftModel.from_pretrained(build(), str(path))
        assert same({name: p.detach() for name, p in masters(loaded).items()}, trained)
