"""accelerate's hooks that swap a module's weights around its forward pass: right, or refused."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tuner.helpers import logits, move, tuner_layers, wrap

from models import build

CPU = torch.device("cpu")


def dispatch(model, folder, offloaded):
    inner = "base_model.model.model"
    places = {f"{inner}.layers.{i}": "disk" if i == offloaded else "cpu" for i in range(4)}
    places |= {f"{inner}.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    dispatch_model(
        model, {**places, "base_model.model.lm_head": "cpu"}, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def on_each(model, hook, part):
    for layer in tuner_layers(model):
        add_hook_to_module(getattr(layer, part) if part else layer, hook())


OFFLOADED = {
    "whole_model": lambda model, folder: cpu_offload(model, CPU),
    "to_disk": lambda model, folder: disk_offload(model, folder, CPU),
    "base_layer": lambda model, folder: on_each(model, lambda: AlignDevicesHook(CPU, offload=True), "base_layer"),
    "device_map": lambda model, folder: dispatch(model, folder, offloaded=2),
}
HARMLESS = {
    "device_map_elsewhere": lambda model, folder: dispatch(model, folder, offloaded=0),
    "aligned": lambda model, folder: on_each(model, lambda: AlignDevicesHook(CPU), "base_layer"),
    "whole_tuner_layer": lambda model, folder: on_each(
        model, lambda: AlignDevicesHook(CPU, offload=True, place_submodules=True), ""
    ),
    "model_by_model": lambda model, folder: cpu_offload_with_hook(model, CPU),
}


@pytest.fixture
def model():
    model = wrap(build())
    move(model, scale=0.3)
    return model


@pytest.mark.parametrize("kind", OFFLOADED)
def test_an_offload_of_the_trained_block_is_refused(model, tmp_path, kind):
    OFFLOADED[kind](model, str(tmp_path))
    with pytest.raises(RuntimeError, match="its adapter would have no effect"):
        logits(model)


@pytest.mark.parametrize("kind", HARMLESS)
def test_other_hooks_leave_the_adapter_in_effect(model, tmp_path, kind):
    expected = logits(model)
    HARMLESS[kind](model, str(tmp_path))
    assert torch.equal(logits(model), expected)
