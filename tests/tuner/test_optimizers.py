"""The optimizers that transformers' Trainer offers treat the masters as they treat the parameters of a plain model."""

import pytest
import torch

from models import build
from tuner.helpers import masters, same, wrap
from tuner.test_resume import assert_equal, state, supervised

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # 8-bit states begin at 4096 elements
FULL_PRECISION = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
# Paging needs a GPU; on a CPU bitsandbytes warns and does without. torchao compiles its step, which takes a while.
QUANTIZED = ["adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit"]
COMPILED = [pytest.param(name, marks=pytest.mark.slow) for name in ("adamw_torch_8bit", "adamw_torch_4bit")]
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def plain():
    """A model of which only block 2 trains, in full."""
    model = build(**SIZES)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("model.layers.2."))
    return model


@pytest.mark.parametrize("name", [*FULL_PRECISION, *QUANTIZED, *COMPILED])
def test_equals_full_training_of_that_block(tmp_path, name):
    options = {"optim": name, "weight_decay": 0.1}
    ours, theirs = wrap(build(**SIZES)), plain()
    start = {n: p.detach().clone() for n, p in masters(ours).items()}
    supervised(tmp_path, ours, **options)
    supervised(tmp_path, theirs, **options)
    trained = {n: p.detach() for n, p in masters(ours).items()}
    assert same(trained, {n: p.detach() for n, p in theirs.named_parameters() if p.requires_grad})
    assert not any(torch.equal(trained[n], start[n]) for n in start)


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adafactor", *QUANTIZED, *COMPILED])
def test_masters_stay_float32_and_the_run_resumes(tmp_path, name):
    def bf16():
        return wrap(build(dtype=torch.bfloat16, **SIZES))

    whole = supervised(tmp_path, bf16(), optim=name)
    assert {p.dtype for p in masters(whole.model).values()} == {torch.float32}
    expected = state(whole)
    quantized = {name.split(".")[0] for name, v in expected["optimizer"].items() if v.dtype == torch.uint8}
    assert len(quantized) == (0 if name in FULL_PRECISION else 5)  # q, o, and the three of the MLP
    resumed = supervised(tmp_path / "resumed", bf16(), str(tmp_path / "checkpoint-2"), optim=name)
    assert_equal(state(resumed), expected)
