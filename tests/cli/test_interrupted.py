"""Every command that writes, on a disk that gets full, killed at any moment, and beside another: one line, nothing
half-written, and what was finished is kept."""

import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from outputs import command, hidden, killed_at, on_a_disk_of
from peft import get_peft_model

import models
from peft_onelayer import SingleLayerConfig

FORMATS = ("peft", "lora", "dense", "sparse", "flat")
KB = 1024


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base and a dense adapter of it."""
    root = tmp_path_factory.mktemp("files")
    models.build(dtype=torch.bfloat16).save_pretrained(root / "base")
    base = models.build(dtype=torch.bfloat16)
    base.name_or_path = base.config._name_or_path = str(root / "base")
    model = get_peft_model(base, SingleLayerConfig(layer=1))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    model.save_pretrained(root / "dense")
    (root / "dense" / "README.md").unlink()
    return root


def contents(folder):
    """Of every file the bytes; of a safetensors file those of its tensors, since metadata come in any order."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 0
            found[str(path.relative_to(folder))] = len(content), content[header:]
    return found


def of_export(files, form):
    return ["export", files / "dense", "{out}", "--format", form, "--base", files / "base"]


def of_merge(files):
    return ["merge", files / "base", files / "dense", "{out}"]


def filled(arguments, out):
    return [str(argument).replace("{out}", str(out)) for argument in arguments]


def of_format(files, form):
    return of_merge(files) if form == "merge" else of_export(files, form)


def on_disks(arguments, disk, sizes):
    """What the command says on disks of these sizes: (exit code, lines on stderr, names left on the disk)."""

    def run(disk):
        code, err, _ = command(*filled(arguments, disk / "out"))
        return code, err, sorted(path.name for path in disk.iterdir())

    return [on_a_disk_of(size, disk, run) for size in sizes]


@pytest.mark.parametrize("form", ["peft", *(pytest.param(f, marks=pytest.mark.more) for f in ("merge", *FORMATS[1:]))])
def test_a_full_disk(files, tmp_path, form):
    assert command(*filled(of_format(files, form), tmp_path / "whole"))[0] == 0
    needed = sum(size for size, _ in contents(tmp_path / "whole").values())
    disk = tmp_path / "disk"
    disk.mkdir()
    sizes = [8 * KB, needed // 3, 2 * needed // 3, needed + 256 * KB]
    *full, enough = on_disks(of_format(files, form), disk, sizes)
    for code, err, left in full:
        assert (code, len(err), left) == (1, 1, []), (code, err, left)
        assert str(disk) in err[0] and ("no room" in err[0] or "free" in err[0]) and len(err[0]) < 500, err
    assert enough[0] == 0 and enough[2] == ["out"], enough


@pytest.mark.more
@pytest.mark.parametrize("form", ["merge", *FORMATS])
def test_killed_at_any_moment_the_next_run_leaves_nothing_of_it(files, tmp_path, form):
    arguments = filled(of_format(files, form), tmp_path / "out")
    assert command(*filled(of_format(files, form), tmp_path / "whole"))[0] == 0
    expected, kills, half = contents(tmp_path / "whole"), 0, 0
    moments = iter(range(1, 2000, 2))
    while killed_at(next(moments), lambda: command(*arguments)):
        kills += 1
        half += any("partial-" in name for name in hidden(tmp_path))
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
        if kills % 3 == 0:  # else it adds to what is there already
            code, err, _ = command(*arguments)
            assert code == 0 and hidden(tmp_path) == [], (err, hidden(tmp_path))
            assert contents(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
    assert kills > 5 and half > 0


HOLD = """
import sys, time
from pathlib import Path
from peft_onelayer.records.claim import claimed
with claimed(Path(sys.argv[1])):
    print("now", flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "{demo}", "--task", "arithmetic", "--layer", "5", "--steps", "1", "--out", "out"],
        ["train", "{demo}", "--task", "arithmetic", "--layer", "5", "--steps", "1", "--out", "out", "--resume"],
        ["sweep", "{demo}", "--task", "arithmetic", "--out", "out"],
        ["probe", "{demo}", "--task", "arithmetic", "--out", "out.json"],
        ["eval", "{demo}", "--task", "arithmetic", "--out", "out.json"],
        ["demo", "--out", "out"],
        ["merge", "{base}", "{dense}", "out"],
        *(["export", "{dense}", "out", "--format", form] for form in FORMATS),
        ["pull", "me/x", "out"],
    ],
    ids=" ".join,
)
def test_a_second_process_is_refused_before_any_work(files, tmp_path, monkeypatch, arguments):
    from peft_onelayer.runs import models as loading

    def load(*given):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    places = {"{demo}": models_demo(), "{base}": files / "base", "{dense}": files / "dense"}
    out = "out.json" if "out.json" in arguments else "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / out], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"now\n"
        code, err, printed = command(*(places.get(argument, argument) for argument in arguments))
    finally:
        holder.kill()
        holder.communicate()
    assert (code, len(err), printed) == (1, 1, ""), err
    assert f"{out} is being written by process {holder.pid} on " in err[0] and "wait for it to end" in err[0]
    assert sorted(os.listdir()) == [f".{out}.onelayer-lock"]  # the killed holder's


def models_demo():
    from importlib.resources import files as resources

    return resources("peft_onelayer") / "demo_model"


TRAIN = ["train", "{demo}", "--task", "arithmetic", "--layer", "5", "--steps", "3", "--set", "save_steps=1"]
TRAIN += ["--set", "per_device_train_batch_size=8", "--out", "{out}"]


def training(out):
    return [argument.replace("{demo}", str(models_demo())) for argument in filled(TRAIN, out)]


@pytest.mark.more
def test_training_on_a_full_disk(tmp_path):
    assert command(*training(tmp_path / "whole"))[0] == 0
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(disk):
        code, err, _ = command(*training(disk / "out"))
        out = disk / "out"
        complete = [path.parent.name for path in out.glob("checkpoints/*/trainer_state.json")]
        started = [path.name for path in out.glob("checkpoints/checkpoint-*")]
        status = json.loads((out / "run.json").read_text(encoding="utf-8"))["status"] if out.exists() else None
        return code, err, sorted(complete), sorted(started), status, hidden(disk)

    outcomes = set()
    for size in (4 * KB, 40 * KB, 200 * KB, 500 * KB, 900 * KB, 1500 * KB, 8000 * KB):
        code, err, complete, started, status, left = on_a_disk_of(size, disk, run)
        assert complete == started and left == [], (size, err, started, left)
        if code == 0:
            assert status == "finished"
        else:
            assert code == 1 and "no room in" in err[-1] and "complete checkpoints are kept" in err[-1], err
            assert all(len(line) < 500 and "Traceback" not in line for line in err) and len(err) < 5, err
            assert status == ("unfinished" if complete else None), (size, status, complete)
        outcomes.add((code, bool(complete)))
    assert outcomes >= {(0, True), (1, False)}, outcomes


@pytest.mark.more
def test_training_killed_goes_on_to_the_same_weights(tmp_path):
    assert command(*training(tmp_path / "whole"))[0] == 0
    expected = (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()
    for moment in (50, 150, 300, 500, 800, 1200, 1700, 2300, 3000):
        if not killed_at(moment, lambda: command(*training(tmp_path / "out"))):
            break
        out = tmp_path / "out"
        resume = ["--resume"] * (out / "run.json").exists()
        if not resume and out.exists():
            assert list(out.iterdir()) == [] or hidden(out)
        code, err, _ = command(*training(out), *resume)
        assert code == 0, (moment, err)
        assert hidden(tmp_path) == [], (moment, hidden(tmp_path))
        assert (out / "adapter_model.safetensors").read_bytes() == expected
        shutil.rmtree(out)


def staged_in(folder, adapter):
    """A dry run of a push whose temporary files are in `folder`."""
    tempfile.tempdir = str(folder)
    try:
        return command("push", adapter, "me/x", "--dry-run")
    finally:
        tempfile.tempdir = None


def test_pushing_on_a_full_disk(files, tmp_path):
    def run(disk):
        code, err, _ = staged_in(disk, files / "dense")
        return code, err, sorted(path.name for path in disk.iterdir())

    for size in (4 * KB, 16 * KB, 40 * KB):
        code, err, left = on_a_disk_of(size, tmp_path, run)
        assert (code, len(err), left) == (1, 1, []) and f"no room in {tmp_path}" in err[0], (size, code, err, left)
    code, err, left = on_a_disk_of(1000 * KB, tmp_path, run)
    assert code == 0 and left == [], err


@pytest.mark.more
def test_a_killed_push_leaves_nothing_for_long(files, tmp_path):
    kills = half = 0
    moments = iter(range(1, 2000, 3))
    while killed_at(next(moments), lambda: staged_in(tmp_path, files / "dense")):
        kills += 1
        half += len(hidden(tmp_path)) > 0
        if kills % 3 == 0:
            code, err, _ = staged_in(tmp_path, files / "dense")
            assert code == 0 and list(tmp_path.iterdir()) == [], (err, hidden(tmp_path))
    assert kills > 5 and half > 0


@pytest.mark.more
def test_evaluating_on_a_full_disk(tmp_path):
    def run(disk):
        code, err, _ = command(
            *(
                "eval",
                models_demo(),
                "--task",
                "arithmetic",
                "--problems",
                "8",
                "--samples",
                "0",
                "--out",
                disk / "e.json",
            )
        )
        return code, err, sorted(path.name for path in disk.iterdir())

    code, err, left = on_a_disk_of(4 * KB, tmp_path, run)  # a page, which the lock takes
    assert code == 1 and left == [] and f"no room in {tmp_path}" in err[-1], (code, err, left)
    code, err, left = on_a_disk_of(100 * KB, tmp_path, run)
    assert code == 0 and left == ["e.json"], err
