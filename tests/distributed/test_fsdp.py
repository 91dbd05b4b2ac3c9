"""FSDP2 on two processes equals one process, saves the full adapter and merges; what would be silent is refused."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tuner.helpers import base_weights, logits, move, same, wrap

from distributed.launch import run_on_two
from distributed.runs import copies, distance, fresh, masked, train
from models import build

pytestmark = pytest.mark.more

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
POLICIES = ("blocks", "kept", "root", "mixed_precision", "cpu_offload", "accelerate", "accelerate-ram")
TRAINING = [
    *((policy, "bfloat16", "plain") for policy in POLICIES),
    ("blocks", "float32", "plain"),
    ("cpu_offload", "float32", "plain"),
    ("accelerate-ram", "float32", "non_reentrant"),
    ("blocks", "float32", "non_reentrant"),
    ("blocks", "float32", "reentrant"),
    ("mixed_precision", "float32", "plain"),
]
INSIDE = {"base_layer": "inside the trained block", "masters": "inside the trained block", "tuner_layer": None}
FSDP1 = {
    ("peft", True): "inside the trained block",
    ("peft", False): "inside the trained block",
    ("blocks", True): "has lost its parameters",
    ("blocks", False): "requires_grad",  # FSDP1's own refusal
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    run_on_two(Path(__file__).with_name("fsdp_worker.py"), folder)
    return torch.load(folder / "fsdp.pt")


@pytest.mark.parametrize("case", TRAINING, ids="-".join)
def test_training_equals_one_process_and_saves_the_full_adapter(results, case):
    policy, dtype, checkpointing = case
    found, model = results["training"][case], fresh(DTYPES[dtype], checkpointing)
    start, base = copies(model), base_weights(model)
    losses = torch.stack(train(model))
    # In bfloat16 a batch split in two rounds its sums at other places: up to 2 ** -8 of each.
    exact = dtype == "float32" and policy != "mixed_precision"
    torch.testing.assert_close(found["losses"], losses, rtol=1e-6 if exact else 2e-4, atol=0)
    tuned = found["masters"]
    assert {w.dtype for w in tuned.values()} == {torch.float32}
    assert not any(torch.equal(w, start[name]) for name, w in tuned.items())
    assert same(found["base"], base)
    if exact:
        assert distance(tuned, copies(model)) < 1e-6
    moved = {name: w - start[name] for name, w in tuned.items()}
    assert distance(moved, {name: w - start[name] for name, w in copies(model).items()}) < (1e-5 if exact else 0.05)

    saved = load_file(Path(found["adapter"]) / "adapter_model.safetensors")
    assert len(saved) == len(tuned) == 11
    loaded = PeftModel.from_pretrained(build(dtype=DTYPES[dtype]), found["adapter"])
    assert same(copies(loaded), tuned)
    assert not Path(found["adapter"]).with_name("process-1").exists()


def test_entries_under_a_mask_train_as_in_one_process(results, tmp_path):
    found, model = results["mask"], masked(tmp_path)
    start = copies(model)
    torch.testing.assert_close(found["losses"], torch.stack(train(model)), rtol=1e-6, atol=0)
    assert found["masters"].keys() == start.keys() and all(w.dim() == 1 for w in found["masters"].values())
    assert not any(torch.equal(w, start[name]) for name, w in found["masters"].items())
    assert distance(found["masters"], copies(model)) < 1e-6
    loaded = PeftModel.from_pretrained(build(), found["adapter"])
    assert torch.allclose(logits(loaded), logits(model.eval()), atol=1e-6)
    merged = base_weights(loaded.merge_and_unload())
    mask = load_file(tmp_path / "mask.safetensors")
    for name, weight in base_weights(build()).items():
        frozen = ~mask.get(name, torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(merged[name][frozen], weight[frozen])


def test_mixed_precision_keeps_the_masters_in_float32(results):
    """A bfloat16 base computes the same with the policy as without, whose masters the shards are."""
    with_policy = results["training"]["mixed_precision", "bfloat16", "plain"]
    without = results["training"]["blocks", "bfloat16", "plain"]
    assert torch.equal(with_policy["losses"], without["losses"])
    rounded = {n: w.bfloat16().float() for n, w in with_policy["masters"].items()}
    assert not any(torch.equal(w, rounded[name]) for name, w in with_policy["masters"].items())


@pytest.mark.parametrize("policy", ["blocks", "kept", "root"])
def test_merge_writes_the_shards_and_unmerge_restores_them(results, policy):
    found = results["merging"][policy]
    model = wrap(build(dtype=torch.bfloat16), layer=2)
    moved = move(model, scale=0.3)
    base = base_weights(model)
    adapter = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    assert torch.equal(found["adapter"], adapter) and torch.equal(found["merged"], adapter)
    assert torch.equal(found["unmerged"], adapter) and torch.equal(found["base"], plain)
    assert same(found["merged_base"], {**base, **{name: w.bfloat16() for name, w in moved.items()}})
    assert found["restored"]
    assert "unmerge_adapter()" in found["disabled"]


@pytest.mark.parametrize("what", INSIDE)
def test_fully_shard_inside_the_trained_block(results, what):
    kind, message = results["inside"][what]
    if INSIDE[what] is None:
        assert kind == "adapter"
    else:
        assert kind == "RuntimeError" and INSIDE[what] in message and "\n" not in message


@pytest.mark.parametrize("case", FSDP1, ids=str)
def test_fsdp1_is_refused(results, case):
    kind, message = results["fsdp1"][case]
    assert kind in ("RuntimeError", "ValueError") and FSDP1[case] in message
    if kind == "RuntimeError":
        assert "FSDP2" in message and "\n" not in message


def test_merging_under_fsdp1_is_refused(results):
    kind, message = results["merge_fsdp1"]
    assert kind == "RuntimeError" and "use FSDP2" in message


def test_an_adapter_added_after_sharding_is_refused(results):
    kind, message = results["add_after_sharding"]
    assert kind == "RuntimeError" and "first, then shard" in message
