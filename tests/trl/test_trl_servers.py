"""The trainers that talk to a server, in a process of their own, against `trl_engine.Engine` on 127.0.0.1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trl_cells import SERVER_CELLS
from trl_runner import WAYS

HERE = Path(__file__).parent


# The asynchronous trainers start one process more each.
@pytest.mark.more
@pytest.mark.parametrize(
    "names",
    [["AsyncGRPOTrainer", "ServerDistillationTrainer", "IWOPDTrainer"], ["AsyncDistillationTrainer"]],
    ids=["AsyncGRPO and synchronous", "AsyncDistillationTrainer"],
)
def test_trainers_with_a_server(tmp_path, chat_tokenizer, record, names):
    chat_tokenizer.save_pretrained(tmp_path)
    # The stand-ins come first on the path: `vllm` and `kernels`, as far as TRL imports them.
    path = os.pathsep.join(map(str, (HERE / "standins", HERE, HERE.parent)))
    run = subprocess.run(
        [sys.executable, HERE / "trl_server_run.py", tmp_path, *names],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert sorted(outcomes) == sorted(names)
    for cell in SERVER_CELLS:
        for way in WAYS if cell.name in names else ():
            record(cell, {}, way, outcomes[cell.name][way])
