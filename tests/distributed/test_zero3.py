"""ZeRO-3's partitioned parameters, with a stand-in for DeepSpeed that empties and restores tensors as it does.

`test_deepspeed.py` (slow) runs the real one.
"""

import enum
import sys
import types

import pytest
import torch
from tuner.helpers import base_weights, move, same, tuner_layers, wrap

from distributed.runs import copies
from models import build


class Status(enum.Enum):  # deepspeed.runtime.zero.partition_parameters.ZeroParamStatus
    AVAILABLE = 1
    NOT_AVAILABLE = 2


class GatheredParameters:
    """deepspeed.zero.GatheredParameters: what is written is kept if `modifier_rank` is given; it refuses to nest."""

    def __init__(self, params, modifier_rank=None):
        self.params, self.keep = list(params), modifier_rank is not None

    def __enter__(self):
        for parameter in self.params:
            if parameter.ds_status is Status.AVAILABLE:
                raise RuntimeError("Nested GatheredParameters contexts cannot overlap parameters")
            parameter.data, parameter.ds_status = parameter.whole.clone(), Status.AVAILABLE

    def __exit__(self, *_):
        for parameter in self.params:
            partition(parameter, parameter.data if self.keep else parameter.whole)


def partition(parameter, whole=None):
    parameter.whole = (parameter.data if whole is None else whole).clone()
    parameter.data, parameter.ds_status = torch.empty(0, dtype=parameter.dtype), Status.NOT_AVAILABLE


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch):
    module, zero = types.ModuleType("deepspeed"), types.ModuleType("deepspeed.zero")
    module.zero, zero.GatheredParameters = zero, GatheredParameters
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    monkeypatch.setitem(sys.modules, "deepspeed.zero", zero)


@pytest.fixture
def partitioned():
    """A bfloat16 model with an adapter on block 2, wrapped while it was partitioned, the masters partitioned too."""
    model = build(dtype=torch.bfloat16)
    for parameter in model.parameters():
        partition(parameter)
    model = wrap(model)
    masters_made = copies(model)
    move(model)
    for layer in tuner_layers(model):
        for parameter in layer.single_layer_params.parameters():
            partition(parameter)
    return model, masters_made


def whole(model):
    assert all(p.ds_status is Status.NOT_AVAILABLE and p.numel() == 0 for p in model.parameters())
    with GatheredParameters(model.parameters()):
        return base_weights(model), copies(model)


def reference():
    model = wrap(build(dtype=torch.bfloat16))
    base, start = base_weights(model), copies(model)
    return base, start, move(model)


def test_masters_are_copies_of_the_whole_weights(partitioned):
    model, masters_made = partitioned
    base, start, moved = reference()
    assert same(masters_made, start)
    found = whole(model)
    assert same(found[0], base) and same(found[1], moved)


@pytest.mark.parametrize("gathered_by_caller", [False, True])
def test_merge_and_unmerge(partitioned, gathered_by_caller):
    model, _ = partitioned
    base, _, moved = reference()
    merged = {**base, **{name: w.bfloat16() for name, w in moved.items()}}
    if gathered_by_caller:  # as TRL does around a push to vLLM; what is written is forgotten at its end
        with GatheredParameters(model.parameters()):
            model.merge_adapter()
            assert same(base_weights(model), merged)
            model.unmerge_adapter()
            assert same(base_weights(model), base)
    else:
        model.merge_adapter(safe_merge=True)
        assert same(whole(model)[0], merged)
        model.unmerge_adapter()
    assert same(whole(model)[0], base) and same(whole(model)[1], moved)


def test_safe_merge_reads_the_whole_masters(partitioned):
    model, _ = partitioned
    master = tuner_layers(model)[0].single_layer_params["default"].weight
    master.whole[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert same(whole(model)[0], reference()[0])


def test_weighted_adapters_are_combined_whole(partitioned):
    model, _ = partitioned
    _, start, moved = reference()
    model.add_weighted_adapter(["default"], [0.5], "mixed")
    found = copies(model, "mixed")
    expected = {n: (start[n].double() + 0.5 * (w.double() - start[n].double())).float() for n, w in moved.items()}
    assert same(found, expected)
