"""The benchmark for one GPU: its rows are kept whatever fails, and at a tiny size all of it runs on a CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config
from trl import GRPOConfig

from peft_onelayer.runs.memory import Batches, estimate_memory, lora

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def gpu_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_rows

    yield gpu_rows
    del sys.modules["gpu_rows"]


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_part_that_fails_hangs_or_comes_too_late_is_a_row_and_the_next_goes_on(gpu_rows, tmp_path, capsys):
    rows = gpu_rows.Rows(tmp_path / "out" / "rows.jsonl", seconds=30)

    def fail():
        raise SystemExit("no such kernel\nand more")

    rows.check("part", "fails", 0, 10, fail)
    rows.check("part", "hangs", 0, 0.05, lambda: time.sleep(20))
    rows.check("part", "comes too late", 60, 60, lambda: {"ok": True})
    rows.check("part", "gives nothing", 0, 10, lambda: None)
    rows.check("part", "works", 0, 10, lambda: {"ok": True, "figure": 2})
    with rows.failures_as_rows("parts", "broken"):
        raise ValueError("not this one")
    found = written(tmp_path / "out" / "rows.jsonl")
    assert [row["case"] for row in found] == ["fails", "hangs", "comes too late", "works", "broken"]
    assert [row.get("ok") for row in found] == [False, False, None, True, False]
    assert found[0]["error"] == "SystemExit: no such kernel" and found[0]["where"].startswith("test_gpu_benchmark.py:")
    assert found[1]["error"].startswith("OutOfTimeError: stopped after") and found[3]["figure"] == 2
    assert "needs about 60" in found[2]["skipped"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found
    assert rows.left() < 30


def test_the_reason_behind_a_colon_is_in_the_row(gpu_rows):
    assert gpu_rows.first_line("backend='inductor' raised:\nOutOfTimeError: stopped after 90 s\n\nmore") == (
        "backend='inductor' raised: OutOfTimeError: stopped after 90 s"
    )
    assert gpu_rows.first_line("no such kernel\nand more") == "no such kernel"
    assert gpu_rows.first_line(" \n") == ""


def test_the_table_relates_rows_to_the_baseline_of_their_group(gpu_rows):
    rows = [
        {
            "part": "step",
            "group": "on",
            "case": "full",
            "seconds": 2.0,
            "operations": 8,
            "peak_bytes": 2**32,
            "baseline": True,
        },
        {
            "part": "step",
            "group": "on",
            "case": "a|b",
            "seconds": 0.5,
            "operations": 4,
            "peak_bytes": 2**30,
            "trained": 7,
        },
        {"part": "step", "group": "off", "case": "other", "ok": False, "error": "out of memory"},
    ]
    lines = gpu_rows.markdown(rows).splitlines()
    assert lines[-3] == "| step | on | full |  | 2000.0 | 1.00 | 1.00 | 4.00 | 1.00 |  |"
    assert lines[-2] == r"| step | on | a\|b |  | 500.0 | 0.25 | 0.50 | 1.00 | 0.25 | trained 7 |"
    assert lines[-1] == "| step | off | other | FAIL |  |  |  |  |  | error out of memory |"


@pytest.mark.more
def test_everything_runs_at_a_tiny_size(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--tiny", "--minutes", "20", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    rows = written(out)
    assert [row for row in rows if row.get("ok") is False or "skipped" in row] == []
    parts = {
        "environment",
        "checks",
        "GRPO checks",
        "commands",
        "weight sync",
        "training step",
        "decoding",
        "GRPO step",
    }
    assert {row["part"] for row in rows} == parts | {"growth", "end"}
    assert sum(row.get("ok") is True for row in rows) >= 25
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {row['case']} |" in table for row in rows[1:])


@pytest.mark.more
def test_only_the_parts_that_are_asked_for_run(tmp_path):
    out = tmp_path / "rows.jsonl"
    only = ["--only", "machine", "GRPO steps"]
    subprocess.run([sys.executable, str(FOLDER / "gpu.py"), "--tiny", "--out", str(out), *only], check=True)
    rows = written(out)
    assert [row for row in rows if row.get("ok") is False or "skipped" in row] == []
    assert list(dict.fromkeys(row["part"] for row in rows)) == ["environment", "weight sync", "GRPO step", "end"]


@pytest.mark.more
def test_the_memory_of_every_way_of_training_is_estimated_for_the_run_that_is_made(tmp_path):
    out = tmp_path / "memory.jsonl"
    command = [sys.executable, str(FOLDER / "gpu_memory.py"), "--small", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    rows = written(out)
    assert [row.get("way") for row in rows] == [None, "block", "full", "LoRA"]
    for row in rows[1:]:
        assert "failed" not in row and row["estimated"] == row["estimate"]["peak"] > 0
        parts = [part["part"] for part in row["parts"]]
        step = ["before generation", "generation", "passes", "last pass, clipping", "optimizer", "end of step"]
        assert parts == ["loading", "wrapping", *step, *step, "end"]


@pytest.mark.more
@pytest.mark.parametrize("way", ["block", "full", "LoRA"])
def test_the_peaks_that_a_gpu_had_are_estimated(way):
    machine, *rows = written(FOLDER / "results" / "gpu-memory-h100.jsonl")
    (row,) = [row for row in rows if row["way"] == way]
    config = Qwen3Config(**machine["shape"], tie_word_embeddings=True, dtype=torch.bfloat16)
    train = {"block": [config.num_hidden_layers // 2], "full": None, "LoRA": lora()}[way]
    batches = Batches(**row["batches"] | {"outputs": tuple(row["batches"]["outputs"])})
    arguments = GRPOConfig("unused", use_cpu=True, bf16=True, beta=0.0)
    estimate = estimate_memory(config, train, batches, arguments, on_gpu=True)
    assert estimate.peak == pytest.approx(row["measured"], rel=0.03)
