"""The LM head's input on a CPU: contiguous in half precision, so that torch copies no weights, and the same numbers."""

import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from models import FAMILIES, build, token_batch
from peft_onelayer.rollouts.sampling import _generating

from .helpers import move, wrap

ROWS = 6


class HeadInputs(TorchFunctionMode):
    """Whether each input of the linear layer with the weight `weight` is contiguous."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.contiguous = weight, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear and args[1] is self.weight:
            self.contiguous.append(args[0].is_contiguous())
        return function(*args, **(kwargs or {}))


def last_logits(model):
    """Logits of the last position of each row, and whether the head got contiguous inputs."""
    with torch.no_grad(), HeadInputs(model.get_output_embeddings().weight) as inputs:
        logits = model(input_ids=token_batch(ROWS), logits_to_keep=1).logits
    return logits, inputs.contiguous


def test_the_head_of_a_wrapped_model_gets_contiguous_inputs_and_that_of_an_unwrapped_one_what_it_got():
    base = build(dtype=torch.bfloat16).requires_grad_(False)
    bare, contiguous = last_logits(base)
    assert contiguous == [False], "transformers has changed: nothing to be spared"
    model = wrap(base)
    wrapped, contiguous = last_logits(model)
    assert contiguous == [True] and torch.equal(wrapped, bare)
    move(model)
    assert last_logits(copy.deepcopy(model))[1] == [True]
    assert last_logits(model.unload())[1] == [False] and not base.get_output_embeddings()._forward_pre_hooks


def test_our_own_sampling_gives_them_to_any_model():
    base = build(dtype=torch.bfloat16).requires_grad_(False)
    with _generating(base, 0):
        assert last_logits(base)[1] == [True]
    assert last_logits(base)[1] == [False]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_the_numbers_are_the_base_s(family):
    base = build(family).requires_grad_(False)
    assert torch.equal(last_logits(wrap(base))[0], last_logits(build(family).requires_grad_(False))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_half_precision_they_are_those_of_a_head_that_trains(family, dtype):
    """For a head that trains torch makes one product by itself."""
    base = build(family, dtype=dtype).requires_grad_(False)
    wrapped, _ = last_logits(wrap(base))
    base.get_output_embeddings().requires_grad_(True)
    with torch.enable_grad():
        trained = base(input_ids=token_batch(ROWS), logits_to_keep=1).logits
    assert torch.equal(wrapped, trained)
