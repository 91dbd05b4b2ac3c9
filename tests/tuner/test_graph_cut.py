"""The autograd graph ends below the trained block, and the cut stays out of the way where it must."""

import copy
import functools
import io
import warnings
from collections import Counter
from itertools import product

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from models import FAMILIES, build, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner.graph_cut import installed_graph_cuts
from tuner.helpers import logits, masters, move, same, train, wrap

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients")  # the counting itself
CHECKPOINTING = [None, False, True]
CHECKPOINTING_IDS = ["plain", "non_reentrant", "reentrant"]
LAYER = 2
# The hooks below tell what a checkpointed block costs from outside. Before transformers 5.23 they run inside.
OUTSIDE = CHECKPOINTING if Version(transformers.__version__) >= Version("5.23.0.dev0") else [None]
OUTSIDE_IDS = CHECKPOINTING_IDS[: len(OUTSIDE)]


def prepare(model, use_reentrant=None, cut: bool = True):
    """Checkpointing, training mode, and transformers' hook on the embeddings. `cut=False` removes the cut."""
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.get_base_model().enable_input_require_grads()  # as some trainers do before they wrap the model
    if not cut:
        for installed in installed_graph_cuts(model):
            installed.remove()
    return model.train()


def step(model, **inputs):
    tokens = token_batch()
    output = model(**(inputs or {"input_ids": tokens}), labels=tokens)
    output.loss.backward()
    return output


class Counts:
    """Per block: tensors kept for the backward pass, gradients that arrive, forward runs, and its output's graph."""

    def __init__(self, model: nn.Module) -> None:
        self.saved, self.backward, self.forward, self.in_graph = Counter(), Counter(), Counter(), {}
        self.current: int | None = None
        for index, block in enumerate(model.get_decoder().layers):
            block.register_forward_pre_hook(lambda *_, i=index: setattr(self, "current", i))
            block.register_forward_hook(lambda _, __, out, i=index: self._left(i, out))
            block.register_full_backward_pre_hook(lambda *_, i=index: self.backward.update([i]))
            # inside what transformers checkpoints, so it also sees the recomputation
            block.input_layernorm.register_forward_pre_hook(lambda *_, i=index: self.forward.update([i]))

    def _left(self, index, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        self.in_graph[index] = hidden.grad_fn is not None
        self.current = None

    def keep(self, tensor):
        if self.current is not None:
            self.saved.update([self.current])
        return tensor

    def run(self, model):
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor):
            return step(model)


@pytest.mark.parametrize("use_reentrant", OUTSIDE, ids=OUTSIDE_IDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_below_the_trained_block_nothing_is_kept_and_no_backward_runs(family, use_reentrant):
    model = prepare(wrap(build(family), layer=LAYER), use_reentrant)
    counts = Counts(model)
    counts.run(model)
    assert counts.in_graph == {0: False, 1: False, 2: True, 3: True}
    assert set(counts.backward) == {2, 3}
    assert set(counts.saved) == {2, 3}
    times = 1 if use_reentrant is None else 2
    assert counts.forward == {0: 1, 1: 1, 2: times, 3: times}
    assert all(p.grad is not None for p in masters(model).values())
    assert {block.gradient_checkpointing for block in model.get_decoder().layers} == {use_reentrant is not None}


@pytest.mark.parametrize("use_reentrant", OUTSIDE, ids=OUTSIDE_IDS)
def test_without_the_cut_the_frozen_blocks_are_paid_for(use_reentrant):
    """What the test above would see if the cut did nothing."""
    model = prepare(wrap(layer=LAYER), use_reentrant, cut=False)
    counts = Counts(model)
    counts.run(model)
    assert counts.in_graph == dict.fromkeys(range(4), True)
    assert set(counts.backward) == set(counts.saved) == {0, 1, 2, 3}
    assert counts.forward == dict.fromkeys(range(4), 1 if use_reentrant is None else 2)


def cuts():
    """By default every way for one family, and one way for the others."""
    for layer, family, (use_reentrant, way) in product(
        (0, "1-2"), FAMILIES, zip(CHECKPOINTING, CHECKPOINTING_IDS, strict=True)
    ):
        shown = family == "Qwen3" or (layer, way) == ("1-2", "non_reentrant")
        marks = [] if shown else [pytest.mark.more]
        yield pytest.param(layer, family, use_reentrant, id=f"{layer}-{family}-{way}", marks=marks)


@pytest.mark.parametrize(("layer", "family", "use_reentrant"), list(cuts()))
def test_the_cut_changes_no_weight(family, layer, use_reentrant):
    base = build(family, dtype=torch.bfloat16)
    cut, whole = (
        prepare(wrap(copy.deepcopy(base), layer=layer), use_reentrant, cut=with_cut) for with_cut in (True, False)
    )
    start = {name: p.detach().clone() for name, p in masters(cut).items()}
    train(cut)
    train(whole)
    assert same(masters(cut), masters(whole))
    assert not any(torch.equal(p, start[name]) for name, p in masters(cut).items())


@pytest.mark.parametrize("layer", [0, 3])
def test_reentrant_checkpointing_gives_gradients_without_a_hook_on_the_embeddings(layer):
    model = wrap(layer=layer)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*None of the inputs have requires_grad.*")
        step(model.train())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in masters(model).values())


def first_block_gets_a_graph(model, **inputs) -> bool:
    """Whether the first block's output is part of the graph, in a step of training."""
    seen = []
    block = model.get_decoder().layers[0]
    handle = block.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    step(model, **inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("use_reentrant", OUTSIDE, ids=OUTSIDE_IDS)
def test_no_cut_when_the_embeddings_train(use_reentrant):
    model, uncut = (
        prepare(wrap(layer=LAYER, modules_to_save=["embed_tokens"]), use_reentrant, cut) for cut in (True, False)
    )
    gradients = []
    for m in (model, uncut):
        assert first_block_gets_a_graph(m)
        gradients.append({n: p.grad for n, p in m.named_parameters() if p.requires_grad})
    assert any("embed_tokens" in name and grad.abs().sum() > 0 for name, grad in gradients[0].items())
    assert same(*gradients)


def test_a_trained_head_does_not_prevent_the_cut():
    model = prepare(wrap(layer=LAYER, modules_to_save=["lm_head"]))
    assert not first_block_gets_a_graph(model)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("use_reentrant", OUTSIDE, ids=OUTSIDE_IDS)
def test_no_cut_when_the_caller_wants_gradients_of_the_embeddings(gemma3, multimodal, use_reentrant):
    base = gemma3() if multimodal else build()
    plain = copy.deepcopy(base).requires_grad_(False)
    embeds = base.get_input_embeddings()(token_batch()).detach()
    wanted, got = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    model = prepare(wrap(base, layer=LAYER), use_reentrant)
    assert not first_block_gets_a_graph(model)
    step(plain.train(), inputs_embeds=wanted)
    assert first_block_gets_a_graph(model, inputs_embeds=got)
    assert torch.equal(got.grad, wanted.grad) and got.grad.abs().sum() > 0
    assert not first_block_gets_a_graph(model)  # and the next call is cut again


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_no_cut_when_the_caller_wants_gradients_of_the_input_of_a_plain_module():
    x, y = (torch.ones(2, 4, requires_grad=True) for _ in range(2))
    get_peft_model(Toy(), SingleLayerConfig(layer=1))(x).sum().backward()
    Toy()(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("how", ["disabled", "frozen"])
def test_no_cut_while_no_adapter_trains(how):
    model = prepare(wrap(layer=LAYER))
    if how == "disabled":
        with model.disable_adapter():
            assert first_block_gets_a_graph(model)
    else:
        model.set_requires_grad("default", False)
        model.get_base_model().lm_head.requires_grad_(True)
        assert first_block_gets_a_graph(model)
        model.set_requires_grad("default", True)
    assert not first_block_gets_a_graph(model)


def test_a_second_adapter_below_moves_the_cut():
    model = wrap(layer=3)
    model.add_adapter("low", SingleLayerConfig(layer=1))
    prepare(model)
    assert len(installed_graph_cuts(model)) == 1
    for active, first in (("default", 3), ("low", 1), (["default", "low"], 1)):
        model.base_model.set_adapter(active)
        counts = Counts(model)
        counts.run(model)
        assert set(counts.backward) == set(range(first, 4)), active


@pytest.mark.parametrize("method", ["unload", "merge_and_unload"])
def test_unloading_removes_all_hooks(method):
    base = build()
    model = getattr(wrap(base, layer=LAYER), method)()
    assert model is base and not installed_graph_cuts(model)
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)


def test_unloading_gives_the_blocks_their_checkpointing_back():
    base = build()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = base.get_decoder().layers
    own = [block._gradient_checkpointing_func for block in blocks]
    model = wrap(base, layer=LAYER)
    step(model.train())
    assert not any(block._gradient_checkpointing_func is function for block, function in zip(blocks, own, strict=True))
    model.unload()
    assert all(block._gradient_checkpointing_func is function for block, function in zip(blocks, own, strict=True))


class ByKeyword(nn.Module):
    """Hands its blocks what they work on by keyword."""

    class Block(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x).tanh()

    def __init__(self, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([self.Block() for _ in range(3)])
        for block in self.layers:
            block.gradient_checkpointing = checkpointed
            block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x=x)
        return x


def test_blocks_that_take_keywords_only():
    gradients = []
    for checkpointed in (False, True):
        model = get_peft_model(ByKeyword(checkpointed), SingleLayerConfig(layer=1))
        model(torch.ones(2, 4)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in masters(model).items()})
    assert same(*gradients) and all(grad.abs().sum() > 0 for grad in gradients[0].values())


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("use_reentrant", CHECKPOINTING, ids=CHECKPOINTING_IDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file])
def test_a_copy_has_hooks_of_its_own(duplicate, use_reentrant):
    model = wrap(layer=LAYER)
    move(model)
    expected = logits(model)
    if duplicate is copy.deepcopy:
        twin = duplicate(prepare(model, use_reentrant))
    else:  # the hook transformers puts on the embeddings cannot be pickled
        twin = prepare(duplicate(model), use_reentrant)
        prepare(model, use_reentrant)
    (original,), (copied,) = installed_graph_cuts(model), installed_graph_cuts(twin)
    assert copied is not original
    assert (
        copied.model is twin.get_base_model()
        and copied.model.get_submodule(copied.stack_name) is twin.get_decoder().layers
    )
    assert torch.equal(logits(twin.eval()), expected)
    counts, twin_counts = Counts(model), Counts(twin.train())
    twin_counts.run(twin)
    assert set(twin_counts.backward) == {2, 3} and not counts.forward
    assert all(p.grad is None for p in masters(model).values())
    counts.run(model)
    assert same(*({n: p.grad for n, p in masters(m).items()} for m in (model, twin)))
    copied.remove()
    assert not installed_graph_cuts(twin) and installed_graph_cuts(model) == [original]


def test_an_error_in_a_block_leaves_checkpointing_on():
    model = prepare(wrap(layer=LAYER), False)
    block = model.get_decoder().layers[0]
    handle = block.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model)
    assert block.gradient_checkpointing
    handle.remove()
    step(model)
    assert all(p.grad is not None for p in masters(model).values())
