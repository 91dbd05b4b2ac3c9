import dataclasses
import itertools
import json
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import typer
from run_records import RECORD
from trl import GRPOConfig

from onelayer_cli import _completion
from peft_onelayer import sandbox
from peft_onelayer.rl.algorithms import ALGORITHMS
from peft_onelayer.runs import doctor
from peft_onelayer.tasks import TASKS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with runs, and a machine where each look is quick."""
    monkeypatch.setattr(sandbox, "run", lambda *args: sandbox.Outcome(True))
    monkeypatch.setattr(doctor, "SEAMS", {})
    for name, status in (("done", "finished"), ("half", "unfinished")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(dataclasses.replace(RECORD, status=status).to_json())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text("{}")
    return tmp_path


def found(folder):
    return {finding.what: finding for finding in doctor.examine(folder)}


def test_versions_extras_and_runs(folder, monkeypatch):
    findings = found(folder)
    assert findings["peft"].state == "ok" and findings["peft"].found.startswith(version("peft"))
    assert findings["sandbox"].state == "ok"
    assert (
        findings["run done"].cure == ""
        and findings["run half"].cure == f"onelayer train --resume --out {folder / 'half'}"
    )
    assert findings["run odd"].state == "bad"


@pytest.mark.parametrize(
    ("bfloat16", "lacks", "then", "cure"),
    [
        (1.5, False, "", ""),
        (7.5, False, "", "train a copy of the model in float32"),
        (7.5, True, ", so that onelayer uses the float32 units (docs/runs.md, Time)", ""),
    ],
)
def test_a_cpu_without_bfloat16(folder, monkeypatch, bfloat16, lacks, then, cure):
    clock = itertools.accumulate(second for took in (1.0, bfloat16) for _ in range(5) for second in (0.0, took))
    monkeypatch.setattr(doctor, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("peft_onelayer.rl.cpu_products.REPLACEABLE", True)
    monkeypatch.setattr("peft_onelayer.rl.cpu_products.lacks_instructions", lambda dtype: lacks)
    finding = found(folder)["bfloat16"]
    assert finding.found == f"a product takes {bfloat16} times as long as in float32{then}"
    assert finding.state == "ok" and finding.cure.partition(":")[0] == cure


def test_what_is_amiss_has_a_cure(folder, monkeypatch):
    def no_sandbox(*args):
        raise sandbox.SandboxError("no user namespaces")

    monkeypatch.setattr(sandbox, "run", no_sandbox)
    monkeypatch.setattr(
        doctor, "TESTED", {"peft": ("99.0", "99.1"), "trl": ("0.1", "0.2"), "no-such-library": ("1", "2")}
    )
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_extra": ("wings", "pip install wings")})
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    findings = found(folder)
    assert (findings["peft"].state, findings["peft"].cure) == ("bad", "pip install --upgrade 'peft>=99.0'")
    assert findings["trl"].state == "ok" and findings["trl"].cure.endswith("pip install trl==0.2")
    assert (findings["no-such-library"].state, findings["no-such-library"].found) == ("bad", "not installed")
    assert (findings["no_such_extra"].state, findings["no_such_extra"].cure) == ("missing", "pip install wings")
    assert findings["Hub"].cure.startswith("hf auth login")
    assert "no user namespaces" in findings["sandbox"].found and "--unsafe" in findings["sandbox"].cure


def test_a_folder_of_the_hub_that_is_none(folder, tmp_path, monkeypatch):
    (file := tmp_path / "file").write_text("")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("HF_TOKEN_PATH", "HF_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(file / name))
    findings = found(folder)
    assert findings["Hub"].state == findings["cache"].state == "bad"
    assert findings["Hub"].cure == "set HF_HOME to a folder"


def test_the_command_exits_with_1_where_something_will_not_work(onelayer, folder):
    code, _lines, out = onelayer("doctor", folder, "--json")
    shown = json.loads(out)
    assert code == 1 and shown["format"] == "onelayer-doctor-1"
    assert {"what": "run half", "state": "ok"}.items() <= next(
        f for f in shown["findings"] if f["what"] == "run half"
    ).items()
    (folder / "odd" / "run.json").unlink()
    code, _, out = onelayer("doctor", folder)
    assert code == 0 and "-> onelayer train --resume --out" in out


def test_tasks_and_algorithms(onelayer):
    _, _, out = onelayer("tasks", "--json")
    assert [row["name"] for row in json.loads(out)["tasks"]] == list(TASKS)
    assert all(row["about"] for row in json.loads(out)["tasks"])
    _, _, out = onelayer("algorithms")
    assert all(f" {name} " in out for name in ALGORITHMS)
    code, _, out = onelayer("algorithms", "dr_grpo")
    assert code == 0 and "--set loss_type=dr_grpo" in out
    assert "did you mean grpo?" in onelayer("algorithms", "grop")[1][0]


def test_the_shell_completes_names_and_fields(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_task.py").touch()
    assert _completion.tasks("g") == ["gsm8k"] and _completion.tasks("my") == ["my_task.py"]
    assert set(_completion.algorithms("dr_")) == {"dr_grpo"}
    assert _completion.recipes("qwen3-1.7b-numina:p") == ["qwen3-1.7b-numina:paper"]
    context = typer.Context(typer.main.get_command(typer.Typer(callback=lambda: None)))
    context.params = {"algorithm": "grpo"}
    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert {name.removesuffix("=") for name in _completion.fields(context, "")} == fields
    context.params = {"algorithm": "gigpo"}
    assert _completion.fields(context, "omeg") == ["omega="]
