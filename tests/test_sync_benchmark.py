"""The benchmark of a sync's bytes runs, on the demo model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.more
def test_it_prints_the_bytes_of_each_form():
    script, model = ROOT / "examples/benchmarks/sync_bytes.py", ROOT / "peft_onelayer/demo_model"
    options = ["--layer", "2", "--learning-rate", "1e-4", "--steps", "2", "--prompts", "1"]
    done = subprocess.run([sys.executable, script, model, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^ +[12] +[\d.]+% +([\d,]+) +([\d,]+) +([\d,]+) ", done.stdout, re.M)
    block, entries, shorter = ([int(row[k].replace(",", "")) for row in rows] for k in range(3))
    assert len(rows) == 2 and block[0] == block[1] > 0
    assert all(s <= min(b, e) for b, e, s in zip(block, entries, shorter, strict=True))
    assert re.search(r"everything / block [\d.]+ x", done.stdout)
