"""Training that cannot change the adapter is refused at its first step, and saving an untouched adapter warns."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments

from models import build, token_batch
from peft_onelayer import SingleLayerConfig
from tuner.helpers import masters, move, train, tuner_layers, wrap


def step(model, optimizer):
    tokens = token_batch()
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_an_optimizer_made_before_wrapping_is_refused():
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model = wrap(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"optimizer holds .* all of them are frozen.*Make it afterwards") as error:
        step(model, optimizer)
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="all of them are frozen"):  # not only once
        optimizer.step()


@pytest.mark.parametrize("make", ["head", "other adapter", "copied model"])
def test_an_optimizer_of_the_wrong_parameters_is_refused(make):
    model = wrap()
    if make == "head":
        optimizer = torch.optim.SGD(model.get_base_model().lm_head.parameters(), lr=1.0)
    elif make == "other adapter":
        optimizer = torch.optim.SGD(trainable(model), lr=1.0)
        model.add_adapter("b", SingleLayerConfig(layer=1))
        model.set_adapter("b")
    else:
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.get_base_model().parameters(), lr=1.0)
        step(twin, optimizer)  # the copy itself trains
        return
    with pytest.raises(RuntimeError, match="all of them are frozen"):
        step(model, optimizer)


def test_a_loss_that_does_not_reach_the_layer_is_refused():
    model = wrap(layer=3)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model.train()
    early = model(input_ids=token_batch(), output_hidden_states=True).hidden_states[1]  # after block 0
    (early.sum() * nn.Parameter(torch.ones(()))).backward()
    with pytest.raises(RuntimeError, match="no gradient has reached"):
        optimizer.step()


@pytest.mark.parametrize("how", ["disabled", "after zero_grad"])
def test_a_step_without_gradients_is_refused(how):
    model = wrap(modules_to_save=["lm_head"]) if how == "disabled" else wrap()
    optimizer = torch.optim.AdamW(list(masters(model).values()), lr=1e-2)
    if how == "disabled":
        tokens = token_batch()
        with model.disable_adapter():
            model.get_base_model().enable_input_require_grads()
            model.train()(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(RuntimeError, match="no gradient has reached"):
        optimizer.step()


def test_a_frozen_adapter_is_refused_in_training(tmp_path):
    model = wrap()
    move(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    tokens = token_batch()
    loaded(input_ids=tokens, labels=tokens)  # from_pretrained leaves it in eval mode
    with pytest.raises(RuntimeError, match=r"default is frozen.*is_trainable=True"):
        loaded.train()(input_ids=tokens, labels=tokens)
    with pytest.raises(RuntimeError, match="is_trainable=True"):
        loaded(input_ids=tokens)
    with torch.no_grad():
        loaded(input_ids=tokens)
    loaded(input_ids=tokens, output_hidden_states=True)  # for a head outside of the model, which may train
    with loaded.disable_adapter():
        loaded(input_ids=tokens)
    train(PeftModel.from_pretrained(build(), tmp_path, is_trainable=True))


def test_the_trainer_refuses_it_too(tmp_path):
    model = wrap(task_type="CAUSAL_LM")
    model.set_requires_grad("default", False)
    data = [{"input_ids": token_batch()[0], "labels": token_batch()[0]}] * 4
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=2)
    with pytest.raises(RuntimeError, match="is frozen"):
        Trainer(model, arguments, train_dataset=data).train()


def test_what_does_train_is_left_alone():
    """Several optimizers, a frozen adapter under a trained head, a closure, another model's optimizer."""
    model = wrap(modules_to_save=["lm_head"])
    head = [p for n, p in model.named_parameters() if "lm_head.modules_to_save.default" in n]
    model.train()
    optimizers = [torch.optim.SGD(head, lr=0.1), torch.optim.SGD(list(masters(model).values()), lr=0.1)]
    other = nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    tokens = token_batch()
    model(input_ids=tokens, labels=tokens).loss.backward()
    for optimizer in (torch.optim.SGD(other.parameters(), lr=0.1), *optimizers):
        optimizer.step()
    for parameter in masters(model).values():
        parameter.requires_grad_(False)
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD(head, lr=0.1).step()

    model = wrap()
    before = {n: p.detach().clone() for n, p in masters(model).items()}
    optimizer = torch.optim.LBFGS(trainable(model), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not any(torch.equal(p, before[n]) for n, p in masters(model).items())


def test_an_optimizer_of_nothing_is_left_alone():
    """It may belong to something else, or to a kind of parameter that this block has none of."""
    model = wrap()
    matrices = [p for p in trainable(model) if p.ndim == 2]
    before = [p.detach().clone() for p in matrices]
    nothing, optimizer = (torch.optim.SGD([{"params": given}], lr=0.1) for given in ([], matrices))
    for _ in range(2):
        step(model, nothing)
        optimizer.step()
    assert not any(torch.equal(p, start) for p, start in zip(matrices, before, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_frozen_adapter_is_refused_where_the_loss_has_a_gradient_all_the_same(reentrant):
    """With gradient checkpointing the embeddings' output requires gradients, and the optimizer holds nothing."""
    model = wrap(task_type="CAUSAL_LM")
    model.set_requires_grad("default", False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="default is frozen"):
        step(model, torch.optim.SGD([{"params": []}], lr=0.1))


def test_an_optimizer_of_nothing_is_refused_beside_a_model_that_is_all_frozen():
    """The model's blocks are run without the model itself, so the pass does not show what becomes of its output."""
    model = wrap()
    model.set_requires_grad("default", False)
    decoder, optimizer = model.get_decoder().train(), torch.optim.SGD([{"params": []}], lr=0.1)
    (decoder(token_batch()).last_hidden_state.sum() * nn.Parameter(torch.ones(()))).backward()
    with pytest.raises(RuntimeError, match=r"holds no parameters.*adapter was frozen.*is_trainable=True"):
        optimizer.step()


def test_an_optimizer_made_of_a_frozen_adapter_is_refused_once_it_has_trained_nothing():
    model = wrap()
    model.set_requires_grad("default", False)
    optimizer = torch.optim.SGD([{"params": trainable(model)}], lr=0.1)
    model.set_adapter("default")  # as TRL does after a pass with the reference adapter
    step(model, optimizer)
    with pytest.raises(RuntimeError, match=r"holds no parameters.*adapter was frozen.*is_trainable=True"):
        step(model, optimizer)
    torch.optim.SGD(trainable(model), lr=0.1).step()
    step(model, optimizer)


def test_a_checked_model_and_optimizer_are_not_kept_alive():
    import weakref

    model = wrap()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    step(model, optimizer)
    references = [weakref.ref(model.get_base_model()), weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_an_adapter_that_equals_the_base_warns(tmp_path, dtype):
    model = wrap(build(dtype=dtype))
    with pytest.warns(UserWarning, match="'default' equals the base model's.*changes nothing"):
        model.save_pretrained(tmp_path)
    masters(model)["model.layers.2.input_layernorm.weight"].data += 1e-6  # less than bfloat16 can hold
    with warnings.catch_warnings():
        if dtype == torch.float32:
            warnings.simplefilter("error", UserWarning)
            model.save_pretrained(tmp_path)
    if dtype == torch.bfloat16:
        with pytest.warns(UserWarning, match="changes nothing"):
            model.save_pretrained(tmp_path)
    move(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)


# After the first step: each way in which an optimizer is left with other parameters than those in effect.
def begun(steps: int = 2, **config):
    """A model that has been trained, and its optimizer."""
    model = wrap(**config)
    move(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(steps):
        step(model, optimizer)
        optimizer.zero_grad()
    return model, optimizer


def switch(model, folder):
    model.add_adapter("b", SingleLayerConfig(layer=2))
    model.set_adapter("b")
    return model


def switch_elsewhere(model, folder):
    model.add_adapter("b", SingleLayerConfig(layer=1))
    model.set_adapter("b")
    return model


def add_a_second_one(model, folder):
    model.add_adapter("b", SingleLayerConfig(layer=2))
    model.base_model.set_adapter(["default", "b"])
    return model


def load_another(model, folder):
    model.load_adapter(folder, "b", is_trainable=True)
    model.set_adapter("b")
    return model


def load_over_it(model, folder):
    model.load_adapter(folder, "default", is_trainable=True, low_cpu_mem_usage=True)
    for layer in tuner_layers(model):  # as loaders do that assign in place of copying
        held = layer.single_layer_params["default"]
        for name, parameter in list(held._parameters.items()):
            if parameter is not None:
                held._parameters[name] = nn.Parameter(parameter.detach().clone())
    return model


def delete(model, folder):
    model.add_adapter("b", SingleLayerConfig(layer=2))
    model.delete_adapter("default")
    model.set_adapter("b")
    return model


def delete_and_add_anew(model, folder):
    model.add_adapter("b", SingleLayerConfig(layer=2))
    model.delete_adapter("default")
    model.add_adapter("default", SingleLayerConfig(layer=2))
    model.set_adapter("default")
    return model


def unload(model, folder):
    return model.merge_and_unload().requires_grad_(True)


def copy_it(model, folder):
    return copy.deepcopy(model)


def pickle_it(model, folder):
    return pickle.loads(pickle.dumps(model))


def load_it_whole(model, folder):
    torch.save(model, f"{folder}/model.pt")
    return torch.load(f"{folder}/model.pt", weights_only=False)


def wrap_the_base_again(model, folder):
    return wrap(model.unload())


CHANGES = {
    switch: "all of them are frozen",
    switch_elsewhere: "all of them are frozen",
    add_a_second_one: "the adapter b is in effect and gets gradients, but no optimizer holds",
    load_another: "all of them are frozen",
    load_over_it: "of an adapter that is in no model any more",
    delete: "of an adapter that is in no model any more",
    delete_and_add_anew: "of an adapter that is in no model any more",
    unload: "of an adapter that is in no model any more",
    copy_it: "training passes are made with a copy of the model",
    pickle_it: "training passes are made with a copy of the model",
    load_it_whole: "training passes are made with a copy of the model",
    wrap_the_base_again: "of an adapter that is in no model any more",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_trains_changes_after_the_first_step(change, tmp_path):
    model, optimizer = begun()
    model.save_pretrained(tmp_path)
    other = change(model, tmp_path)
    before = {n: p.detach().clone() for n, p in other.named_parameters()}
    with pytest.raises(RuntimeError, match=CHANGES[change]) as error:
        step(other, optimizer)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())
    with pytest.raises(RuntimeError, match=CHANGES[change]):  # not only once
        optimizer.step()
    other.zero_grad()
    step(other, torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2))  # the way out


@pytest.mark.parametrize("change", [switch, delete, load_over_it, unload], ids=lambda change: change.__name__)
def test_what_trains_changes_between_making_the_optimizer_and_its_first_step(change, tmp_path):
    model = wrap()
    move(model)
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with pytest.raises(RuntimeError, match=CHANGES[change]):
        step(change(model, tmp_path), optimizer)


def test_a_trained_head_does_not_hide_that_another_adapter_is_in_effect():
    """The optimizer goes on to train the head, and the block no more."""
    model = wrap()
    head = model.get_base_model().lm_head.weight.requires_grad_(True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for _ in range(2):
        step(model, optimizer)
        optimizer.zero_grad()
    model.add_adapter("b", SingleLayerConfig(layer=2))
    model.set_adapter("b")
    assert head.requires_grad
    with pytest.raises(RuntimeError, match="the adapter b is in effect and gets gradients"):
        step(model, optimizer)


@pytest.mark.parametrize("how", ["set_requires_grad", "each parameter", "inference mode", "switched off"])
def test_freezing_after_the_first_step(how):
    model, optimizer = begun()
    if how == "set_requires_grad":
        model.set_requires_grad("default", False)
    elif how == "inference mode":
        model.set_adapter("default", inference_mode=True)
    elif how == "switched off":
        model.base_model.disable_adapter_layers()
    else:
        for parameter in masters(model).values():
            parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen"):
        optimizer.step()
    if how != "switched off":
        with pytest.raises(RuntimeError, match="default is frozen"):
            step(model, optimizer)


def test_a_merge_in_the_middle_of_training_is_undone():
    model, optimizer = begun()
    before = {n: p.detach().clone() for n, p in masters(model).items()}
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged while it trains"):
        step(model, optimizer)
    assert not any(torch.equal(p, before[n]) for n, p in masters(model).items())


def test_what_trains_by_intent_is_left_alone_at_every_step(tmp_path):
    """Two adapters in turns, a part frozen, a copy that follows by a moving average, other models, reference passes."""
    model, optimizer = begun()
    tokens = token_batch()
    other = nn.Linear(2, 2)
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    average = copy.deepcopy(model)
    twin, twins = begun()
    for name in ("ref", "b"):
        model.add_adapter(name, SingleLayerConfig(layer=2))
    of_b = torch.optim.AdamW(list(masters(model, "b").values()), lr=1e-2)
    masters(model)["model.layers.2.input_layernorm.weight"].requires_grad_(False)
    for _ in range(3):
        before = {n: p.detach().clone() for n, p in masters(model).items()}
        model.set_adapter("ref")
        with torch.no_grad():
            model(tokens)
        with model.disable_adapter(), torch.no_grad():
            model(tokens)
        model.set_adapter("default")
        for _ in range(2):  # gradients are accumulated
            model.train()(input_ids=tokens, labels=tokens).loss.backward()
        model.set_adapter("b")
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()  # while the other adapter is in effect
        of_b.step()
        other(torch.ones(2)).sum().backward()
        others.step()
        step(twin, twins)
        average(tokens)
        for each in (optimizer, of_b, others, twins):
            each.zero_grad()
        moved = {n for n, p in masters(model).items() if not torch.equal(p, before[n])}
        assert len(moved) >= 10


def test_gradients_of_a_copy_that_are_brought_over_by_hand():
    """Workers' copies compute gradients, and the model's own optimizer takes them."""
    model, optimizer = begun()
    worker = copy.deepcopy(model)
    for _ in range(3):
        before = [p.detach().clone() for p in masters(model).values()]
        tokens = token_batch()
        worker.zero_grad()
        worker(input_ids=tokens, labels=tokens).loss.backward()
        for mine, theirs in zip(masters(model).values(), masters(worker).values(), strict=True):
            mine.grad = theirs.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        assert not any(torch.equal(p, b) for p, b in zip(masters(model).values(), before, strict=True))


def test_a_copy_with_an_optimizer_of_its_own_trains():
    model, optimizer = begun()
    twin = copy.deepcopy(model)
    optimizers = [(model, optimizer), (twin, torch.optim.AdamW(trainable(twin), lr=1e-2))]
    for _ in range(2):
        for each, its in optimizers:
            step(each, its)
            its.zero_grad()
    step(twin, optimizers[1][1])


def test_a_step_without_a_pass_is_left_alone():
    """A training loop that skips a batch, and steps all the same."""
    model, optimizer = begun()
    optimizer.step()
    step(model, optimizer)


def test_a_model_that_is_moved_keeps_its_optimizer():
    model, optimizer = begun()
    model.to(torch.bfloat16).to("cpu")
    before = [p.detach().clone() for p in masters(model).values()]
    step(model, optimizer)
    assert not any(torch.equal(p, b) for p, b in zip(masters(model).values(), before, strict=True))
