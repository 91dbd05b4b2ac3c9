"""Sync of the trained block alone: what is sent, and that the engine has the policy's weights bit for bit after it."""

import copy
import random
import warnings

import pytest
import torch
from safetensors.torch import save_file
from tuner.helpers import masters, move, same, wrap

from models import build, build_architecture
from peft_onelayer.rl.engines import InProcess
from peft_onelayer.rl.sync import LayerSync
from vllm_sync.engine import LLM, Engine

BF16 = torch.bfloat16


def plain(model) -> dict[str, torch.Tensor]:
    """Copies of the weights of the model that the policy stands for."""
    merged = copy.deepcopy(model).merge_and_unload()
    return {name: p.detach().clone() for name, p in merged.named_parameters()}


def in_engine(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


class Pair:
    """A policy and an engine that has been pushed to once."""

    def __init__(self, model, engine_dtype=None, changed_only=True, takes=("tensors", "entries")):
        base = copy.deepcopy(model.get_base_model())
        self.model = model
        served = copy.deepcopy(model).merge_and_unload()
        for parameter in served.parameters():
            parameter.data.normal_()  # only a push can make it right
        self.engine = Engine(served if engine_dtype is None else served.to(engine_dtype))
        del base
        channel = InProcess(LLM(self.engine))
        channel.takes_tensors, channel.takes_entries = "tensors" in takes, "entries" in takes
        self.sync = LayerSync(model, channel, changed_only)
        self.push()

    def push(self):
        """Returns what was sent by the one push."""
        before = len(self.sync.pushes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.sync.push()
        self.engine.reset_prefix_cache()
        self.check()
        assert len(self.sync.pushes) == before + 1
        return self.sync.pushes[-1]

    def check(self):
        expected = plain(self.model)
        held = in_engine(self.engine)
        assert same(held, {name: tensor.to(held[name].dtype) for name, tensor in expected.items()})


def block_bytes(model, index, itemsize=2):
    return itemsize * sum(p.numel() for n, p in plain(model).items() if f"layers.{index}." in n)


def test_first_everything_then_what_has_changed():
    pair = Pair(wrap(build(dtype=BF16)))
    first = pair.sync.pushes[0]
    everything = plain(pair.model)
    assert (first.why, first.tensors, first.entries) == ("first", len(everything), 0)
    assert first.nbytes == sum(t.nbytes for t in everything.values())
    before = plain(pair.model)
    for parameter in masters(pair.model).values():
        parameter.data[..., :1] += 0.5
    after = plain(pair.model)
    count = sum(int((before[n] != after[n]).sum()) for n in after)
    push = pair.push()
    assert (push.why, push.entries) == ("changes", count)
    assert push.nbytes == count * (4 + 2) and push.tensors == 0
    assert pair.push().nbytes == 0  # nothing has changed


def test_movements_below_the_engines_rounding_are_not_sent():
    pair = Pair(wrap(build(dtype=BF16)))
    for parameter in masters(pair.model).values():
        parameter.data *= 1 + 1e-6
    push = pair.push()
    assert 0 <= push.entries < 10
