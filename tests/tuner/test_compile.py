"""torch.compile: one graph for a training step and for inference, with the eager run's results."""

import copy
import gc

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from models import build, build_architecture, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner import find_decoder_stack
from tuner.helpers import masters, move, same, wrap

pytestmark = pytest.mark.more

# Traces forward and backward exactly as for a GPU, then runs the operators as they are: no compiler is needed, and the
# results can be compared bit for bit.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend=BACKEND)


def train(run, parameters, steps=2):
    """Gradients of the first step, weights after the last."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    first = {}
    for seed in range(steps):
        tokens = token_batch(seed=seed)
        logits = run(input_ids=tokens, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        first = first or {name: p.grad.clone() for name, p in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
    return first, {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize(
    "architecture, use_reentrant",
    [
        ("qwen3", None),
        pytest.param("qwen3", False, marks=pytest.mark.more),
        pytest.param("qwen3", True, marks=pytest.mark.more),
        pytest.param("gemma3_text", None, marks=pytest.mark.slow),
        pytest.param("gpt2", None, marks=pytest.mark.slow),
        pytest.param("gpt_oss", None, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_is_one_graph(architecture, use_reentrant):
    """And equals the compiled full fine-tuning of that block bit for bit (an eager run uses other kernels)."""
    base = build_architecture(architecture, num_hidden_layers=2)
    model = wrap(copy.deepcopy(base), layer=1)
    stack = find_decoder_stack(base)
    own = {f"{stack.name}.1.{n}": p.requires_grad_() for n, p in stack.blocks[1].named_parameters()}
    results = []
    for each, parameters in ((base, own), (model, masters(model))):
        if use_reentrant is not None:
            each.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            base.disable_input_require_grads()  # transformers' hook, with which nothing compiles; the model is without
        results.append(train(compiled(each), parameters))
    for plain, ours in zip(*results, strict=True):
        assert same(ours, plain)


@pytest.mark.more
@pytest.mark.parametrize("in_short", [True, False])
@torch.no_grad()
def test_inference_follows_what_is_in_effect(in_short):
    model = wrap(build(num_layers=2, dtype=torch.bfloat16), layer=1)
    move(model)
    model.add_adapter("b", SingleLayerConfig(layer=0))
    move(model, "b")
    model.eval()
    run, tokens = compiled(model), token_batch()
    seen = []

    def check():
        logits = run(tokens).logits
        assert torch.equal(logits, model(tokens).logits)
        seen.append(logits)

    check()
    model.set_adapter("b")
    check()
    assert not torch.equal(*seen)
    if in_short:
        return
    model.base_model.set_adapter(["default", "b"])
    check()
    with model.disable_adapter():
        check()
    model.set_adapter("default")
    model.merge_adapter()
    check()
    model.unmerge_adapter()
    check()
    assert torch.equal(seen[0], seen[4]) and torch.equal(seen[0], seen[5])
    assert len({tuple(logits.flatten().tolist()) for logits in seen}) == 4


def test_one_trace_serves_every_step_while_other_models_come_and_go():
    counter = torch._dynamo.testing.CompileCounter()
    model = wrap(build(num_layers=2), layer=1).train()
    run, optimizer = (
        torch.compile(model, fullgraph=True, backend=counter),
        torch.optim.SGD(masters(model).values(), 0.1),
    )
    others = []
    for seed in range(10):  # torch gives up after 8 traces
        run(input_ids=token_batch(seed=seed), use_cache=False).logits.mean().backward()
        optimizer.step()
        if seed == 3:
            others.append(wrap(build(num_layers=2), layer=1).train())
            others[0](input_ids=token_batch(), use_cache=False)
        if seed == 6:
            others.clear()
            gc.collect()
    assert counter.frame_count == 1
    with torch.no_grad():
        for _ in range(2):
            run(input_ids=token_batch(), use_cache=False)
    assert counter.frame_count == 2
