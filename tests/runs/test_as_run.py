"""Prompts and sampling are those of the run.json beside a model: in a vote, the signal by entropy, a transplant."""

import shutil
from dataclasses import replace

import demo_model
import pytest
from changes import save_adapter
from run_records import RECORD, SETTINGS, TASK
from told import Told

from peft_onelayer.rollouts.evaluation import Evaluation
from peft_onelayer.rollouts.sampling import Rollout
from peft_onelayer.runs import EntropySettings, VoteSettings, entropy, forking, vote, voting
from peft_onelayer.sweep import transplant
from peft_onelayer.tasks import load_task

SYSTEM = "A1+1="
SHOWN = "".join(row["prompt"] + row["answer"] for row in load_task("arithmetic").rows("train", 2, 1234))
ASKED = {"task": "arithmetic", "problems": 2}
CONFIG = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
BARE = {"chat": True, "system": "", "shots": 0, "sampling": {"temperature": 0.5}}  # what goes before a run
AS_RUN = ["sampled as in the run: temperature=0.7", "prompts as in the run: 2 shots, system text 'A1+1='"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo model with a chat template; its tokenizer skips line ends."""
    return demo_model.save_with_template(
        tmp_path_factory.mktemp("model"), "{% for m in messages %}{{ m.content }}{% endfor %}"
    )


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Of two runs with other numbers of shots."""
    root = tmp_path_factory.mktemp("adapters")
    return [of_run(save_adapter(root / str(layer), model, layer), shots=shots) for layer, shots in ((5, 2), (8, 1))]


def of_run(folder, shots=2):
    """The folder with the run.json of a run whose prompts were plain, with a system text and shown problems."""
    task = replace(TASK, chat=False, system=SYSTEM, shots=shots)
    record = replace(RECORD, settings=replace(SETTINGS, task=task, config=CONFIG))
    (folder / "run.json").write_text(record.to_json())
    return str(folder)


def check(rows, sampling, *, bare):
    """Rows and sampling are those of the run, or `BARE`."""
    assert len(rows) == 2
    for row in rows:
        if bare:
            assert [message["role"] for message in row["prompt"]] == ["user"]
        else:
            assert row["prompt"].startswith(f"{SYSTEM}\n\n{SHOWN}A")
    assert sampling.temperature == (0.5 if bare else 0.7)


@pytest.mark.parametrize("bare", [False, True])
def test_a_vote(adapters, monkeypatch, bare):
    def sample(policy, tokenizer, task, rows, sampling, **more):
        check(rows, sampling, bare=bare)
        return [[Rollout("", "1", 0.0, 1, True, [1], [1], [True])] * sampling.samples for _ in rows]

    monkeypatch.setattr(voting, "sample_rollouts", sample)
    told = Told()
    record = vote(VoteSettings(adapters=adapters, **ASKED, **(BARE if bare else {})), progress=told)
    task = record.task
    assert (task.chat, task.system, task.shots) == ((True, None, None) if bare else (False, SYSTEM, 2))
    other = f"all are prompted and sampled as the first; otherwise in their runs: {adapters[1]}"
    assert told.notes == ([] if bare else [*AS_RUN, other])


@pytest.mark.parametrize("bare", [False, True])
def test_the_signal_by_entropy(model, adapters, monkeypatch, bare):
    measured = []
    monkeypatch.setattr(
        forking, "signal_by_entropy", lambda model, tokenizer, task, *given, **more: measured.append(given)
    )
    told = Told()
    asked = EntropySettings(model=model, adapter=adapters[0], samples=3, **ASKED, **(BARE if bare else {}))
    entropy(asked, progress=told)
    ((rows, sampling),) = measured
    check(rows, sampling, bare=bare)
    assert (sampling.samples, sampling.batch_size) == (3, 64)
    assert told.notes == ([] if bare else AS_RUN)


@pytest.mark.parametrize("bare", [False, True])
def test_a_transplant(model, tmp_path, monkeypatch, bare):
    def evaluate(model, tokenizer, task, rows, sampling):
        check(rows, sampling, bare=bare)
        return Evaluation(("a", "b"), (0.0, 1.0), sampling.samples)

    monkeypatch.setattr(transplant, "evaluate", evaluate)
    full, told = of_run(shutil.copytree(model, tmp_path / "full")), Told()
    found = transplant.transplant_profile(model, full, **ASKED, **(BARE if bare else {}), progress=told).to_json()
    assert (found["chat"], found["system"], found["shots"]) == ((True, None, None) if bare else (False, SYSTEM, 2))
    assert found["sampling"]["temperature"] == (0.5 if bare else 0.7)
    assert told.notes == ([] if bare else AS_RUN)
