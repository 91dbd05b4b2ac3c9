"""Runs that take no time to compute, for tests of what surrounds them: importable by the engines' processes.

The file FAKE_RUNS_LOG gets the digest and the node of every run that starts. What happens to one is told by
`settings`, or by the JSON in FAKE_RUNS_FATE: "levels", the score by block and rate,
such as "full 0.001"; "rates", block -> the learning rate that is found by it; "sleep", the length of a step in seconds;
"kill", block -> how often its process kills itself; "fail", block -> what it raises; "same", the blocks that score what
the base does; "constant", what all score; "nothing", whether there is nothing to learn from.
"""

import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from peft_onelayer.sweep.run_layer import FORMAT

NODE = os.environ.get("FAKE_RUNS_NODE", "first")  # of a cluster


def run(spec, on_step=lambda step, reward: None):
    settings, digest = {**spec.settings, **json.loads(os.environ.get("FAKE_RUNS_FATE", "{}"))}, spec.digest()
    log = Path(os.environ["FAKE_RUNS_LOG"])
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{digest} {NODE}\n")
    started = log.read_text(encoding="utf-8").split().count(digest)
    for step in range(1, spec.steps + 1):
        time.sleep(settings.get("sleep", 0))
        on_step(step, _score(spec, 0) + step / 1000)
    if started <= settings.get("kill", {}).get(str(spec.layer), 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if message := settings.get("fail", {}).get(str(spec.layer)):
        raise ValueError(message)
    if spec.steps == 0 and spec.layer != "base":
        return _rate(spec, settings)
    scores = [_score(spec, i) for i in range(spec.problems)]
    if level := settings.get("levels", {}).get(f"{spec.layer} {settings.get('learning_rate', 0):g}"):
        scores = [level + 0.1 * (_score(spec, i) % 0.1) for i in range(spec.problems)]
    if "constant" in settings:
        scores = [settings["constant"]] * spec.problems
    elif str(spec.layer) in settings.get("same", ()):
        scores = [_score(replace(spec, layer="base", seed=0), i) for i in range(spec.problems)]
    return {
        "format": FORMAT,
        "digest": digest,
        "spec": asdict(spec),
        "scores": scores,
        "mean": sum(scores) / len(scores),
        "standard_error": 0.01,
        "greedy_scores": None,
        "problems_digest": "p",
        "rewards": [_score(spec, 0)] * spec.steps,
        "steps": spec.steps,
        "tokens_generated": 10 * spec.steps,
        "tokens_trained": 20 * spec.steps,
        "tokens_evaluated": 100,
        "seconds": random.random(),
        "versions": {"node": NODE},
    }


def _rate(spec, settings):
    """The row of a run that finds a learning rate."""
    row = {"format": FORMAT, "digest": spec.digest(), "spec": asdict(spec), "steps": 0, "seconds": 1.0, "versions": {}}
    cost = {"tokens_generated": 100, "tokens_trained": 50}
    if settings.get("nothing"):
        return {
            **row,
            **cost,
            "nothing": "nothing to learn. The likely reason: it is a test.",
            "shown": ["prompt: 1 + 1"],
        }
    rate = settings.get("rates", {}).get(str(spec.layer), 3e-4 if spec.layer == "full" else 3e-3)
    return {**row, **cost, "found": {"learning_rate": rate, "kl": 0.015, "kl_noise": 1e-5, **cost, "seconds": 1.0}}


def report_environment(spec, on_step):
    time.sleep(0.3)  # so that every worker gets one
    return {"cuda": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": os.environ.get("OMP_NUM_THREADS")}


def _score(spec, problem):
    """Between 0 and 1, different for each; the base the lowest, full the highest, later blocks higher."""
    noise = int(hashlib.sha256(f"{spec.layer} {spec.seed} {problem}".encode()).hexdigest()[:4], 16) / 2**16
    level = {"base": 0.0, "full": 0.8}.get(spec.layer) if isinstance(spec.layer, str) else 0.2 + spec.layer / 30
    return level + 0.1 * noise


def started(folder):
    """How often each run has started, by digest."""
    return Counter(line.split()[0] for line in (Path(folder) / "log").read_text(encoding="utf-8").splitlines())


def stored(folder):
    """The rows in a sweep's folder by digest, without their timings."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in (Path(folder) / "rows").glob("*.json")]
    return {row["digest"]: {name: value for name, value in row.items() if name != "seconds"} for row in rows}
