"""The models that `make real` runs on, and one adapter that its tests share."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from peft_onelayer.runs import ProbeSettings, TrainingSettings, probe, train

from .common import SUMS

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))  # the loopback Hub

MODELS = Path(os.environ.get("ONELAYER_MODELS") or "~/.cache/onelayer-models").expanduser()
RACED, TRAINED = 60, 12  # steps of the run that the blocks are raced for, and of the one that is made


def model_folder(name):
    """The folder of a model; skips the test where it is not there."""
    folder = MODELS / name
    if not (folder / "config.json").exists():
        pytest.skip(f"no model in {folder}; ONELAYER_MODELS names the folder of {name}")
    return str(folder)


@pytest.fixture(scope="session")
def smollm2():
    return model_folder("smollm2-135m")


@pytest.fixture(scope="session")
def qwen():
    return model_folder("qwen2.5-coder-0.5b")


@pytest.fixture(scope="session")
def ranking(smollm2):
    """Of the race at its defaults: no learning rate is given."""
    return probe(ProbeSettings(model=smollm2, task=SUMS, chat=False, steps=RACED))


@pytest.fixture(scope="session")
def trained(smollm2, ranking, tmp_path_factory):
    """A run of GRPO on the block that the race picked, at its rate: the folder, and its record."""
    folder = tmp_path_factory.mktemp("real") / "adapter"
    run = train(
        TrainingSettings(
            model=smollm2,
            task=SUMS,
            chat=False,
            layer=ranking.choice,
            learning_rate=ranking.choice_learning_rate,
            steps=TRAINED,
            eval_problems=128,
            out=folder,
        )
    )
    return SimpleNamespace(folder=folder, record=run.record, blocks=ranking.choice)
