"""The commands of the CLI on the embedded model, as processes of their own on the same device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gpu_models as models
import torch
from gpu_models import DEMO
from gpu_rows import Row, Rows, first_line
from transformers import AutoModelForCausalLM


class Commands:
    """The commands of the CLI on the demo model, in threads while the checks go on: those of a run, a probe, the demo.

    Args:
        few: only training and evaluating.
    """

    def __init__(self, rows: Rows, few: bool) -> None:
        self.rows, self.steps, self.few = rows, "2" if few else "80", few
        self.results: list[tuple[str, Row]] = []
        self.processes: list[subprocess.Popen[str]] = []
        self.stopped = False
        self.scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.folder = Path(self.scratch.name)
        chains = [self._run_and_after] if few else [self._run_and_after, self._probe, self._demo]
        self.threads = [threading.Thread(target=chain, daemon=True) for chain in chains]
        for thread in self.threads:
            thread.start()

    def _run_and_after(self) -> None:
        demo, run, sparse = str(DEMO), str(self.folder / "run"), str(self.folder / "sparse")
        rate = ["--set", "learning_rate=1e-3", "--set", "per_device_train_batch_size=64"]
        task = ["--task", "arithmetic", "--json"]
        self._run("train", ["train", demo, *task, "--layer", "5", "--steps", self.steps, "--out", run, *rate])
        self._run("eval", ["eval", demo, *task, "--adapter", run, "--problems", "64"])
        if not self.few:
            self._run("merge", ["merge", demo, run, str(self.folder / "merged")])
            self._run("export", ["export", run, sparse, "--format", "sparse", "--json"])
            self._run("eval, sparse", ["eval", demo, *task, "--adapter", sparse, "--problems", "64"])

    def _probe(self) -> None:
        low = str(self.folder / "bfloat16")
        AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).save_pretrained(low)
        models.tokenizer().save_pretrained(low)
        run = ["--steps", "150", "--set", "per_device_train_batch_size=192"]  # long enough for a race of the blocks
        self._run("probe, bfloat16 base", ["probe", low, "--task", "arithmetic", *run, "--json"])

    def _demo(self) -> None:
        self._run("demo", ["demo", "--steps", self.steps, "--out", str(self.folder / "demo"), "--json"])

    def _run(self, name: str, arguments: list[str]) -> None:
        if self.stopped:
            return
        start = time.perf_counter()
        code = "from onelayer_cli.main import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=self.folder,  # not the repository's root, where cli/ is no onelayer_cli
            env={**os.environ, "ONELAYER_DEBUG": "1"},
        )
        self.processes.append(process)
        out, errors = process.communicate()
        row: Row = {"ok": process.returncode == 0, "exit": process.returncode}
        if process.returncode:
            row["error"] = " < ".join(line.strip()[:160] for line in errors.splitlines()[:-7:-1])
        else:
            row |= figures(out)
        row["seconds_of_process"] = round(time.perf_counter() - start, 1)
        self.results.append((name, row))

    def finish(self, wait: float) -> None:
        """Write the rows of what has ended within `wait` seconds; stop what has not."""
        until = time.perf_counter() + max(wait, 1)
        for thread in self.threads:
            thread.join(max(until - time.perf_counter(), 0.01))
        self.stopped = any(thread.is_alive() for thread in self.threads)
        finished = list(self.results)
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for thread in self.threads:
            thread.join(10)
        for name, row in finished:
            self.rows.write("commands", f"onelayer {name}", **row)
        if self.stopped:
            self.rows.write("commands", "the others", skipped=f"stopped after {wait:.0f} s of waiting")
        self.scratch.cleanup()


def figures(out: str) -> Row:
    """The figures of a command's --json that are worth keeping."""
    try:
        found = json.loads(out)
    except ValueError:
        return {"said": first_line(out)}
    kept = (
        "verdict",
        "layers",
        "pick",
        "results",
        "reload_bit_equal",
        "bytes",
        "learning_rate",
        "tied",
        "method",
        "cost",
    )
    row = {name: found[name] for name in kept if name in found}
    if "machine" in found:
        row["device"] = found["machine"]["device"]
    config = found.get("settings", {}).get("config", {}) if isinstance(found.get("settings"), dict) else {}
    row |= {name: config[name] for name in ("bf16", "use_cpu") if name in config}
    results = row.get("results")
    if isinstance(results, dict) and isinstance(results.get("rewards"), list):
        rewards = results["rewards"]
        row["results"] = {"steps": results.get("steps"), "first_reward": rewards[0], "last_reward": rewards[-1]}
    return row
