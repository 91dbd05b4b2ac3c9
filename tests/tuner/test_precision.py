"""float32 masters: where they are kept, and what gives them up."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

from models import build, token_batch
from peft_onelayer import SingleLayerConfig
from tuner.helpers import DTYPES, base_weights, logits, masters, move, same, train, wrap

HALF = (torch.bfloat16, torch.float16)
half_bases = pytest.mark.parametrize("dtype", HALF, ids=str)


def dtypes(model, adapter: str = "default") -> set[torch.dtype]:
    return {p.dtype for p in masters(model, adapter).values()}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_masters_are_float32_or_wider(dtype):
    model = wrap(build(dtype=dtype))
    assert dtypes(model) == {torch.promote_types(dtype, torch.float32)}
    assert {w.dtype for w in base_weights(model).values()} == {dtype}
    assert all(torch.equal(p.to(dtype), base_weights(model)[name]) for name, p in masters(model).items())
    assert logits(model).dtype == dtype


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "to_device_and_dtype": lambda model: model.to("cpu", torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "type": lambda model: model.type(torch.bfloat16),
    "twice": lambda model: model.half().to(torch.bfloat16),
    "inner": lambda model: (model.get_base_model().to(torch.bfloat16), model)[1],
    "block": lambda model: (model.get_base_model().model.layers[2].to(torch.bfloat16), model)[1],
    "deepcopy": lambda model: copy.deepcopy(model.bfloat16()),
    "kbit": lambda model: prepare_model_for_kbit_training(model).bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_masters_survive_casting_the_model(cast):
    model = wrap(build())
    tuned = move(model)
    result = cast(model)
    assert same({n: p.detach() for n, p in masters(result).items()}, tuned)
    assert base_weights(result)["model.layers.2.mlp.up_proj.weight"].dtype in HALF
    assert dtypes(result) == {torch.float32}


def test_casting_keeps_the_parameters_and_their_gradients():
    model = wrap(build(dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW(masters(model).values(), lr=1e-2)
    model(token_batch(), labels=token_batch()).loss.backward()
    held = {name: (p, p.grad.clone()) for name, p in masters(model).items()}
    model.to(torch.bfloat16)
    for name, parameter in masters(model).items():
        assert parameter is held[name][0] and torch.equal(parameter.grad, held[name][1])
        assert parameter.grad.dtype == torch.float32
    optimizer.step()  # the optimizer still holds the right tensors
    assert not any(torch.equal(p, base_weights(model)[n].float()) for n, p in masters(model).items())


def test_double_widens():
    model = wrap(build(dtype=torch.bfloat16))
    tuned = move(model)
    model.double()
    assert dtypes(model) == {torch.float64} and logits(model).dtype == torch.float64
    assert all(torch.equal(p, tuned[name].double()) for name, p in masters(model).items())


def test_masters_return_when_something_assigns_narrow_data():
    """TRL does so for a quantized model; the trained block itself is not quantized then."""
    model = wrap(build(dtype=torch.bfloat16))
    start = {name: p.detach().clone() for name, p in masters(model).items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    train(model, steps=1)
    assert dtypes(model) == {torch.float32}
    fresh = wrap(build(dtype=torch.bfloat16))
    train(fresh, steps=1)
    assert same(masters(model), masters(fresh)) and not same(masters(model), start)


def test_masters_of_an_emptied_model():
    model = wrap(build(dtype=torch.bfloat16).to("meta")).to_empty(device="cpu")
    assert dtypes(model) == {torch.float32} and {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.fixture
def saved(tmp_path):
    """A function that trains an adapter on a base of some dtype and returns its folder and its tensors."""

    def save(dtype, **config):
        model = wrap(build(dtype=dtype), **config)
        tuned = move(model)
        model.save_pretrained(tmp_path)
        return tmp_path, tuned

    return save


@half_bases
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_masters_survive_loading(saved, dtype, low_cpu_mem_usage, is_trainable):
    folder, tuned = saved(dtype)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable}
    model = PeftModel.from_pretrained(build(dtype=dtype), folder, **options)
    model.load_adapter(folder, "second", **options)
    model.add_adapter("third", SingleLayerConfig(layer=1), low_cpu_mem_usage=low_cpu_mem_usage)
    for name in ("default", "second"):
        assert same({n: p.detach() for n, p in masters(model, name).items()}, tuned)
        assert {p.requires_grad for p in masters(model, name).values()} == {is_trainable}
    assert dtypes(model, "third") == {torch.float32}
    assert {p.device.type for p in masters(model, "third").values()} == {"meta" if low_cpu_mem_usage else "cpu"}


@half_bases
def test_masters_survive_transformers_own_adapters(saved, tmp_path, dtype):
    folder, tuned = saved(dtype)
    model = build(dtype=dtype)
    model.add_adapter(SingleLayerConfig(layer=1), "fresh")
    with pytest.warns(UserWarning, match="multiple adapters"):
        model.load_adapter(folder, "loaded")
    assert dtypes(model, "fresh") == {torch.float32}
    assert same({n: p.detach() for n, p in masters(model, "loaded").items()}, tuned)
    build(dtype=dtype).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    model.load_adapter(folder)
    assert same({n: p.detach() for n, p in masters(model).items()}, tuned)


@half_bases
def test_masters_in_the_dtype_of_the_base(saved, dtype):
    folder, tuned = saved(dtype, master_dtype="base")
    assert {w.dtype for w in tuned.values()} == {dtype}
    for low_cpu_mem_usage in (False, True):
        model = PeftModel.from_pretrained(build(dtype=dtype), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert same({n: p.detach() for n, p in masters(model).items()}, tuned)
    model.to(torch.float32)
    assert dtypes(model) == {torch.float32}  # they follow the base


def caught(function, *args, **kwargs):
    """The result, and the warnings about lost precision."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    return result, [w for w in record if "master weights" in str(w.message)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("master_dtype", ["float32", "base"])
def test_without_autocast_the_dtype_is_the_bases_and_a_loss_is_warned_of(dtype, master_dtype):
    config = SingleLayerConfig(layer=2, master_dtype=master_dtype)
    model, found = caught(get_peft_model, build(dtype=dtype), config, autocast_adapter_dtype=False)
    assert dtypes(model) == {dtype}
    assert len(found) == (dtype != torch.float32 and master_dtype == "float32")
    model.to(torch.bfloat16)
    assert dtypes(model) == {torch.bfloat16}  # they are masters no longer
    other = SingleLayerConfig(layer=1, master_dtype=master_dtype)
    _, found = caught(model.add_adapter, "other", other, autocast_adapter_dtype=False)
    assert dtypes(model, "other") == {torch.bfloat16} and len(found) == (master_dtype == "float32")


@half_bases
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_without_autocast(saved, dtype, is_trainable, low_cpu_mem_usage):
    folder, tuned = saved(dtype)
    options = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": False}
    model, found = caught(PeftModel.from_pretrained, build(dtype=dtype), folder, **options)
    assert bool(found) == is_trainable
    assert all(torch.equal(p, tuned[name].to(dtype)) for name, p in masters(model).items())
    full = PeftModel.from_pretrained(build(dtype=dtype), folder)
    assert torch.equal(logits(model), logits(full))


@half_bases
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.filterwarnings("ignore:autocast_adapter_dtype=False")
def test_a_file_in_half_precision_is_widened(tmp_path, dtype, low_cpu_mem_usage):
    model = wrap(build(dtype=dtype))
    model.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=False)
    tuned = move(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(dtype=dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert dtypes(loaded) == {torch.float32}
    assert all(torch.equal(p, tuned[name].float()) for name, p in masters(loaded).items())


def test_autocast_during_training_gives_the_gradients_of_full_fine_tuning():
    """A float32 model under torch.autocast, as with a trainer's bf16=True."""
    reference, model = build(), wrap(build())
    with torch.autocast("cpu", torch.bfloat16):
        for m in (reference, model):
            m(token_batch(), labels=token_batch()).loss.backward()
    for name, parameter in masters(model).items():
        assert torch.equal(parameter.grad, reference.get_parameter(name).grad), name
