"""Threads share one wrapped model: every output is that of a thread alone, and nothing of the model is written."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from torch import nn

from models import build, build_architecture, token_batch
from peft_onelayer import SingleLayerConfig
from tuner.helpers import base_weights, logits, masters, move, same, tuner_layers, wrap

THREADS = 8
SHOWN = {("qwen3", False), ("gpt2", True)}


def together(work, threads: int = THREADS, rounds: int = 4) -> list:
    """The results of `work(i)` for each thread i, with the threads kept in step so that their passes overlap."""
    barrier = threading.Barrier(threads)

    def run(i: int) -> list:
        found = []
        for _ in range(rounds):
            barrier.wait(60)
            found.append(work(i))
        return found

    with ThreadPoolExecutor(threads) as pool:
        return [result for results in pool.map(run, range(threads)) for result in results]


def moved(model=None, **config) -> PeftModel:
    model = wrap(model, **config)
    move(model, scale=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "gradients"),
    [
        pytest.param(family, gradients, marks=[] if (family, gradients) in SHOWN else pytest.mark.more)
        for family in ("qwen3", "gpt2", "gpt_oss", "gemma3n_text", "qwen3_next")
        for gradients in (False, True)
    ],
)
def test_every_thread_gets_what_it_would_get_alone(family, gradients):
    model = moved(build_architecture(family, dtype=torch.float32 if gradients else torch.bfloat16), layer="1-2")
    inputs = [token_batch(2, seed=seed) for seed in range(THREADS)]
    names, before = [n for n, _ in model.named_parameters()], base_weights(model)

    def work(i: int) -> torch.Tensor:
        assert [n for n, _ in model.named_parameters()] == names
        with torch.set_grad_enabled(gradients):
            out = model(inputs[i], use_cache=False).logits
        assert [n for n, _ in model.named_parameters()] == names
        return out

    expected = [work(i) for i in range(THREADS)]
    assert all(torch.equal(got, expected[k // 4]) for k, got in enumerate(together(work)))
    assert same(base_weights(model), before)
    with model.disable_adapter(), torch.no_grad():
        found = together(lambda i: model(inputs[i], use_cache=False).logits, rounds=1)
    with torch.no_grad():
        base = [model.unload()(tokens, use_cache=False).logits for tokens in inputs[:1]]
    assert torch.equal(found[0], base[0]) and not torch.equal(found[0], expected[0])


def test_nothing_is_written_while_a_pass_runs():
    """Inside the block, at the moment when the weights are in effect, the model's own parameters are the base's."""
    model = moved(build(dtype=torch.bfloat16))
    before, seen = base_weights(model), []
    layer = tuner_layers(model)[0]
    layer.base_layer.register_forward_hook(lambda *_: seen.append(same(base_weights(model), before)))
    logits(model)
    assert seen == [True]


def test_generation_in_threads():
    model = moved(build(dtype=torch.bfloat16))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def work(i: int) -> torch.Tensor:
        return model.generate(input_ids=token_batch(2, seed=i), **options)

    expected = [work(i) for i in range(4)]
    assert all(torch.equal(got, expected[k]) for k, got in enumerate(together(work, threads=4, rounds=1)))


def test_mixed_batches_in_threads():
    """Each thread's rows have their own adapters, beside threads without any."""
    model = wrap(build(dtype=torch.bfloat16), layer=1)
    model.add_adapter("b", SingleLayerConfig(layer=[1, 2]))
    for name in ("default", "b"):
        move(model, name, seed=len(name), scale=0.3)
    model.eval()
    rows = [["default", "b", "__base__"], ["b", "b", "default"], None, ["__base__"] * 3]

    @torch.no_grad()
    def work(i: int) -> torch.Tensor:
        names = rows[i % len(rows)]
        return model(input_ids=token_batch(seed=i), **({} if names is None else {"adapter_names": names})).logits

    expected = [work(i) for i in range(THREADS)]
    assert all(torch.equal(got, expected[k // 4]) for k, got in enumerate(together(work)))
    assert all(layer.row_adapters is None for layer in tuner_layers(model))


def test_gradients_of_threads_are_those_of_passes_in_turn():
    """The cut of the graph is a pass's own: none loses its gradients because another one has just begun."""
    model = moved(build())
    model.get_base_model().enable_input_require_grads()

    def work(i: int) -> dict[str, torch.Tensor]:
        tokens = token_batch(seed=i)
        loss = model(input_ids=tokens, labels=tokens).loss
        return dict(zip(masters(model), torch.autograd.grad(loss, list(masters(model).values())), strict=True))

    expected = [work(i) for i in range(THREADS)]
    assert all(same(got, expected[k // 4]) for k, got in enumerate(together(work)))


def test_a_merged_adapter_is_taken_out_once_by_threads_that_run_the_base():
    model = moved()
    with model.disable_adapter():
        expected = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert all(torch.equal(got, expected) for got in together(lambda i: logits(model), rounds=1))
    assert not any(layer.merged for layer in tuner_layers(model))


def test_adapters_are_loaded_while_others_run(tmp_path):
    model = moved()
    model.save_pretrained(tmp_path)
    expected = logits(model)

    def work(i: int) -> torch.Tensor | None:
        if i:
            return logits(model)
        model.load_adapter(str(tmp_path), f"new{threading.get_ident()}-{len(model.peft_config)}")
        return None

    assert all(got is None or torch.equal(got, expected) for got in together(work, threads=3, rounds=3))
    assert len(model.peft_config) == 4


@pytest.mark.parametrize("deleted", [False, True])
def test_an_adapter_comes_and_goes_while_another_thread_runs_another_one(deleted, monkeypatch):
    """A pass of another thread in every moment in which a wrapped module has half of the adapter."""
    model, config, seen = moved(layer=1), SingleLayerConfig(layer=1), []
    expected = logits(model)
    if deleted:
        model.add_adapter("b", config)

    class Watching(dict):
        def pause(self) -> None:
            with ThreadPoolExecutor(1) as pool:
                seen.append(torch.equal(pool.submit(logits, model).result(), expected))

        def __setitem__(self, *item) -> None:
            super().__setitem__(*item)
            self.pause()

        def __delitem__(self, name) -> None:
            self.pause()
            super().__delitem__(name)

    for layer in tuner_layers(model):
        monkeypatch.setattr(layer, "master_dtypes", Watching(layer.master_dtypes))
    model.delete_adapter("b") if deleted else model.add_adapter("b", config)
    assert len(seen) == len(tuner_layers(model)) and all(seen)


class Pause:
    """Stops a pass inside the block of the thread that is told to, until it is told to go on."""

    def __init__(self, model, module=None) -> None:
        self.reached, self.go_on, self.thread = threading.Event(), threading.Event(), None
        (module or model.get_base_model().model.layers[1]).register_forward_hook(self)

    def __call__(self, *_) -> None:
        if threading.get_ident() == self.thread:
            self.reached.set()
            assert self.go_on.wait(60)


def paused(model, pause: Pause, run=logits):
    """A future of `run(model)` in another thread, stopped inside the block."""
    pool = ThreadPoolExecutor(1)

    def work():
        pause.thread = threading.get_ident()
        return run(model)

    future = pool.submit(work)
    assert pause.reached.wait(60)
    pool.shutdown(wait=False)
    return future


@pytest.mark.parametrize("switch", ["disable", "set_adapter"])
def test_a_pass_during_which_another_thread_switches_is_refused(switch):
    model = moved()
    model.add_adapter("b", SingleLayerConfig(layer=2))
    move(model, "b", seed=5, scale=0.3)
    expected, pause = logits(model), Pause(model)
    future = paused(model, pause)
    if switch == "disable":
        with model.disable_adapter():
            base = logits(model)
    else:
        model.set_adapter("b")
    pause.go_on.set()
    with pytest.raises(
        RuntimeError, match="another thread has switched the model's adapters during this pass"
    ) as error:
        future.result(60)
    assert "\n" not in str(error.value)
    if switch == "disable":
        assert torch.equal(base, logits(moved().unload()))
        assert torch.equal(logits(model), expected)
    else:
        assert not torch.equal(logits(model), expected)


def test_a_thread_is_refused_the_base_that_another_one_asked_for():
    model = moved()
    pause = Pause(model)

    def base(model):
        with model.disable_adapter():
            return logits(model)

    future = paused(model, pause, base)
    with pytest.raises(RuntimeError, match=r"another thread has switched .* off and runs it.*__base__") as error:
        logits(model)
    assert "\n" not in str(error.value)
    pause.go_on.set()
    assert torch.equal(future.result(60), logits(moved().unload()))
    assert torch.equal(logits(model), logits(moved()))


def test_generation_during_which_another_thread_switches_is_refused():
    model = moved()
    pause = Pause(model)

    def generate(model):
        return model.generate(input_ids=token_batch(), max_new_tokens=2, eos_token_id=None, pad_token_id=0)

    future = paused(model, pause, generate)
    with model.disable_adapter():
        pass
    pause.go_on.set()
    with pytest.raises(RuntimeError, match="another thread has switched"):
        future.result(60)


def test_one_thread_switches_as_it_likes():
    """Also inside a pass of its own, as a contrast with the base does."""
    model = moved()

    def contrast(tokens, scores):
        with model.disable_adapter():
            return scores - model(tokens).logits[:, -1]

    options = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    tokens = model.generate(input_ids=token_batch(), logits_processor=[contrast], **options)
    assert tokens.shape[1] == token_batch().shape[1] + 3


def test_a_pass_that_fails_leaves_no_trace():
    model = moved()
    expected = logits(model)
    with pytest.raises(IndexError):
        model(torch.tensor([[1000]]))
    assert torch.equal(together(lambda i: logits(model), threads=2, rounds=1)[0], expected)
    with model.disable_adapter():
        assert together(lambda i: logits(model), threads=2, rounds=1)


# What a module may be besides its class: a patched forward, attributes set in the pass, lists of parameters.
def given_a_forward(model):
    layer = tuner_layers(model)[0].base_layer
    old = layer.forward
    layer.forward = lambda *args, **kwargs: old(*args, **kwargs)
    return layer


def test_a_forward_of_its_own_runs_in_one_thread_and_refuses_a_second():
    model = moved(build(dtype=torch.bfloat16))
    expected, before = logits(model), base_weights(model)
    layer = given_a_forward(model)
    assert torch.equal(logits(model), expected)
    pause = Pause(model, layer)
    future = paused(model, pause)
    with pytest.raises(RuntimeError, match=r"a forward of its own.*two threads") as error:
        logits(model)
    assert "\n" not in str(error.value)
    pause.go_on.set()
    assert torch.equal(future.result(60), expected) and torch.equal(logits(model), expected)
    assert same(base_weights(model), before)


@pytest.mark.parametrize("how", ["accelerate", "method"])
def test_a_patched_forward_that_names_its_module_runs_in_threads(how):
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = moved(build(dtype=torch.bfloat16))
    expected = logits(model)
    for layer in tuner_layers(model):
        if how == "accelerate":
            add_hook_to_module(layer.base_layer, ModelHook())
        else:
            layer.base_layer.forward = type(layer.base_layer).forward.__get__(layer.base_layer)
    assert all(torch.equal(got, expected) for got in together(lambda i: logits(model), rounds=2))
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)


class Counting(nn.Module):
    """Keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.seen = 0

    def forward(self, x):
        self.seen += 1
        self.latest = x.shape
        return x * self.weight


def test_what_a_module_keeps_of_a_pass():
    plain = nn.Sequential(nn.ModuleList([nn.Sequential(Counting()), nn.Sequential(Counting())]))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = plain[0]

        def forward(self, x):
            for block in self.layers:
                x = block(x)
            return x

    base = Model()
    reference = copy.deepcopy(base)
    model = wrap(base, layer=1)
    for parameter in masters(model).values():
        parameter.data += 1
    reference.layers[1][0].weight.data += 1
    x = torch.arange(4.0)
    assert torch.equal(model(x), reference(x))
    layer = tuner_layers(model)[0]
    assert layer.seen == layer.base_layer.seen == 1 and layer.latest == (4,)
    assert torch.equal(layer.base_layer.weight, torch.ones(4))


def test_a_recurrent_module_takes_the_adapters_weights():
    """`nn.LSTM` keeps a list of its parameters beside them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    torch.manual_seed(0)
    base = Model()
    reference = copy.deepcopy(base)
    model = wrap(base, layer=1)
    for name, parameter in masters(model).items():
        parameter.data += 0.5
        reference.get_parameter(name).data += 0.5
    x = torch.randn(2, 3, 4)
    assert torch.equal(model(x), reference(x))
    model.merge_adapter()
    assert torch.equal(model(x), reference(x))
