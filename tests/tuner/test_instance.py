"""What looks through a model in every pass finds what torch's own search finds."""

import copy

import pytest
import torch
from torch import nn

from models import build
from peft_onelayer.tuner.instance import all_modules, all_parameters, own_parameters


def repeated():
    """A module under two names, a weight in two modules, a name without a module, and a weight that is None."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    model[1].append(model[0])
    model.nothing = None
    model.register_module("none", None)
    return model


@pytest.mark.parametrize(
    "model", [repeated(), build("Llama"), build("Mixtral"), nn.Linear(1, 1)], ids=lambda m: type(m).__name__
)
def test_every_module_and_parameter_once(model):
    assert sorted(map(id, all_modules(model))) == sorted(map(id, model.modules()))
    assert sorted(map(id, all_parameters(model))) == sorted(map(id, model.parameters()))


def test_all_but_a_part():
    model = repeated()
    part = model[1]
    outside = [model, *(module for module in model.children() if module is not part)]
    assert model[0] in part.children() and all_modules(model, but=part) == outside
    assert all_modules(model, but=nn.ReLU()) == all_modules(model)


def test_own_parameters_are_those_of_torch():
    module = nn.LSTM(2, 2)
    module.register_parameter("none", None)
    assert list(own_parameters(module).items()) == list(module.named_parameters(recurse=False))
    module.again, module.bias_hh_l0 = module.weight_ih_l0, module.bias_ih_l0
    own = list(own_parameters(module).items())
    assert own == list(module.named_parameters(recurse=False)) and len(own) == 3


def test_a_replica_of_data_parallel_has_its_parameters():
    model = nn.Sequential(nn.Linear(2, 2))
    replica, layer = copy.copy(model), copy.copy(model[0])
    replica._modules = {"0": layer}
    for module, former in ((replica, {}), (layer, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})):
        module._parameters, module._former_parameters = {}, former
    assert list(map(id, all_parameters(replica))) == list(map(id, layer._former_parameters.values()))
