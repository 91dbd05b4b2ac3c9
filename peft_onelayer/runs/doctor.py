"""What this machine has for training, and what is amiss: each finding with its cure."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version

from peft_onelayer.records.files import RUN
from peft_onelayer.records.run import RunRecord
from peft_onelayer.records.text import one_line
from peft_onelayer.seams import SEAMS, TESTED

GIB = 2**30
ROOM = 5 * GIB  # of the cache's disk; with less a model of two billion parameters has no room
SLOW = 2.0  # a bfloat16 that takes so many times as long as float32 is said to be slow
OPTIONAL = {  # library: what it adds, and how it is installed
    "reasoning_gym": ("the task reasoning_gym", "pip install 'peft-onelayer[tasks]'"),
    "textworld": ("the task textworld", "pip install 'peft-onelayer[tasks]'"),
    "sympy": ("algebra in the answers of reasoning_gym", "pip install 'peft-onelayer[tasks]'"),
    "ray": ("onelayer sweep --engine ray", "pip install 'peft-onelayer[ray]'"),
    "submitit": ("onelayer sweep --engine slurm", "pip install 'peft-onelayer[slurm]'"),
    "deepspeed": ("ZeRO", "pip install 'peft-onelayer[deepspeed]'"),
    "bitsandbytes": ("bases in 4 and 8 bit", "pip install bitsandbytes"),
    "vllm": ("--set use_vllm=true", "pip install 'trl[vllm]'"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: it.
        state: "ok", "missing" (an option that is not there), or "bad" (something will not work).
        found: what was found.
        cure: what to do; "" where nothing need be done.
    """

    what: str
    state: Literal["ok", "missing", "bad"]
    found: str
    cure: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(folder: Path) -> list[Finding]:
    """Look at the libraries, the device, the Hub's token and cache, the sandbox, and the runs in `folder`; nothing is
    sent, and nothing is changed."""
    return [*_libraries(), *_seams(), *_device(), *_optional(), *_hub(), _sandbox(), *_runs(folder)]


def _libraries() -> Iterator[Finding]:
    for name, (lowest, highest) in TESTED.items():
        if name in OPTIONAL:
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, "bad", "not installed", f"pip install '{name}>={lowest}'")
            continue
        tested = f"{found}; tested with {lowest} to {highest}"
        if Version(found) < Version(lowest):
            yield Finding(name, "bad", tested, f"pip install --upgrade '{name}>={lowest}'")
        elif Version(Version(found).public) > Version(highest):
            yield Finding(
                name, "ok", f"{tested}, so this one is newer", f"if it makes trouble: pip install {name}=={highest}"
            )
        else:
            yield Finding(name, "ok", tested)


def _seams() -> Iterator[Finding]:
    moved = []
    for seams in SEAMS.values():
        for seam in seams:
            if importlib.util.find_spec(seam.library) and (problem := seam.problem()):
                moved.append(f"{seam.path} {problem}")
    if moved:
        lowest, highest = TESTED[moved[0].partition(":")[0].partition(".")[0]]
        cure = f"install a version from {lowest} to {highest}"
        yield Finding("parts of other libraries", "bad", "; ".join(moved), cure)
    else:
        yield Finding("parts of other libraries", "ok", "all that is relied on is there")


def _device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            found = f"{torch.cuda.get_device_name(i)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
            yield Finding(f"GPU {i}", "ok", found)
    else:
        built = "torch is built without CUDA" if torch.version.cuda is None else "torch finds none"
        yield Finding("GPU", "missing", f"{built}; runs use the CPU", "for large models install torch with CUDA")
    memory = (
        f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB" if hasattr(os, "sysconf") else ""
    )
    yield Finding("CPU", "ok", f"{os.cpu_count()} cores{memory}; {platform.system()} {platform.machine()}")
    if not torch.cuda.is_available():
        yield _half_precision()


def _half_precision() -> Finding:
    """How a product in bfloat16 compares with one in float32: many CPUs have no instructions for it."""
    import torch

    from peft_onelayer.rl.cpu_products import pays

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, weights = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        torch.nn.functional.linear(rows, weights)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weights)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    times_slower = seconds[torch.bfloat16] / seconds[torch.float32]
    found = f"a product takes {times_slower:.1f} times as long as in float32"
    if pays(torch.bfloat16):
        return Finding("bfloat16", "ok", f"{found}, so that onelayer uses the float32 units (docs/runs.md, Time)")
    cure = "train a copy of the model in float32: docs/runs.md, Time" if times_slower > SLOW else ""
    return Finding("bfloat16", "ok", found, cure)


def _optional() -> Iterator[Finding]:
    for name, (adds, install) in OPTIONAL.items():
        try:
            yield Finding(name, "ok", f"{version(name)}: {adds}")
        except PackageNotFoundError:
            yield Finding(name, "missing", f"not installed; it adds {adds}", install)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    try:
        token = get_token()
    except OSError as error:  # where the client would look for one
        yield Finding("Hub", "bad", f"no token can be read: {one_line(error)}", "set HF_HOME to a folder")
    else:
        if token:
            yield Finding("Hub", "ok", f"a token for {constants.ENDPOINT}")
        else:
            yield Finding("Hub", "missing", "no token: onelayer push needs one", "hf auth login, or set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        yield Finding("network", "missing", "HF_HUB_OFFLINE is set: only what is in the cache is found", "unset it")
    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if not (there.is_dir() and os.access(there, os.W_OK)):
        yield Finding("cache", "bad", f"{cache} cannot be written", "set HF_HOME to a folder that can")
    elif free < ROOM:
        yield Finding("cache", "bad", f"{cache}: {free / GIB:.1f} GiB free", "free some space, or set HF_HOME")
    else:
        yield Finding("cache", "ok", f"{cache}: {free / GIB:.0f} GiB free")


def _sandbox() -> Finding:
    from peft_onelayer import sandbox

    try:
        passed = sandbox.run(["def double(x): return 2 * x"], "assert double(4) == 8", ["double"]).passed
    except sandbox.SandboxError as error:
        return Finding(
            "sandbox", "missing", one_line(error), "tasks that run code, such as humaneval, need --unsafe here"
        )
    return Finding("sandbox", "ok" if passed else "bad", "tasks may run a model's code" if passed else "it fails", "")


def _runs(folder: Path) -> Iterator[Finding]:
    """What stands in `folder` and in the folders in it."""
    for path in [folder / RUN, *sorted(folder.glob(f"*/{RUN}"))]:
        if not path.is_file():
            continue
        name = str(path.parent.relative_to(folder))
        try:
            run = RunRecord.from_file(path)
        except ValueError as error:
            yield Finding(f"run {name}", "bad", one_line(error), "another program or version wrote it")
            continue
        what = f"{run.settings.algorithm} on {run.settings.source.name}, {run.status}"
        again = shlex.join(["onelayer", "train", "--resume", "--out", str(path.parent)])
        cure = "" if run.status == "finished" else again
        yield Finding(f"run {name}", "ok", what, cure)
