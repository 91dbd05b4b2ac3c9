"""A wrapped model is freed with its last reference, as LoRA's is: no reference cycle waits for the collector."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from models import build, token_batch
from peft_onelayer import SingleLayerConfig
from tuner.helpers import logits, move, wrap

CONFIGS = {
    "lora": lambda: LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),  # what PEFT and transformers leave
    "single_layer": lambda: SingleLayerConfig(layer=2, task_type="CAUSAL_LM"),
}
METHODS = [pytest.param("lora", marks=pytest.mark.more), "single_layer"]


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def step(model):
    model.train()(input_ids=token_batch(), labels=token_batch()).loss.backward()


def reentrant_step(model):
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.get_base_model().enable_input_require_grads()
    step(model)


def optimize(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step(model)
    optimizer.step()


def merge(model):
    model.merge_adapter()
    logits(model)
    model.unmerge_adapter()


def generate(model):
    model.eval().generate(input_ids=token_batch(), max_new_tokens=3)


def mixed_batch(model):
    model.add_adapter("b", model.peft_config["default"])
    model.eval()(input_ids=token_batch(), adapter_names=["default", "b", "__base__"])


def disable(model):
    with model.disable_adapter():
        logits(model)


def more_adapters(model):
    model.add_adapter("b", model.peft_config["default"])
    model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    step(model)
    model.delete_adapter("b")


def duplicate(model):
    twin = copy.deepcopy(model)
    step(twin)
    step(through_pickle(twin))


def nothing(model):
    pass


USES = [nothing, step, reentrant_step, optimize, merge, generate, mixed_batch, disable, more_adapters]
USES += [duplicate]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_after_any_use(no_collector, method, use):
    model = get_peft_model(build(), CONFIGS[method]())
    use(model)
    references = [weakref.ref(part) for part in (model, model.get_base_model(), model.get_decoder().layers[2])]
    del model
    assert [reference() for reference in references] == [None, None, None]


@pytest.mark.parametrize("method", METHODS)
def test_after_saving_and_loading(no_collector, tmp_path, method):
    model = get_peft_model(build(), CONFIGS[method]())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    loaded.load_adapter(tmp_path, "again")
    logits(loaded)
    through_transformers = build()
    through_transformers.load_adapter(tmp_path)
    logits(through_transformers)
    models = [model.get_base_model(), loaded.get_base_model(), through_transformers]
    references = [weakref.ref(model) for model in models]
    del model, loaded, through_transformers, models
    assert [reference() for reference in references] == [None, None, None]


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("method", METHODS)
def test_after_unloading(no_collector, method, how):
    wrapped = get_peft_model(build(), CONFIGS[method]())
    step(wrapped)
    reference, model = weakref.ref(wrapped), getattr(wrapped, how)()
    del wrapped
    assert reference() is None
    logits(model)
    reference = weakref.ref(model)
    del model
    assert reference() is None


@pytest.mark.parametrize("method", CONFIGS)
def test_an_injected_adapter(no_collector, method):
    model = build()
    model.add_adapter(CONFIGS[method](), "a")
    step(model)
    model.disable_adapters()
    logits(model)
    reference = weakref.ref(model)
    del model
    assert reference() is None


def test_a_refused_model(no_collector):
    model = build()
    with pytest.raises(ValueError, match="out of range"):
        wrap(model, layer=9)
    with pytest.raises(ValueError, match="matches nothing"):
        wrap(model, layer=1, target_modules=["q_porj"])
    reference = weakref.ref(model)
    del model
    assert reference() is None


def test_a_composite_module(no_collector):
    model = wrap(build("GptOss", num_local_experts=4, num_experts_per_tok=2), layer=1)
    step(model)
    model.merge_adapter()
    reference = weakref.ref(model.get_base_model())
    del model
    assert reference() is None


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize(
    "duplicate", [lambda part: part, copy.deepcopy, through_pickle], ids=["itself", "copy", "pickle"]
)
def test_a_part_that_is_kept_runs_and_trains(no_collector, duplicate):
    """Without the cut, which needs to see the whole model."""
    model = wrap(layer=2)
    move(model)
    part = model.get_decoder()
    with torch.no_grad():
        expected = part(token_batch()).last_hidden_state
    part = duplicate(part)
    reference = weakref.ref(model.get_base_model())
    del model
    assert reference() is None
    part = duplicate(part)
    part.enable_input_require_grads()
    output = part.train()(token_batch()).last_hidden_state
    assert torch.equal(output, expected)
    output.sum().backward()
    trained = [p for p in part.parameters() if p.requires_grad]
    assert len(trained) == 11 and all(p.grad is not None for p in trained)
