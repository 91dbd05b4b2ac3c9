"""Models that torch wraps, before or after the adapter: torch.compile, data parallelism, activation checkpoints,
dynamic quantization."""

import copy
import sys
import threading

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel.replicate import replicate

from models import build, build_architecture, token_batch
from peft_onelayer.sparse.names import unwrapped
from tuner.helpers import base_weights, logits, masters, move, same, tuner_layers, wrap

WEIGHTS = "adapter_model.safetensors"


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def each_block(model: nn.Module, how) -> nn.Module:
    layers = model.model.layers
    for index in range(len(layers)):
        layers[index] = how(layers[index])
    return model


def compile_before(model):
    return wrap(compiled(model))


def compile_blocks_before(model):
    return wrap(each_block(model, compiled))


def compile_a_part_before(model):
    model.model.layers[2].mlp = compiled(model.model.layers[2].mlp)
    return wrap(model)


def compile_after(model):
    return compiled(wrap(model))


def compile_inside_after(model):
    wrapped = wrap(model)
    model.model = compiled(model.model)
    return wrapped


def compile_blocks_after(model):
    wrapped = wrap(model)
    each_block(model, compiled)
    return wrapped


def compile_a_module_after(model):
    wrapped = wrap(model)
    mlp = model.model.layers[2].mlp
    mlp.up_proj = compiled(mlp.up_proj)
    return wrapped


def checkpoint_blocks_before(model):
    return wrap(each_block(model, checkpoint_wrapper))


def checkpoint_blocks_after(model):
    wrapped = wrap(model)
    each_block(model, checkpoint_wrapper)
    return wrapped


def parallel_before(model):
    return wrap(nn.DataParallel(model))


def parallel_inside_after(model):
    wrapped = wrap(model)
    wrapped.base_model.model = nn.DataParallel(model)
    return wrapped


WAYS = [compile_before, compile_blocks_before, compile_a_part_before, compile_after, compile_inside_after]
WAYS += [compile_blocks_after, compile_a_module_after, checkpoint_blocks_before, checkpoint_blocks_after]
WAYS += [parallel_before, parallel_inside_after]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_adapter_is_saved_under_the_plain_models_names(way, tmp_path):
    model, plain = way(build()), wrap()
    for each in (model, plain):
        for index, parameter in enumerate(p for p in each.parameters() if p.requires_grad):
            parameter.data += 0.01 * (index + 1)
    model.save_pretrained(tmp_path / "wrapped")
    plain.save_pretrained(tmp_path / "plain")
    assert same(load_file(tmp_path / "wrapped" / WEIGHTS), load_file(tmp_path / "plain" / WEIGHTS))
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path / "wrapped")), logits(plain.eval()))


@pytest.mark.parametrize("way", ["blocks", "whole", "parallel", "checkpoints"])
def test_it_is_loaded_into_a_wrapped_model(way, tmp_path):
    plain = wrap()
    move(plain)
    plain.save_pretrained(tmp_path)
    base = build()
    base = {
        "blocks": lambda: each_block(base, compiled),
        "whole": lambda: compiled(base),
        "parallel": lambda: nn.DataParallel(base),
        "checkpoints": lambda: each_block(base, checkpoint_wrapper),
    }[way]()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert same(
        {unwrapped(n).removeprefix("module."): p.detach() for n, p in masters(loaded).items()},
        {n: p.detach() for n, p in masters(plain).items()},
    )


@pytest.mark.parametrize("extra", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_file_with_a_wrappers_names_loads(extra, tmp_path):
    """As earlier versions, or a state dict of one's own, wrote them."""
    model = wrap()
    move(model)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    prefix = "base_model.model."
    save_file({prefix + extra + key.removeprefix(prefix): tensor for key, tensor in state.items()}, tmp_path / WEIGHTS)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_parts_of_a_compiled_block_are_chosen_by_their_names(tmp_path):
    model = wrap(each_block(build(), compiled), target_modules="all-linear")
    assert model.peft_config["default"].target_modules[0] == "self_attn.q_proj"
    move(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert len(masters(loaded)) == 7


def test_a_head_inside_a_compiled_model_is_not_saved_under_a_name_that_does_not_load(tmp_path):
    model = wrap(compiled(build()), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head of modules_to_save.*torch\.compile.*compile the PeftModel") as error:
        model.save_pretrained(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / WEIGHTS).exists()


@pytest.fixture
def replicas(monkeypatch):
    """`nn.DataParallel`'s replicas on the CPU: all but the broadcast, which needs CUDA, is torch's."""

    def broadcast(tensors, devices, detach=False):
        return [[t.detach() if detach else t.view_as(t) for t in tensors] for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]  # `torch.nn.parallel` has a function of that name
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    return lambda model: replicate(model, [0, 1])


def in_threads(models, calls) -> list:
    results: list = [None] * len(models)

    def run(i: int) -> None:
        with torch.set_grad_enabled(True):
            results[i] = calls(models[i], i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_replicas_train_the_adapter(replicas, family, checkpointing):
    """Their losses and gradients are those of the model itself, and their graph is cut as its is."""
    model = wrap(build_architecture(family, dtype=torch.bfloat16), layer=2)
    move(model, scale=0.3)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().enable_input_require_grads()
    model.train()

    def loss(each, i):
        return each(input_ids=token_batch(seed=i), labels=token_batch(seed=i), use_cache=False).loss

    expected = [loss(model, i) for i in range(2)]
    sum(expected).backward()
    gradients = {n: p.grad.clone() for n, p in masters(model).items()}
    model.zero_grad()
    found = in_threads(replicas(model), loss)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    sum(found).backward()
    assert same({n: p.grad for n, p in masters(model).items()}, gradients)


def test_replicas_without_the_adapter_are_the_base(replicas):
    model = wrap(build(dtype=torch.bfloat16)).eval()
    move(model, scale=0.3)
    base = base_weights(model)
    tuned = logits(model)
    with model.disable_adapter():
        expected = logits(model)
        found = in_threads(replicas(model), lambda each, i: logits(each))
    assert all(torch.equal(got, expected) for got in found) and not torch.equal(tuned, expected)
    assert all(torch.equal(got, tuned) for got in in_threads(replicas(model), lambda each, i: logits(each)))
    assert same(base_weights(model), base)


def test_a_frozen_adapter_is_refused_in_replicas_by_its_own_name(replicas):
    model = wrap().train()
    model.set_requires_grad("default", False)
    with pytest.raises(RuntimeError, match="default is frozen"):
        replicas(model)[0](input_ids=token_batch(), labels=token_batch())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("how", ["quantize_dynamic"])
def test_dynamic_quantization_of_a_wrapped_model_says_what_to_do(how):
    model = wrap().eval()
    move(model, scale=0.3)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(RuntimeError, match=r"torch\.ao\.quantization has put a Linear.*merge_and_unload") as error:
        logits(quantized)
    assert "\n" not in str(error.value) and len(tuner_layers(quantized)) == 11
    merged = model.merge_and_unload()
    right = logits(torch.ao.quantization.quantize_dynamic(merged, {nn.Linear}, dtype=torch.qint8))
    assert torch.allclose(right, logits(merged), atol=0.1) and not torch.equal(right, logits(merged))


@pytest.mark.parametrize("targets", [None, ["linear1"], ["self_attn"]])
def test_torchs_own_encoder_gives_in_eval_mode_what_it_gives_in_training(targets):
    """Its fused path, for eval mode, reads tensors from inside its modules."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = wrap(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), layer=1, target_modules=targets)
    move(model, scale=0.5)
    x = torch.randn(2, 5, 16)
    trained = model.train()(x)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    with torch.no_grad():
        assert torch.allclose(model(x), trained, atol=1e-5)  # the other layers are fused
        assert not torch.allclose(base, trained, atol=0.1)
