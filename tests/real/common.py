"""What the tests of real models share."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_onelayer import merge_into_checkpoint

SUMS = str(Path(__file__).with_name("sums.py"))
IDS = torch.arange(3, 27).reshape(2, 12)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def moved(base, adapter, out):
    """The blocks of which a tensor differs in the merged model, whose other tensors are the base's bits."""
    merge_into_checkpoint(base, adapter, out)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (base, out))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == value.dtype == torch.bfloat16 for name, value in before.items())
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    return {int(match.group(1)) if (match := re.search(r"layers\.(\d+)\.", name)) else name for name in changed}
