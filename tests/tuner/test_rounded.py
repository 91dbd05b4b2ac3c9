"""Masters are rounded once in a generation, and again as soon as one of them is another."""

import threading

import pytest
import torch
from transformers import LogitsProcessor

from models import build, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner import rounded
from peft_onelayer.tuner.weights import AdapterWeights

from .helpers import move, tuner_layers, wrap

TOKENS = 5


@pytest.fixture
def roundings(monkeypatch):
    """Counts how often a module's masters are rounded."""
    count, own = [0], AdapterWeights._rounded

    def counting(self, masters):
        count[0] += 1
        return own(self, masters)

    monkeypatch.setattr(AdapterWeights, "_rounded", counting)
    return count


def wrapped(**config):
    model = wrap(build("Llama", dtype=torch.bfloat16), task_type="CAUSAL_LM", **config).eval()
    move(model)
    return model


def generate(model, *processors, **options):
    return model.generate(
        input_ids=token_batch(),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        logits_processor=list(processors),
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def same(a, b):
    return torch.equal(a.sequences, b.sequences) and torch.equal(torch.stack(a.logits), torch.stack(b.logits))


class After(LogitsProcessor):
    """Calls `change` once, behind the first token."""

    def __init__(self, change):
        self.change = change

    def __call__(self, input_ids, scores):
        change, self.change = self.change, None
        if change is not None:
            change()
        return scores


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_a_generation_rounds_once_and_gives_what_the_merged_model_gives(task_type, roundings):
    model = wrapped()
    model.peft_config["default"].task_type = task_type
    ours = generate(model)
    assert roundings[0] == len(tuner_layers(model)) and rounded._kept.weights is None
    with torch.no_grad():
        generate(model)
    assert roundings[0] == 2 * len(tuner_layers(model))
    model.merge_adapter()
    assert same(ours, generate(model))


def in_place(model):
    with torch.no_grad():
        for layer in tuner_layers(model):
            for master in layer.masters("default").values():
                master.mul_(-1)


def replaced_data(model):
    for layer in tuner_layers(model):
        for master in layer.masters("default").values():
            master.data = -master.data


def replaced(model):
    for layer in tuner_layers(model):
        holder = layer.single_layer_params["default"]
        for name, master in layer.masters("default").items():
            setattr(holder, name, torch.nn.Parameter(-master.detach()))


def optimizer(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.5).step()


def through_the_module(model):
    with torch.no_grad():
        for layer in tuner_layers(model):
            layer.weight.mul_(-1)


def other_adapter(model):
    model.add_adapter("other", SingleLayerConfig(layer=2))
    model.set_adapter("other")


@pytest.mark.parametrize(
    "change", [in_place, replaced_data, replaced, optimizer, through_the_module, other_adapter, lambda m: m.to("cpu")]
)
def test_a_change_on_the_way_is_in_the_next_token(change, monkeypatch):
    kept = generate(wrapped(), After(lambda: None))
    models = wrapped(), wrapped()
    with_keeping = generate(models[0], After(lambda: change(models[0])))
    monkeypatch.setattr(rounded, "keeps", lambda: False)
    assert same(with_keeping, generate(models[1], After(lambda: change(models[1]))))
    assert torch.equal(kept.logits[0], with_keeping.logits[0])


def test_what_is_written_through_data_is_in_the_next_generation():
    model = wrapped()
    before = generate(model)
    for layer in tuner_layers(model):
        for master in layer.masters("default").values():
            version = master._version
            master.data.mul_(-1)
            assert master._version == version
    after = generate(model)
    assert not same(before, after)
    model.merge_adapter()
    assert same(after, generate(model))


def test_several_adapters_at_once_are_summed_once(roundings):
    model = wrapped()
    model.add_adapter("other", SingleLayerConfig(layer=2))
    move(model, "other", seed=2)
    model.base_model.set_adapter(["default", "other"])
    ours = generate(model)
    assert roundings[0] == len(tuner_layers(model))
    model.merge_adapter(["default", "other"])
    assert same(ours, generate(model))


def test_a_mixed_batch_is_generated_as_before(monkeypatch):
    model = wrapped()
    names = ["default", "__base__", "default"]
    ours = generate(model, adapter_names=names)
    monkeypatch.setattr(rounded, "keeps", lambda: False)
    assert same(ours, generate(model, adapter_names=names))


def test_gradients_are_on_and_nothing_is_kept(roundings):
    model = wrapped()
    for _ in range(2):
        model(input_ids=token_batch()).logits.sum().backward()
    assert roundings[0] == 2 * len(tuner_layers(model))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_another_thread_keeps_nothing():
    seen = []
    with rounded.keeping_rounded(), torch.no_grad():
        thread = threading.Thread(target=lambda: seen.append(rounded.keeps()))
        thread.start()
        thread.join()
        assert rounded.keeps() and seen == [False]
    assert not rounded.keeps()


def test_inference_mode_keeps_too(roundings):
    model = wrapped()
    with torch.inference_mode():
        ours = generate(model)
    assert roundings[0] == len(tuner_layers(model))
    assert same(ours, generate(model))


def test_a_float32_base_keeps_no_copies():
    model = wrap(build("Llama"), task_type="CAUSAL_LM").eval()
    kept = []
    generate(model, After(lambda: kept.append(dict(rounded._kept.weights))))
    assert kept == [{}]
