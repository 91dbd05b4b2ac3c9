import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loopback import OTHER_TOKEN, TOKEN, Hub
from peft import get_peft_model
from worker import Worker

import models
from peft_onelayer import SingleLayerConfig
from peft_onelayer.records.evaluation import EvaluationRecord, MeasuredAdapter
from peft_onelayer.records.figures import Figures, Measured
from peft_onelayer.records.files import CARD, EVALUATION, PROFILE, RUN, WEIGHTS, file_digest
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.run import BaseModel, DataSource, RunRecord, RunResults, RunSettings


@pytest.fixture(scope="session")
def _server(tmp_path_factory):
    """One Hub and one process of commands for all tests, which share nothing but the imports."""
    hub = Hub()
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
    environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HOME": str(home)}
    worker = Worker(environment)
    yield SimpleNamespace(hub=hub, worker=worker, home=home, environment=environment)
    worker.close()
    hub.close()


@pytest.fixture
def hub(_server):
    """An empty Hub with the users "me" and "you"; TOKEN is mine."""
    _server.hub.reset()
    _server.hub.users = {TOKEN: "me", OTHER_TOKEN: "you"}
    return _server.hub


@pytest.fixture
def ask(_server, hub):
    """Runs one command, or Python code, with my token; what it returns has code, out, err (lines) and result.

    No answer and no cached file ever holds a token.
    """

    def run(*arguments, token=TOKEN, code=None, **environment):
        environment |= {"HF_TOKEN": token} if token else {}
        answer = _server.worker(*arguments, code=code, environment=environment)
        said = answer.out + "".join(answer.err)
        assert not any(secret in said for secret in (TOKEN, OTHER_TOKEN, token) if secret), said
        return answer

    yield run
    for path in _server.home.rglob("*"):
        assert not path.is_file() or path.is_symlink() or TOKEN.encode() not in path.read_bytes(), path
    shutil.rmtree(_server.home / "hub", ignore_errors=True)  # the client's cache


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A tiny base model in bfloat16, with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("somewhere") / "tiny-base"
    models.build(dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base_folder, tmp_path):
    """A folder as `onelayer train` leaves it: block 1 of 4, a hundredth of it changed, with all of its records."""
    base = models.build(dtype=torch.bfloat16)
    base.name_or_path = base.config._name_or_path = str(base_folder)
    model = get_peft_model(base, SingleLayerConfig(layer=1))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.rand_like(parameter) < 0.01) * 0.5)
    folder = tmp_path / "secret-project" / "adapter"
    model.save_pretrained(folder)
    (folder / CARD).write_text("as trained", encoding="utf-8")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.pt").write_bytes(b"a pickle")
    write_records(folder, base_folder)
    return folder


@pytest.fixture
def quick(adapter):
    """The same without a layer profile and rewards, whose plots take longer than all else of a push."""
    (adapter / PROFILE).unlink()
    run = RunRecord.from_file(adapter / RUN)
    (adapter / RUN).write_text(replace(run, results=replace(run.results, rewards=[])).to_json(), encoding="utf-8")
    return adapter


def write_records(folder: Path, base: Path) -> None:
    """run.json, layer_profile.json and eval.json of the adapter in `folder`."""
    task = DataSource("gsm8k", {"openai/gsm8k:main": "e53f048856ff4f594e959d75785d2c2d37b678ee"}, chat=True)
    model = BaseModel(str(base), None, {"config.json": "0" * 64}, "bfloat16", num_layers=4, parameters=30_000)
    run = RunRecord(
        command=f"onelayer train {base} --layer auto --task gsm8k --out {folder} --set hub_token={TOKEN} --seed 7",
        settings=RunSettings(
            model=model,
            algorithm="grpo",
            trainer="trl.trainer.grpo_trainer.GRPOTrainer",
            task=task,
            seed=7,
            config={"learning_rate": 5e-6, "logging_dir": f"{folder}/logs", "hub_token": TOKEN, "beta": 0.001},
            layer="auto",
        ),
        machine={"versions": {"torch": "2.13.0", "trl": "1.16.0"}, "device": "cpu"},
        status="finished",
        layers=[1],
        why="block 1 gained the most in 8 steps, +3.1 points (standard error 0.9)",
        results=RunResults(steps=20, rewards=[0.1] * 10 + [0.4] * 10),
    )
    (folder / RUN).write_text(run.to_json(), encoding="utf-8")
    ranking = LayerRanking(
        model=str(base),
        revision=None,
        num_layers=4,
        method="race",
        scores=[0.01, 0.031, None, -0.02],
        errors=[0.01, 0.009, None, 0.01],
        order=[1, 0, 3],
        tied=[1],
        pick=1,
        learning_rate=3e-3,
        cost={"tokens_generated": 1000, "tokens_trained": 900, "seconds": 3.0, "share": 0.05},
        task="gsm8k",
        seed=7,
    )
    (folder / PROFILE).write_text(ranking.to_json(), encoding="utf-8")
    figures = {
        "base": Figures(0.25, 0.0312, 100, 1.0),
        "adapter": Figures(0.375, 0.0341, 100, 1.0),
        "difference": Figures(0.125, 0.0123),
    }
    evaluation = EvaluationRecord(
        command=f"onelayer eval {base} --adapter {folder} --task gsm8k",
        model=model,
        adapter=MeasuredAdapter(str(folder), "SINGLE_LAYER", [1], file_digest(folder / WEIGHTS)),
        task=task,
        split="test",
        n=64,
        samples=4,
        temperature=1.0,
        max_completion_tokens=256,
        seed=0,
        results={"greedy": Measured(64, 1, **figures), "sampled": Measured(64, 4, **figures)},
    )
    (folder / EVALUATION).write_text(evaluation.to_json(), encoding="utf-8")
