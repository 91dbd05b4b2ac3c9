"""DeepSpeed itself, ZeRO-2 and ZeRO-3, on two CPU processes (`pip install peft-onelayer[deepspeed]`).

Without a trainer: accelerate ignores DeepSpeed on CPU. The path of TRL, which makes a PeftModel without float32 masters
under ZeRO-3 and takes the reference by switching the adapter off, is done by hand.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tuner.helpers import base_weights, logits, move, same, wrap

from distributed.launch import torchrun
from distributed.runs import STEPS, copies, distance, fresh, train
from models import build, token_batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [  # stage, dtype of the base, float32 masters, persistence threshold, gradient checkpointing
    (2, "float32", True, 0, False),
    (2, "bfloat16", False, 0, False),
    (2, "bfloat16", True, 0, False),
    (3, "float32", True, 0, False),
    (3, "float32", True, 0, True),
    (3, "float32", True, 1_000_000, False),
    (3, "bfloat16", False, 0, False),
    (3, "bfloat16", True, 0, False),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    torchrun(Path(__file__).with_name("deepspeed_worker.py"), folder, DS_ACCELERATOR="cpu")
    return torch.load(folder / "deepspeed.pt")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_equals_one_process_and_saves_the_full_adapter(results, case):
    _, dtype, with_masters, _, _ = case
    found, model = results["training"][case], fresh(DTYPES[dtype])
    start, base = copies(model), base_weights(model)
    losses = train(model)
    with torch.no_grad(), model.disable_adapter():
        tokens = token_batch(4, seed=10 * (STEPS - 1))
        losses = torch.stack([*losses, model(input_ids=tokens, labels=tokens).loss])
    assert same(found["base"], base)
    expected_dtype = torch.float32 if with_masters else DTYPES[dtype]
    assert same(found["start"], {name: w.to(expected_dtype) for name, w in start.items()})
    assert {w.dtype for w in found["masters"].values()} == {expected_dtype}
    torch.testing.assert_close(found["losses"], losses, rtol=1e-6 if dtype == "float32" else 2e-4, atol=0)
    # A bfloat16 adapter is DeepSpeed's float32 partition, rounded.
    assert distance(found["masters"], copies(model)) < (1e-6 if dtype == "float32" else 2**-8)
    loaded = PeftModel.from_pretrained(build(dtype=DTYPES[dtype]), found["adapter"])
    assert same(copies(loaded), {name: w.float() for name, w in found["masters"].items()})


def test_zero3_trains_a_bfloat16_adapter_in_float32(results):
    """Without our masters DeepSpeed's own keep what bfloat16 would round away."""
    assert results["training"][3, "bfloat16", False, 0, False]["optimizer_dtypes"] == {torch.float32}


def test_merge_under_zero3(results):
    found, model = results["merging"], wrap(build())
    moved, base = move(model, scale=0.3), base_weights(model)
    adapter = logits(model)
    with model.disable_adapter():
        assert torch.equal(found["disabled"], logits(model))
    assert all(torch.equal(found[name], adapter) for name in ("adapter", "merged", "unmerged"))
    assert same(found["merged_base"], {**base, **moved}) and same(found["merged_by_trl"], {**base, **moved})
    assert same(found["base"], base)
