"""`onelayer train` by torchrun: the first process writes and speaks, and the run goes on from its folder alone."""

import json
from importlib.resources import files

import pytest

from distributed.launch import torchrun

BASE = files("peft_onelayer") / "demo_model"


@pytest.mark.more
def test_a_run_on_two_processes_and_its_continuation(tmp_path):
    command = tmp_path / "command.py"
    command.write_text("from onelayer_cli.main import main\nmain()\n")
    out = tmp_path / "run"
    said = torchrun(
        *(command, "train", str(BASE), "--task", "arithmetic", "--layer", "5", "--steps", "2"),
        *("--prompts", "4", "--learning-rate", "3e-3", "--out", out),
    )
    assert said.count("training block 5 ...") == 1
    said = torchrun(command, "train", "--resume", "--steps", "3", "--out", out)
    assert said.count("going on from checkpoint-2") == said.count("3 steps instead of 2") == 1
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "finished" and run["machine"]["processes"] == 2
    assert [line["reward"] for line in log] == run["results"]["rewards"]
