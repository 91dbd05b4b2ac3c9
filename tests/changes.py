"""Checkpoints and adapters of the tests: what was changed in them is known."""

from __future__ import annotations

import json

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_onelayer import SingleLayerConfig

TOLERANCES = {"0": 0.0, "1e-08": 1e-8, "1e-05": 1e-5, "0.0001": 1e-4}


def save_tensors(folder, tensors):
    """A checkpoint of a model that transformers does not know: names are those in the file."""
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "none_of_transformers"}), encoding="utf-8")
    return folder


def load_tensors(folder):
    return load_file(folder / "model.safetensors")


def save_adapter(folder, base, layer, *, seed=0, share=0.3, size=1e-3, still=(), **config):
    """An adapter a share of whose entries moved by about `size`, and those whose names end in one of `still` not."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = get_peft_model(model, SingleLayerConfig(layer=layer, task_type="CAUSAL_LM", **config))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(part in name for part in still):
            parameter.data += size * torch.randn_like(parameter) * (torch.rand_like(parameter) < share)
    model.save_pretrained(folder)
    return folder
