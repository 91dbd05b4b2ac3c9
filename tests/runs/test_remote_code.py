"""A base that comes with Python code: the code runs where that was allowed, and nowhere else."""

import json
import shutil
import sys
from importlib.resources import files

import pytest

from peft_onelayer.runs import EvaluationSettings, ProbeSettings, TrainingSettings, evaluate, probe, train
from peft_onelayer.runs.models import load_causal_lm, load_skeleton
from peft_onelayer.sweep.plan import plan_sweep
from peft_onelayer.sweep.run_layer import run_layer
from peft_onelayer.sweep.settings import SweepSettings

BASE = files("peft_onelayer") / "demo_model"
OPTION = r"comes with Python code of its own, which runs with all your rights; .* give --trust-remote-code"
CODE = """
from pathlib import Path
from transformers import {base}Config, {base}ForCausalLM

Path({mark!r}).touch()

class OwnConfig({base}Config):
    model_type = "own_model"

class OwnForCausalLM({base}ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The demo model as a model with code of its own, and the file that the code makes when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder, mark = tmp_path / "own", tmp_path / "ran"
    shutil.copytree(str(BASE), folder)
    config = json.loads((folder / "config.json").read_text())
    family = config["architectures"][0].removesuffix("ForCausalLM")
    config |= {"model_type": "own_model", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(base=family, mark=str(mark)))
    return str(folder), mark


def settings(own, tmp_path, **more):
    return TrainingSettings(
        model=own,
        out=tmp_path / "run",
        task="arithmetic",
        layer=5,
        steps=1,
        config={"per_device_train_batch_size": 8, "gradient_checkpointing": False},
        **more,
    )


def test_without_the_option_nothing_runs_and_the_error_names_it(own, tmp_path):
    folder, mark = own
    calls = [
        lambda: load_causal_lm(folder),
        lambda: load_skeleton(folder),
        lambda: train(settings(folder, tmp_path)),
        lambda: evaluate(EvaluationSettings(model=folder, task="arithmetic", problems=2)),
        lambda: probe(ProbeSettings(model=folder, task="arithmetic", method="prior")),
        lambda: plan_sweep(SweepSettings(model=folder, task="arithmetic")),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=OPTION):
            call()
    assert not mark.exists() and not (tmp_path / "run").exists()


def test_a_run_with_it_says_so_and_every_command_asks_again(own, tmp_path):
    folder, mark = own
    run = train(settings(folder, tmp_path, trust_remote_code=True))
    assert mark.exists() and run.record.settings.trust_remote_code is True
    assert json.loads((run.folder / "run.json").read_text())["settings"]["trust_remote_code"] is True
    again = {"model": folder, "adapter": str(run.folder), "task": "arithmetic", "problems": 2, "samples": 1}
    with pytest.raises(ValueError, match=OPTION):
        evaluate(EvaluationSettings(**again))
    assert evaluate(EvaluationSettings(**again, trust_remote_code=True)).n == 2


@pytest.mark.more
def test_a_run_without_it_says_nothing(tmp_path):
    run = train(settings(str(BASE), tmp_path))
    assert "trust_remote_code" not in json.loads((run.folder / "run.json").read_text())["settings"]


def test_rankings_and_sweeps_take_it(own, tmp_path):
    folder, _ = own
    ranking = probe(ProbeSettings(model=folder, task="arithmetic", method="prior", trust_remote_code=True))
    assert ranking.num_layers == 12
    sweep = SweepSettings(
        model=folder, task="arithmetic", layers=[0], problems=2, samples=1, steps=1, trust_remote_code=True
    )
    plan = plan_sweep(sweep)
    assert all(spec.trust_remote_code for spec in plan.specs) and len(run_layer(plan.base)["scores"]) == 2


@pytest.mark.more
@pytest.mark.filterwarnings("ignore")
def test_a_full_run_hands_it_to_the_reference_model(own, tmp_path):
    folder, _ = own
    asked = settings(folder, tmp_path, trust_remote_code=True)
    config = {**asked.config, "beta": 0.1}
    run = train(TrainingSettings(**{**vars(asked), "layer": "auto", "full": True, "config": config}))
    assert run.record.settings.full and (run.folder / "model.safetensors").exists()
