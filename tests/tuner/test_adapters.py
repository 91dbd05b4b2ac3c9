"""Several adapters on one model, the refusals, and blocks of unusual build."""

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from torch import nn

from models import FAMILIES, build, token_batch
from peft_onelayer import SingleLayerConfig
from tuner.helpers import base_weights, logits, masters, move, same, train, tuner_layers, wrap


def trainable(model: nn.Module) -> set[str]:
    """Names of the adapters that have a parameter which requires grad; "base" stands for the base model."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return {
        n.split(".single_layer_params.")[1].split(".")[0] if ".single_layer_params." in n else "base" for n in names
    }


def two_adapters(layers=(2, 2), dtype=torch.float32) -> PeftModel:
    model = wrap(build(dtype=dtype), layer=layers[0])
    model.add_adapter("b", SingleLayerConfig(layer=layers[1]))
    return model


@pytest.mark.parametrize("layers", [(2, 2), (1, 3), ("1-2", "2-3")], ids=str)
def test_switching_between_adapters(layers):
    model = two_adapters(layers)
    untouched = logits(model)
    outputs = {}
    for seed, name in enumerate(("default", "b")):
        move(model, name, seed=seed)
        model.set_adapter(name)
        assert trainable(model) == {name} and model.active_adapter == name
        outputs[name] = logits(model)
    assert not torch.equal(outputs["default"], outputs["b"])
    for name, expected in outputs.items():
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), untouched) and trainable(model) == set()
        assert trainable(model) == {name}
    model.set_adapter("b", inference_mode=True)
    assert trainable(model) == set() and torch.equal(logits(model), outputs["b"])


@pytest.mark.parametrize("layers", [(2, 2), (1, 3)], ids=str)
def test_two_active_adapters_train_together(layers):
    model = two_adapters(layers)
    model.base_model.set_adapter(["default", "b"])
    assert trainable(model) == {"default", "b"}
    frozen = base_weights(model)
    starts = {name: {n: p.detach().clone() for n, p in masters(model, name).items()} for name in ("default", "b")}
    train(model)
    assert same(base_weights(model), frozen)
    for name, start in starts.items():
        assert not any(torch.equal(p, start[n]) for n, p in masters(model, name).items())


def test_adding_an_adapter_changes_nothing_that_was_there():
    model = wrap()
    expected, frozen, tuned = move(model), base_weights(model), logits(model)
    model.set_requires_grad("default", False)
    model.add_adapter("b", SingleLayerConfig(layer="1-2"))
    assert model.active_adapters == ["default"] and trainable(model) == set()
    assert same(base_weights(model), frozen) and torch.equal(logits(model), tuned)
    assert same({n: p.detach() for n, p in masters(model).items()}, expected)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("b", SingleLayerConfig(layer=0))


@pytest.mark.parametrize("layers", [(2, 2), (1, 3), (3, 1)], ids=str)
@pytest.mark.filterwarnings("ignore:Adapter default was active")
def test_deleting_adapters(layers):
    model = two_adapters(layers)
    untouched = logits(model)
    move(model, "b")
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert not masters(model) and list(model.peft_config) == ["b"]
    assert model.active_adapters == ["b"] and model.active_adapter == "b"
    assert get_model_status(model).active_adapters == ["b"]
    assert torch.equal(logits(model), expected) and trainable(model) == {"b"}
    model.delete_adapter("b")
    assert torch.equal(logits(model.base_model), untouched) and not model.peft_config  # a PeftModel wants an adapter
    unloaded = model.unload()
    assert not tuner_layers(unloaded) and torch.equal(logits(unloaded), untouched)
    with pytest.raises(ValueError, match="does not exist"):
        two_adapters().delete_adapter("other")


@pytest.mark.parametrize("trains", [True, False])
def test_disabling_restores_what_required_grad(trains, tmp_path):
    model = wrap()
    untouched, _ = logits(model), move(model)
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build(), tmp_path, is_trainable=trains)
    expected, before = logits(model), trainable(model)
    assert before == ({"default"} if trains else set())
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model), untouched)
        assert torch.equal(logits(model), untouched) and trainable(model) == set()
    assert torch.equal(logits(model), expected) and trainable(model) == before
    with model.disable_adapter():
        model.set_adapter("default")  # says that it shall train
    assert trainable(model) == {"default"}


def test_status():
    model = two_adapters((2, 3))
    model.merge_adapter(["b"])
    layers, status = get_layer_status(model), get_model_status(model)
    block = len(masters(model))
    assert len(layers) == status.num_adapter_layers == 2 * block
    assert {layer.module_type for layer in layers} == {"single_layer.SingleLayerLayer"}
    assert {tuple(layer.available_adapters) for layer in layers} == {("default",), ("b",)}
    assert {tuple(layer.merged_adapters) for layer in layers} == {(), ("b",)}
    assert status.adapter_model_type == "SingleLayerModel" and status.base_model_type == "Qwen3ForCausalLM"
    assert status.peft_types == {"default": "SINGLE_LAYER", "b": "SINGLE_LAYER"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], ["b"])
    assert status.requires_grad == {"default": True, "b": False}
    assert status.available_adapters == ["b", "default"] and status.devices == {"default": ["cpu"], "b": ["cpu"]}
    assert status.trainable_params == sum(p.numel() for p in masters(model).values())
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


def snapshot(model: nn.Module) -> dict:
    return {
        "modules": repr(model),
        "parameters": {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()},
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "configs": {name: type(c) for name, c in getattr(model, "peft_config", {}).items()},
    }


def assert_refused(attempt, model: nn.Module, match: str) -> None:
    """`attempt()` raises a ValueError in one line and leaves `model` as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=match) as error:
        attempt()
    assert "\n" not in str(error.value)
    after = snapshot(model)
    for name, (identity, requires_grad, value) in before.pop("parameters").items():
        now = after["parameters"][name]
        assert now[:2] == (identity, requires_grad) and torch.equal(now[2], value)
    after.pop("parameters")
    assert after == before


@pytest.mark.parametrize("entrance", ["get_peft_model", "inject", "transformers"])
@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
def test_a_model_with_another_method_is_refused(entrance):
    model = build()
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    config = SingleLayerConfig(layer=2)
    attempt = {
        "get_peft_model": lambda: get_peft_model(model, config),
        "inject": lambda: inject_adapter_in_model(config, model, "b"),
        "transformers": lambda: model.add_adapter(config, "b"),
    }[entrance]
    assert_refused(attempt, model, "already carries another PEFT method .*layers.0.self_attn.q_proj")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
def test_a_wrapped_model_is_not_wrapped_once_more():
    """TRL's trainers would look for the base model behind one wrapper."""
    model = get_peft_model(build(), SingleLayerConfig(layer=2))
    wrapped = lambda: get_peft_model(model, SingleLayerConfig(layer=3))  # noqa: E731
    assert_refused(wrapped, model, "wrapped by PEFT already; for several blocks give them together")
    model.add_adapter("other", SingleLayerConfig(layer=3))
    assert set(model.peft_config) == {"default", "other"}


def test_a_lora_model_refuses_the_adapter_and_the_other_way_round():
    lora = get_peft_model(build(), LoraConfig(target_modules=["q_proj"]))
    assert_refused(lambda: lora.add_adapter("b", SingleLayerConfig(layer=2)), lora, "different peft types")
    model = wrap()
    assert_refused(lambda: model.add_adapter("b", LoraConfig()), model, "different peft types")


def test_layers_that_share_parameters_are_refused():
    model = build()
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[2].mlp.up_proj.weight
    for layer, other in ((2, 3), (3, 2)):
        match = rf"layers\.{layer}\.mlp\.up_proj\.weight is shared with model\.layers\.{other}\.mlp"
        assert_refused(lambda layer=layer: wrap(model, layer=layer), model, match)
    assert len(masters(wrap(model, layer=1))) == 11


def test_a_block_used_twice_is_refused():
    model = build()
    model.model.layers[3] = model.model.layers[1]
    assert_refused(lambda: wrap(model, layer=1), model, "is shared with")


class DirectBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.scale * self.linear(x)


class Mixer(nn.Module):
    """A composite module: parameters of its own beside its children, one of which is composite again."""

    def __init__(self, depth: int = 1):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4))
        self.inner = Mixer(depth - 1) if depth else nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x) * self.gate))

    def mix(self, x):
        """Models do call methods other than `forward`."""
        return x * self.gate.sigmoid()


class CompositeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mixer = Mixer()

    def forward(self, x):
        return self.mixer.mix(x) + self.mixer(self.norm(x)) + self.mixer.gate


class Stack(nn.Module):
    def __init__(self, block: type[nn.Module], dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([block() for _ in range(3)])
        self.to(dtype)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_block_with_direct_parameters_is_refused_unless_parts_are_named():
    model = Stack(DirectBlock)
    assert_refused(lambda: wrap(model, layer=1), model, r"block 1 \(DirectBlock\) owns .*\(scale\).*target_modules")
    assert set(masters(wrap(model, layer=1, target_modules=["linear"]))) == {
        "layers.1.linear.weight",
        "layers.1.linear.bias",
    }


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_a_quantized_block_is_refused(dtype):
    model = build()
    projection = model.model.layers[2].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach().to(dtype), requires_grad=False)
    assert_refused(
        lambda: wrap(model, layer=2), model, rf"layers\.2\.mlp\.up_proj\.weight holds Parameter of {dtype}: "
    )
    wrap(model, layer=1)  # the others may be quantized


def test_a_block_packed_into_buffers_is_refused():
    model = build()
    del model.model.layers[2].mlp.up_proj.weight
    model.model.layers[2].mlp.up_proj.register_buffer("qweight", torch.zeros(48, 8, dtype=torch.int32))
    assert_refused(lambda: wrap(model, layer=2), model, r"up_proj\.qweight holds ")


def test_a_model_on_meta_can_be_wrapped_but_not_run():
    with torch.device("meta"):
        model = build()
    model = wrap(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with pytest.raises(RuntimeError, match=r"on the meta device .*its adapter would have no effect"):
        model(token_batch().to("meta"))


def test_an_offloaded_block_is_refused():
    model = wrap()
    expected = logits(model)
    cpu_offload(model.get_base_model().model.layers[2].mlp, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="offloaded to CPU or disk"):
        logits(model)
    remove_hook_from_submodules(model)  # the hooks lie on the wrapped modules, not on their wrappers
    assert torch.equal(logits(model), expected)


def inputs() -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_composite_modules_train_like_full_fine_tuning(dtype):
    x, reference = inputs().to(dtype), Stack(CompositeBlock, dtype)
    model = wrap(Stack(CompositeBlock, dtype), layer=1)
    reference(x).square().sum().backward()
    model(x).square().sum().backward()
    expected = {f"layers.1.{n}": p.grad for n, p in reference.layers[1].named_parameters()}
    assert masters(model).keys() == expected.keys() and len(expected) == 10
    for name, parameter in masters(model).items():
        assert parameter.grad.abs().sum() > 0
        if name.endswith("mixer.gate") and dtype != torch.float32:
            # used three times per forward pass: its contributions are summed in float32, not in bfloat16
            torch.testing.assert_close(parameter.grad, expected[name].float(), rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(parameter.grad, expected[name].float()), name


# (targets of the first adapter, of the second): the order in which a composite module and its children get wrapped
TARGET_PAIRS = [
    (None, None),
    (None, ["out"]),
    (["out"], None),
    (["mixer.inner"], ["norm"]),
    (["mixer.inner.out"], ["mixer"]),
    (["norm"], r"mixer\.inner\.inner"),
]


@pytest.mark.parametrize(
    ("first", "second", "method"),
    [
        *((*pair, "merge_and_unload") for pair in TARGET_PAIRS),
        (*TARGET_PAIRS[0], "unload"),
        *(pytest.param(*pair, "unload", marks=pytest.mark.more) for pair in TARGET_PAIRS[1:]),
    ],
    ids=str,
)
def test_composite_modules_with_two_adapters(tmp_path, first, second, method):
    x, base = inputs().bfloat16(), Stack(CompositeBlock, torch.bfloat16)
    alone = {}
    for name, targets in (("default", first), ("b", second)):
        solo = wrap(Stack(CompositeBlock, torch.bfloat16), layer=1, target_modules=targets)
        alone[name] = (move(solo, seed=len(name)), solo(x))
        solo.save_pretrained(tmp_path / "alone" / name)
    model = wrap(base, layer=1, target_modules=first)
    untouched = Stack(CompositeBlock, torch.bfloat16)
    model.add_adapter("b", SingleLayerConfig(layer=1, target_modules=second))
    for name, (tuned, expected) in alone.items():
        assert same(move(model, name, seed=len(name)), tuned)
        model.set_adapter(name)
        assert torch.equal(model(x), expected)
    # a file does not depend on which adapters were there when it was written or where it is read
    model.save_pretrained(tmp_path / "together")
    for name, (tuned, expected) in alone.items():
        folder = tmp_path / "together" / ("" if name == "default" else name)
        for path in (folder, tmp_path / "alone" / name):
            loaded = PeftModel.from_pretrained(Stack(CompositeBlock, torch.bfloat16), path, adapter_name=name)
            assert torch.equal(loaded(x), expected)
            model.load_adapter(path, f"again-{path.parent.name}-{name}")
            assert same({n: p.detach() for n, p in masters(loaded, name).items()}, tuned)
    for name in [name for name in model.peft_config if name.startswith("again")]:
        model.set_adapter(name)
        assert torch.equal(model(x), alone[name.rpartition("-")[2]][1])
    model.set_adapter("b")
    model.merge_adapter()
    assert torch.equal(model(x), alone["b"][1])
    model.unmerge_adapter()
    unloaded = getattr(model, method)()
    assert not tuner_layers(unloaded) and unloaded.state_dict().keys() == untouched.state_dict().keys()
    expected = untouched(x) if method == "unload" else alone["b"][1]
    assert torch.equal(unloaded(x), expected)


class Container(nn.Module):
    """No parameters of its own."""

    def __init__(self):
        super().__init__()
        self.list = nn.ModuleList([nn.Linear(4, 4), Mixer()])

    def forward(self, x):
        return self.list[1](self.list[0](x))


def test_a_second_adapter_reaches_into_a_container_inside_a_composite_module():
    def base():
        model = Stack(CompositeBlock)
        for block in model.layers:
            block.mixer.inner = Container()
        return model

    model = wrap(base(), layer=1)
    model.add_adapter("b", SingleLayerConfig(layer=1))
    model.add_adapter("c", SingleLayerConfig(layer=1, target_modules=["list.1"]))
    everything = {f"layers.1.{name}" for name, _ in base().layers[1].named_parameters()}
    assert masters(model).keys() == masters(model, "b").keys() == everything
    assert masters(model, "c").keys() == {name for name in everything if ".list.1." in name}
    model = wrap(base(), layer=1, target_modules=["mixer.out", "list.0"])
    model.add_adapter("b", SingleLayerConfig(layer=1))
    assert masters(model, "b").keys() == everything


SMALL_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LINEAR_ATTENTION = {f"linear_num_{what}_heads": 2 for what in ("key", "value")} | {
    f"linear_{what}_head_dim": 8 for what in ("key", "value")
}
UNUSUAL = {
    "Qwen3Moe": {"num_experts": 4, **SMALL_EXPERTS},
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Next": {"num_experts": 4, **SMALL_EXPERTS, **LINEAR_ATTENTION},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
}


@pytest.mark.parametrize("family", UNUSUAL)
def test_fused_experts_and_composite_attention_of_real_models(tmp_path, family):
    def base():
        return build(family, dtype=torch.bfloat16, **UNUSUAL[family])

    untouched = base()
    before, state = logits(untouched), untouched.state_dict()
    model = wrap(base(), layer=1)
    assert torch.equal(logits(model), before)
    names = {f"model.layers.1.{n}" for n, _ in untouched.model.layers[1].named_parameters()}
    assert masters(model).keys() == names
    move(model)
    expected = logits(model)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    through_transformers = base()
    report = through_transformers.load_adapter(tmp_path)
    assert not report.missing_keys and not report.unexpected_keys
    assert torch.equal(logits(through_transformers), expected)
    loaded.merge_adapter()
    assert torch.equal(logits(loaded), expected)
    unloaded = loaded.unload()
    assert same(dict(unloaded.state_dict()), dict(state))
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), expected) and list(merged.state_dict()) == list(state)


@pytest.mark.parametrize("family", FAMILIES)
def test_init_weights_false_differs_from_the_base_everywhere(family):
    base = build(family)
    model = wrap(base, layer=1, init_weights=False)
    weights = base_weights(model)
    assert not any(torch.equal(p, weights[name]) for name, p in masters(model).items())


def test_generation_uses_the_adapter():
    model = wrap(task_type="CAUSAL_LM")
    move(model, scale=0.5)
    merged = wrap(task_type="CAUSAL_LM")
    move(merged, scale=0.5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = merged.merge_and_unload().generate(token_batch(), **options)
    assert torch.equal(model.generate(input_ids=token_batch(), **options), expected)
    assert not torch.equal(build().generate(token_batch(), **options), expected)


def test_the_state_dict_of_a_plain_injected_model():
    model = inject_adapter_in_model(SingleLayerConfig(layer=2), build(), "mine")
    assert isinstance(model, transformers.PreTrainedModel) and trainable(model) == {"mine"}
    state = get_peft_model_state_dict(wrap(), adapter_name="default")
    assert {key.removeprefix("base_model.model.") for key in state} == {
        name.replace("single_layer_params.mine", "single_layer_params")
        for name, p in model.named_parameters()
        if p.requires_grad
    }
