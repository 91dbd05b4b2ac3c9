"""The trainers that talk to a server, in a process of their own, against `trl_engine.Engine` on 127.0.0.1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trl_cells import SERVER_CELLS
from trl_runner import WAYS, WORKS

HERE = Path(__file__).parent


def outcomes_of(folder, chat_tokenizer, *arguments) -> dict[str, dict[str, str]]:
    chat_tokenizer.save_pretrained(folder)
    # The stand-ins come first on the path: `vllm` and `kernels`, as far as TRL imports them.
    path = os.pathsep.join(map(str, (HERE / "standins", HERE, HERE.parent)))
    run = subprocess.run(
        [sys.executable, HERE / "trl_server_run.py", folder, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "outcomes.json").read_text())


# The asynchronous trainers start one process more each.
@pytest.mark.more
@pytest.mark.parametrize(
    "names",
    [["AsyncGRPOTrainer", "ServerDistillationTrainer", "IWOPDTrainer"], ["AsyncDistillationTrainer"]],
    ids=["AsyncGRPO and synchronous", "AsyncDistillationTrainer"],
)
def test_trainers_with_a_server(tmp_path, chat_tokenizer, record, names):
    outcomes = outcomes_of(tmp_path, chat_tokenizer, *names)
    assert sorted(outcomes) == sorted(names)
    for cell in SERVER_CELLS:
        for way in WAYS if cell.name in names else ():
            record(cell, {}, way, outcomes[cell.name][way])


@pytest.mark.more
@pytest.mark.parametrize("name", ["AsyncGRPOTrainer", "AsyncDistillationTrainer"])
def test_asynchronous_trainers_that_send_the_trained_block(tmp_path, chat_tokenizer, name):
    """After the first push only tensors of the block are sent, and the server ends with exactly the merged weights."""
    assert outcomes_of(tmp_path, chat_tokenizer, name, "--layer")[name]["peft_config"] == WORKS
