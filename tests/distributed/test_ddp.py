"""Two processes under DistributedDataParallel equal one process on the joint batch.

Compared are, in float32 and after several optimizer steps, each tensor's weights and last gradients, in relative
Frobenius norm: a sum over four rows differs from the mean of two sums over two rows by rounding only. AdamW divides
the gradient by its own size, so an element whose true gradient is zero would turn rounding noise into a step of the
learning rate; over a whole tensor that does not show, element by element it could.
"""

from pathlib import Path

import pytest
import torch
from tuner.helpers import same

from distributed.launch import run_on_two
from distributed.runs import STEPS, copies, distance, fresh, gradients, train

OPTIMIZERS = {"sgd": (torch.optim.SGD, {"lr": 0.1}), "adamw": (torch.optim.AdamW, {"lr": 1e-3})}
CASES = {
    "plain": ("plain", "sgd", {}, 1),
    "adamw": ("plain", "adamw", {}, 1),
    "unused": ("plain", "sgd", {"find_unused_parameters": True}, 1),
    "accumulation": ("plain", "sgd", {}, 2),
    "non_reentrant": ("non_reentrant", "sgd", {}, 1),
    "non_reentrant-unused": ("non_reentrant", "adamw", {"find_unused_parameters": True}, 1),
    "non_reentrant-static": ("non_reentrant", "sgd", {"static_graph": True}, 1),
    "non_reentrant-accumulation": ("non_reentrant", "sgd", {}, 2),
    "reentrant": ("reentrant", "sgd", {}, 1),
    "reentrant-static": ("reentrant", "adamw", {"static_graph": True}, 1),
    "reentrant-accumulation": ("reentrant", "sgd", {}, 2),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    run_on_two(Path(__file__).with_name("ddp_worker.py"), folder)
    return torch.load(folder / "ddp.pt")


@pytest.mark.more
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_on_the_joint_batch(results, case):
    checkpointing, optimizer, _, accumulate = CASES[case]
    model, start = fresh(checkpointing=checkpointing), copies(fresh())
    optimizer_class, settings = OPTIMIZERS[optimizer]
    losses = train(model, optimizer_class, accumulate=accumulate, **settings)
    found = results[case]
    assert len(losses) == STEPS * accumulate
    torch.testing.assert_close(found["losses"], torch.stack(losses), rtol=1e-6, atol=0)
    assert same(found["weights"][0], found["weights"][1])
    assert not any(torch.equal(w, start[name]) for name, w in found["weights"][0].items())
    assert distance(found["weights"][0], copies(model)) < 1e-6
    assert distance(found["gradients"], gradients(model)) < 2e-6  # those of step 3, at weights that differ already
    assert found["cut"] and all(found["cut"])
