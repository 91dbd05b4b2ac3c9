"""Code of the plain model that writes to a module's weights reaches the weights in effect, or is refused."""

import pytest
import torch
from torch import nn

from models import build, build_architecture
from peft_onelayer import SingleLayerConfig
from tuner.helpers import base_weights, logits, masters, move, same, tuner_layers, wrap

NAME = "model.layers.2.mlp.down_proj."
DTYPES = (torch.float32, torch.bfloat16)


def wrapped(dtype, family: str = "Qwen2", **config):
    """A model whose linear layers in attention have biases, its adapter moved, and a wrapped module of the MLP."""
    model = wrap(build(family, dtype=dtype), **config)
    move(model, scale=0.3)
    return model, model.get_base_model().model.layers[2].mlp.down_proj


def fill_data(module):
    module.weight.data.fill_(0.5)


def assign_data(module):
    module.weight.data = torch.full_like(module.weight, 0.5)


def initialise(module):
    nn.init.constant_(module.weight, 0.5)


def multiply(module):
    with torch.no_grad():
        module.weight.mul_(0).add_(0.5)


def operate(module):
    with torch.no_grad():
        weight = module.weight
        weight *= 0
        weight += 0.5


def copy(module):
    with torch.no_grad():
        module.weight.copy_(torch.full(module.weight.shape, 0.5))


def index(module):
    module.weight.data[:] = 0.5


def view(module):
    with torch.no_grad():
        module.weight.view(-1).t().fill_(0.5)


def rows(module):
    for row in module.weight.detach():
        row.fill_(0.5)


def out(module):
    with torch.no_grad():
        torch.full(module.weight.shape, 0.5, dtype=module.weight.dtype, out=module.weight)


def assign(module):
    module.weight = nn.Parameter(torch.full(module.weight.shape, 0.5))


def replace(module):
    setattr(module, "weight", nn.Parameter(torch.full(module.weight.shape, 0.5, dtype=torch.float64)))  # noqa: B010


def inference(module):
    with torch.inference_mode():
        module.weight.fill_(0.5)


WRITES = [
    fill_data,
    assign_data,
    initialise,
    multiply,
    operate,
    copy,
    index,
    view,
    rows,
    out,
    assign,
    replace,
    inference,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_writes_reach_the_master(write, dtype):
    model, module = wrapped(dtype)
    base, others = base_weights(model), {n: p.clone() for n, p in masters(model).items() if n != NAME + "weight"}
    write(module)
    assert (masters(model)[NAME + "weight"] == 0.5).all()
    assert masters(model)[NAME + "weight"].dtype == torch.float32
    assert torch.equal(module.weight, torch.full_like(module.weight, 0.5))
    assert same(base_weights(model), base)
    assert same({n: p.clone() for n, p in masters(model).items() if n != NAME + "weight"}, others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_is_what_a_plain_model_computes_with(dtype):
    model, module = wrapped(dtype)
    merged = wrapped(dtype)[0].merge_and_unload()
    for each in (module, merged.model.layers[2].mlp.down_proj):
        each.weight.data.fill_(0.25)
    assert torch.equal(logits(model), logits(merged))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reset_parameters(dtype):
    model, module = wrapped(dtype)
    base = base_weights(model)
    plain = nn.Linear(48, 32, bias=False, dtype=dtype)
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    plain.reset_parameters()
    assert torch.equal(masters(model)[NAME + "weight"].to(dtype), plain.weight)
    assert same(base_weights(model), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_and_a_composite_modules_own_parameters(dtype):
    model = wrap(build_architecture("gpt_oss", dtype=dtype), layer=2)
    move(model, scale=0.3)
    block = model.get_base_model().model.layers[2]
    with torch.no_grad():
        block.self_attn.q_proj.bias.zero_()
        block.self_attn.sinks.fill_(2)
        block.mlp.experts.gate_up_proj.data.mul_(0)
        block.mlp.router.weight = nn.Parameter(torch.ones_like(block.mlp.router.weight))
    expected = {"self_attn.q_proj.bias": 0, "self_attn.sinks": 2, "mlp.experts.gate_up_proj": 0, "mlp.router.weight": 1}
    for name, value in expected.items():
        assert (masters(model)[f"model.layers.2.{name}"] == value).all(), name


def test_a_part_that_is_written_leaves_the_rest_of_the_master_alone():
    """Rounding the master would undo updates that bfloat16 cannot show."""
    model, module = wrapped(torch.bfloat16)
    before = masters(model)[NAME + "weight"].detach().clone()
    with torch.no_grad():
        module.weight[3].zero_()
        torch.zeros(32, 48).copy_(module.weight)  # reads only
        module.weight.add_(0)  # changes nothing
    after = masters(model)[NAME + "weight"]
    assert (after[3] == 0).all()
    assert torch.equal(after[:3], before[:3]) and torch.equal(after[4:], before[4:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_freezing_and_gradients_are_the_masters(dtype):
    model, module = wrapped(dtype)
    master = masters(model)[NAME + "weight"]
    module.weight.requires_grad_(False)
    assert not master.requires_grad
    module.weight.requires_grad = True
    assert master.requires_grad
    master.grad = torch.ones_like(master)
    assert module.weight.grad is master.grad
    module.weight.grad = None
    assert master.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_whole_model_is_initialised_anew(dtype):
    def constant(module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)

    model, _ = wrapped(dtype)
    model.apply(constant)
    assert all((p == 0.5).all() for n, p in masters(model).items() if n.endswith("_proj.weight"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_models_own_initialisation_of_a_module(dtype):
    model, module = wrapped(dtype)
    base = base_weights(model)
    before = masters(model)[NAME + "weight"].detach().clone()
    torch.manual_seed(5)
    model._init_weights(module)
    plain = nn.Linear(48, 32, bias=False)
    torch.manual_seed(5)
    model.get_base_model()._init_weights(plain)
    assert torch.equal(masters(model)[NAME + "weight"], plain.weight) and not torch.equal(plain.weight, before)
    assert same(base_weights(model), base)


def test_without_an_adapter_in_effect_the_base_is_written():
    model, module = wrapped(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in masters(model).items()}
    with model.disable_adapter():
        fill_data(module)
    assert (module.base_layer.weight == 0.5).all()
    assert same({n: p.detach() for n, p in masters(model).items()}, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_write_to_several_adapters_is_refused(dtype):
    model, module = wrapped(dtype)
    model.add_adapter("b", SingleLayerConfig(layer=2))
    move(model, "b", scale=0.3)
    model.base_model.set_adapter(["default", "b"])
    before = {a: {n: p.detach().clone() for n, p in masters(model, a).items()} for a in ("default", "b")}
    for write in (fill_data, initialise, assign):
        with pytest.raises(RuntimeError, match=r"default, b are in effect together.*set_adapter") as error:
            write(module)
        assert "\n" not in str(error.value)
    assert all(same({n: p.detach() for n, p in masters(model, a).items()}, before[a]) for a in before)


@pytest.mark.parametrize("value", [nn.Parameter(torch.ones(3, 3)), None, 5], ids=["shape", "none", "number"])
def test_what_is_no_weight_of_that_shape_is_refused(value):
    model, module = wrapped(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in masters(model).items()}
    with pytest.raises(ValueError, match=r"weight of a trained Linear has shape \(32, 48\); .* was given") as error:
        module.weight = value
    assert "\n" not in str(error.value)
    assert same({n: p.detach() for n, p in masters(model).items()}, before)


def test_reading_is_as_before():
    """What is computed of a weight is a plain tensor with the gradient of the master."""
    model, module = wrapped(torch.bfloat16)
    weight = module.weight
    assert weight.dtype == torch.bfloat16 and weight.shape == (32, 48) and isinstance(weight, torch.Tensor)
    total = (weight.float() ** 2).sum()
    assert type(total) is torch.Tensor and type(weight + 1) is torch.Tensor
    total.backward()
    master = masters(model)[NAME + "weight"]
    assert torch.equal(master.grad, (2 * master.detach().bfloat16().float()).bfloat16().float())
    assert len(tuner_layers(model)) == 9
