"""Training one block of SmolLM2-135M in bfloat16: what gains, what moves, and a run that was killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from told import Told

from peft_onelayer.runs import TrainingSettings, train

from .common import SUMS, moved

pytestmark = pytest.mark.real

BLOCK, RATE = 14, 1e-4
FEW = {"model": None, "chat": False, "layer": BLOCK, "learning_rate": RATE, "eval_problems": 0}


def test_the_race_names_a_block_at_the_default_rate_and_it_gains(ranking, trained):
    assert ranking.pick is not None and ranking.method == "auto"
    kls = ranking.first_step_kl[str(ranking.pick)]
    assert 0.005 <= kls[0] <= 0.05 and ranking.cost["share"] <= 0.25
    difference = trained.record.results.held_out.difference
    assert difference.mean > 3 * difference.standard_error, difference
    assert trained.record.results.verdict.startswith("gained: ")


def test_exactly_the_block_moved(smollm2, trained, tmp_path):
    assert moved(smollm2, trained.folder, tmp_path / "merged") == set(trained.blocks)
    movement = trained.record.results.movement
    assert len(movement.tensors) == 9 * len(trained.blocks)


@pytest.mark.parametrize(
    ("algorithm", "given"),
    [
        ("dr_grpo", {"prompts": 4, "completions": 4}),
        ("dpo", {"pairs_from_task": 16}),
        ("kto", {"pairs_from_task": 16}),
        ("sft", {"pairs_from_task": 16}),
    ],
)
def test_other_algorithms_train_the_block_alone(smollm2, tmp_path, algorithm, given):
    told = Told()
    if "pairs_from_task" in given:  # a completion that did not end is no answer to learn from
        given |= {"sampling": {"generation_kwargs": {"stop_strings": ["\n"]}}}
    settings = {**FEW, "model": smollm2, "task": SUMS, "algorithm": algorithm, "steps": 3, **given}
    run = train(TrainingSettings(**settings, out=tmp_path / "run"), progress=told)
    results = run.record.results
    assert results.steps == 3 and run.record.status == "finished"
    assert moved(smollm2, tmp_path / "run", tmp_path / "merged") == {BLOCK}
    if "pairs_from_task" in given:
        made = [line for line in told.notes if "16 prompts, 128 completions" in line]
        assert len(made) == 1 and len(results.losses) == 3, told.notes
        assert (tmp_path / "run" / "pairs.jsonl").read_text().count("\n") == int(made[0].split()[0])
    else:
        assert len(results.rewards) == 3 and results.tokens_generated > 0
    assert any("of the trained entries" in line or "moved" in line for line in told.notes), told.notes


def test_a_run_that_was_killed_ends_with_the_same_bits(smollm2, tmp_path):
    def command(*arguments):
        return [sys.executable, "-c", "from onelayer_cli.main import main; main()", *map(str, arguments)]

    run = ["train", smollm2, "--task", SUMS, "--plain", "--layer", BLOCK, "--learning-rate", RATE, "--steps", 4]
    run += ["--prompts", 4, "--completions", 4, "--set", "save_steps=1", "--eval-problems", 0]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(*run, "--out", killed), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (killed / "checkpoints" / "checkpoint-2" / "trainer_state.json").exists():
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it was killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "adapter_model.safetensors").exists()
    for arguments in (["train", "--resume", "--out", killed], [*run, "--out", whole]):
        done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (killed, whole))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    records = [json.loads((folder / "run.json").read_text()) for folder in (killed, whole)]
    assert records[0]["resumed_from"] and records[0]["results"]["rewards"] == records[1]["results"]["rewards"]
