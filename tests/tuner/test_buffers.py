"""Buffers of a trained block that training changes are refused: an adapter holds parameters."""

import pytest
import torch
from torch import nn

from models import build_architecture
from tuner.helpers import masters, train, wrap


class Block(nn.Module):
    """A linear layer and whatever buffer a test puts beside it."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = norm or nn.Identity()
        self.changes = lambda block: None

    def forward(self, x):
        self.changes(self)
        return self.norm(self.linear(x))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


NORMS = [nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.InstanceNorm1d(4, track_running_stats=True)]


@pytest.mark.parametrize("norm", NORMS, ids=["batch", "no parameters", "instance"])
def test_running_statistics_are_refused_when_wrapped(norm):
    with pytest.raises(ValueError, match=r"layers\.1\.norm keeps running statistics.*train a block without") as error:
        wrap(Model(Block(), Block(norm)), layer=1)
    assert "\n" not in str(error.value)
    wrap(Model(Block(), Block(norm)), layer=0)
    wrap(Model(Block(), Block(nn.BatchNorm1d(4, track_running_stats=False))), layer=1)


def step(model, optimizer) -> None:
    optimizer.zero_grad()
    # rows that differ: batch normalization makes rows that are equal zero, and the gradient with them
    model.train()(torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 3.0, 2.0]])).sum().backward()
    optimizer.step()


def persistent_in_place(block):
    block.state.add_(1)


def persistent_assigned(block):
    block.state = block.state + 1


CHANGES = {
    "in place": (True, persistent_in_place),
    "assigned": (True, persistent_assigned),
    "not saved, in place": (False, persistent_in_place),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("when", ["in the pass", "between steps"])
def test_a_buffer_that_training_changes_is_refused_at_the_step(case, when):
    persistent, change = CHANGES[case]
    blocks = [Block(), Block()]
    blocks[1].register_buffer("state", torch.zeros(4), persistent=persistent)
    model = wrap(Model(*blocks), layer=1)
    optimizer = torch.optim.SGD(list(masters(model).values()), lr=0.1)
    step(model, optimizer)
    if when == "in the pass":
        blocks[1].changes = change
    else:
        change(blocks[1])
    with pytest.raises(
        RuntimeError, match=r"training has changed the buffer layers\.1\.state.*disable_adapter"
    ) as error:
        step(model, optimizer)
    assert "\n" not in str(error.value)


def test_a_balancing_bias_that_a_callback_moves_is_refused():
    """DeepSeek-V3's routing bias is a buffer of a wrapped module."""
    model = wrap(build_architecture("deepseek_v3"), layer=2)
    train(model, steps=1)
    gate = model.get_base_model().model.layers[2].mlp.gate
    gate.e_score_correction_bias.add_(0.1)
    with pytest.raises(RuntimeError, match=r"buffer model\.layers\.2\.mlp\.gate\.e_score_correction_bias of a trained"):
        train(model, steps=1)


def cache(block):
    """As rotary embeddings and masks do: replaced as they grow, and not saved."""
    block.state = torch.arange(len(block.state) + 1.0)


@pytest.mark.parametrize("what", ["cache", "another block", "moved", "same values", "eval"])
def test_what_is_harmless_is_left_alone(what):
    blocks = [Block(), Block()]
    blocks[1].register_buffer("state", torch.zeros(4), persistent=what != "cache")
    if what == "another block":
        blocks[0].norm = nn.BatchNorm1d(4)
    model = wrap(Model(*blocks), layer=1)
    optimizer = torch.optim.SGD(list(masters(model).values()), lr=0.1)
    step(model, optimizer)
    if what == "cache":
        blocks[1].changes = cache
    elif what == "moved":
        model.to(torch.float64).to(torch.float32)
    elif what == "same values":
        blocks[1].state.mul_(1)
    elif what == "eval":
        blocks[1].state = blocks[1].state.clone()
        model.eval()(torch.ones(2, 4))
    before = [p.detach().clone() for p in masters(model).values()]
    step(model, optimizer)
    assert not any(torch.equal(p, start) for p, start in zip(masters(model).values(), before, strict=True))
