"""Trains against stand-ins of servers, in a process of its own, because TRL looks for vLLM when it is imported.

Usage: python trl_server_run.py FOLDER TRAINER ... [--layer], with the tokenizer in FOLDER. Writes FOLDER/outcomes.json:
for those of `SERVER_CELLS` the outcome of each way, or the traceback of a defect. With --layer `sync_trained_layer` is
called.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from trl_cells import LAYERS, SERVER_CELLS, Cell
from trl_engine import Engine
from trl_runner import COMMON, WAYS, run

from models import build
from peft_onelayer.rl import sync_trained_layer
from peft_onelayer.rl.layer_sync import LayerSync

PUSH = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]


def train(cell: Cell, way: str, folder: Path, layer: bool) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The policy's server starts with other weights than the policy's, so that only a push can make them right.
    student = Engine(build(num_layers=LAYERS, seed=3), tokenizer.eos_token_id, parts=layer)
    teacher = Engine(build(num_layers=LAYERS, seed=7), tokenizer.eos_token_id)
    urls = {
        "vllm_server_base_url": student.url,
        "teacher_server_urls": {"default": teacher.url},
        "teacher_model_server_url": teacher.url,
    }
    options: dict[str, Any] = {name: url for name, url in urls.items() if name in cell.config.__dataclass_fields__}

    syncs: list[LayerSync] = []

    def prepare(trainer) -> None:
        if layer:
            syncs.append(sync_trained_layer(trainer))

    def examine(trainer) -> None:
        assert teacher.asked == ("teacher_server_urls" in options or "teacher_model_server_url" in options)
        if not cell.by_name:
            return
        pushes = [call for call in student.calls if call in PUSH]
        assert pushes == PUSH * (1 + COMMON["max_steps"]), pushes  # at the start and after each step
        everything = {name for name, _ in student.model.named_parameters()}
        assert not syncs or [set(names) == everything for names in student.sent] == [True, False, False]
        assert [push.why for sync in syncs for push in sync.pushes] == ["first", "changes", "changes"] * len(syncs)
        merged = dict(trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().named_parameters())
        served = dict(student.model.named_parameters())
        assert merged.keys() == served.keys() and all(torch.equal(served[name], merged[name]) for name in merged)
        # The server's probabilities of what it sampled are the trainer's own.
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert bool(kl) == (cell.name == "AsyncGRPOTrainer") and all(abs(first) < 1e-6 for first in kl[:1])

    return run(cell, {}, way, torch.float32, tokenizer, folder / way / cell.name, examine, prepare, **options)


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.cuda.get_device_name = lambda device: "cpu"  # all that the asynchronous trainers want a GPU for
    outcomes: dict[str, dict[str, str]] = {}
    for cell in SERVER_CELLS:
        for way in WAYS if cell.name in names else ():
            try:
                outcome = train(cell, way, folder, "--layer" in names)
            except Exception:
                outcome = traceback.format_exc()
            outcomes.setdefault(cell.name, {})[way] = outcome
    (folder / "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
