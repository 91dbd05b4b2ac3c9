"""What is printed: on narrow terminals, of what is not known, and what to do next."""

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

import pytest
from rich.console import Console
from run_records import RECORD

from onelayer_cli import _output
from onelayer_cli._figures import print_run
from onelayer_cli._output import print_table
from peft_onelayer.records.run import RunResults
from peft_onelayer.rl.training import _tokens_counted

FOLDER = str(files("peft_onelayer") / "demo_model")
HEADER = ["", "n", "base", "adapter", "difference"]
ROW = ["avg@4", "256", "0.1250 ± 0.0668", "0.0312 ± 0.0312", "-0.0938 ± 0.0457"]


@pytest.mark.parametrize(("width", "tables"), [(25, 0), (30, 4), (60, 2), (100, 1)])
def test_a_narrow_terminal_loses_nothing(capsys, monkeypatch, width, tables):
    narrow = lambda **options: Console(width=width, force_terminal=True, color_system=None, **options)  # noqa: E731
    monkeypatch.setattr(_output, "Console", narrow)
    print_table("results", HEADER, [ROW])
    out = capsys.readouterr().out
    assert out.count("┏") == tables and out.count("│ avg@4") == tables
    assert all(cell in out for cell in [*HEADER, *ROW, "results"])
    assert all(len(line) <= width for line in out.splitlines()) == bool(tables)


@pytest.mark.parametrize(("generated", "trained"), [(0, 0), (0, 1234), (5678, 1234)])
def test_tokens_that_were_not_counted_are_not_shown_as_0(capsys, tmp_path, generated, trained):
    results = RunResults(steps=2, losses=[0.7, 0.6], tokens_generated=generated, tokens_trained=trained)
    print_run(dataclasses.replace(RECORD, results=results), tmp_path)
    out = capsys.readouterr().out
    assert ("tokens generated" in out) == bool(generated) and ("tokens trained on" in out) == bool(trained)
    assert not trained or "1,234" in out


def test_what_offline_trainers_counted_adds_up_over_a_resumption():
    logs = [{"num_tokens": 10.0}, {"num_tokens": 25.0}, {"loss": 1.0}, {"num_tokens": 8.0}, {"num_tokens": 20.0}]
    assert _tokens_counted(logs) == 45 and _tokens_counted([{"loss": 1.0}]) == 0


def test_a_prior_needs_no_task_and_no_weights(onelayer, tmp_path):
    code, lines, out = onelayer("probe", FOLDER, "--method", "prior", "--json")
    assert code == 0 and json.loads(out)["task"] == "" and json.loads(out)["pick"] == 5, lines
    code, _, out = onelayer("probe", FOLDER, "--method", "prior")
    assert code == 0 and "--task TASK --layer 5" in out


def test_the_demo_models_own_task_can_be_read_by_it():
    from transformers import AutoTokenizer

    from peft_onelayer import load_task

    task = load_task(str(Path(__file__).parents[2] / "examples" / "own_task" / "sevens.py"))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    train, test = task.rows("train", 200, 0), task.rows("test", 200, 0)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for row in (*train, *test):
        assert tokenizer.decode(tokenizer(row["prompt"]).input_ids) == row["prompt"]
    assert task.reward(prompts=["p"] * 3, completions=["0770", "7", ""]) == [0.5, 1.0, 0.0]
