"""Blocks of a trained model in its base: exact while they are in, exact afterwards, and what the command says."""

import json
from importlib.resources import files

import pytest
import torch
from command import onelayer  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.sweep.metric import gain, layer_contribution
from peft_onelayer.sweep.transplant import (
    Transplant,
    check_donor,
    transplant_profile,
    transplanted,
    transplants,
)
from peft_onelayer.tasks import load_task

DEMO = str(files("peft_onelayer") / "demo_model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_blocks_are_the_donors_and_afterwards_the_bases(dtype):
    base, donor = models.build(dtype=dtype), models.build(seed=1)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    with pytest.raises(KeyError), transplanted(base, donor, [1, 3]):
        for name, p in base.named_parameters():
            there = any(f".layers.{k}." in name for k in (1, 3))
            assert torch.equal(p, donor.get_parameter(name).to(dtype) if there else before[name]), name
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_which_blocks_are_put_in():
    found = transplants(4, window=2)
    assert [t.blocks for t in found if t.kind == "single"] == [(0,), (1,), (2,), (3,)]
    assert [t.blocks for t in found if t.kind == "window"] == [(0, 1), (1, 2), (2, 3)]
    assert [t.blocks for t in found if t.kind == "below"] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    assert [t.blocks for t in found if t.kind == "above"] == [(1, 2, 3), (2, 3), (3,)]
    assert found[0] == Transplant("single", (0,)) and len(found) == 14


@pytest.mark.parametrize(
    "donor, message",
    [
        ({"num_layers": 3}, "the base has 4 blocks and the trained model 3"),
        ({"intermediate_size": 24}, "a tensor of block 0 has shape"),
        ({"family": "Llama"}, "only one of the two models has self_attn"),
    ],
)
def test_models_that_are_no_pair(donor, message):
    with pytest.raises(ValueError, match=message):
        check_donor(models.build(), models.build(**donor))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The demo model with another block 2."""
    folder = tmp_path_factory.mktemp("full") / "full"
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    for parameter in model.model.layers[2].parameters():
        parameter.data *= 0.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


@pytest.mark.more
def test_a_profile_of_every_block(full, onelayer):  # noqa: F811
    found = transplant_profile(DEMO, str(full), "arithmetic", problems=24, samples=2)
    task = load_task("arithmetic")
    rows, sampling = task.rows("test", 24, 0), Sampling(samples=2, batch_size=64)
    scores = []
    for folder in (DEMO, full):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        scores.append(evaluate(model, tokenizer, task, rows, sampling).scores)
    base, after = scores
    assert found.full_gain == gain(after, base) and found.full_gain[0] != 0
    # only block 2 differs, so in the base it makes the full model, and every other block changes nothing
    assert [found.gains[k] for k in range(12)] == [found.full_gain[0] if k == 2 else 0.0 for k in range(12)]
    share = layer_contribution(after, base, after)
    assert (found.shares[2], found.undefined) == (share.value, share.reason)

    few = ["--transplant", "arithmetic", "--problems", 24, "--samples", 2]
    code, _, out = onelayer("analyze", DEMO, full, *few, "--json")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(found.to_json()))
    code, _, out = onelayer("analyze", DEMO, full, *few)
    assert code == 0 and f"{found.base_score + found.gains[2]:.4f}" in out and "Nothing was trained" in out


def test_one_problem_is_too_few():
    with pytest.raises(ValueError, match=r"^problems must be at least 2, got 1: of one problem"):
        transplant_profile(DEMO, DEMO, "arithmetic", problems=1)


def test_what_cannot_be_transplanted_is_one_line(onelayer, tmp_path):  # noqa: F811
    (tmp_path / "adapter_config.json").write_text("{}")
    for given, message in (
        ([tmp_path, "--transplant", "arithmetic"], "is an adapter; a transplant needs the whole model"),
        ([DEMO, DEMO, "--transplant", "arithmetic"], "--transplant takes one OTHER"),
        ([DEMO, "--transplant", "nosuch"], "nosuch"),
    ):
        code, lines, out = onelayer("analyze", DEMO, *given)
        assert code == 1 and message in lines[-1] and len(lines) == 1 and not out, lines
