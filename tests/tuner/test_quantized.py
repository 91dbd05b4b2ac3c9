"""Quantized bases: the trained block is dequantized into float32 masters, the rest stays as it is."""

import warnings

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Trainer, TrainingArguments

from models import build, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner.quantized import dequantized, is_quantized
from tuner.helpers import base_name, logits, masters, move, same, train, tuner_layers

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # bitsandbytes packs 64 values to a scale
KINDS = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "fp4-double": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "bnb-int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "ao-int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "ao-int8-dynamic": lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models on disk in bfloat16, with and without biases."""
    made = {}
    for family in ("Qwen3", "Qwen2"):
        made[family] = tmp_path_factory.mktemp(family)
        build(family, dtype=torch.bfloat16, **SIZES).save_pretrained(made[family])
    return made


VARIANTS = {"fp4-double", "ao-int8-dynamic"}  # of others


@pytest.fixture(params=[pytest.param(k, marks=pytest.mark.more) if k in VARIANTS else k for k in KINDS])
def kind(request):
    return request.param


@pytest.fixture
def load(folders, kind):
    def load(family="Qwen3"):
        return AutoModelForCausalLM.from_pretrained(
            folders[family], quantization_config=KINDS[kind](), dtype=torch.bfloat16, device_map={"": "cpu"}
        ).eval()

    return load


def wrap(model, layer=2, **options):
    return get_peft_model(model, SingleLayerConfig(layer=layer, task_type="CAUSAL_LM", **options))


def packed(model) -> dict[str, torch.Tensor]:
    """Copies of all quantized tensors of the base, dequantized."""
    return {
        base_name(f"{name}.{n}"): dequantized(module, p).detach().clone()
        for name, module in model.named_modules()
        for n, p in module.named_parameters(recurse=False)
        if is_quantized(p)
    }


def test_the_block_is_dequantized_and_the_rest_stays(load):
    plain = load()
    before, expected = packed(plain), logits(plain)
    model = wrap(load())
    assert same(packed(model), before) and len(before) == 4 * 7
    tuned = masters(model)
    assert len(tuned) == 11 and {p.dtype for p in tuned.values()} == {torch.float32}
    for name, parameter in tuned.items():
        if name in before:
            assert torch.equal(parameter, before[name].float()) and parameter.shape == before[name].shape
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in tuned.values()}
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    # the adapter itself computes with dense weights: what the base does with such layers in their place
    for name in before.keys() & tuned.keys():
        path = name.removesuffix(".weight")
        old = plain.get_submodule(path)
        dense = torch.nn.Linear(old.in_features, old.out_features, old.bias is not None, dtype=plain.dtype)
        dense.weight.data.copy_(before[name])
        if old.bias is not None:
            dense.bias.data.copy_(old.bias)
        plain.set_submodule(path, dense)
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2"])
def test_the_forward_pass_uses_the_master_weights(load, family):
    """Every wrapped linear layer computes x W^T + b with its master, in the dtype of x."""
    model = wrap(load(family))
    move(model)
    seen = []
    for layer in tuner_layers(model):
        if isinstance(layer.base_layer, nn.Linear):
            layer.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
    logits(model)
    assert len(seen) == 7
    for layer, x, out in seen:
        own = {name: p.to(x.dtype) for name, p in layer.masters("default").items()}
        assert torch.equal(out, nn.functional.linear(x, own["weight"], own.get("bias")))


def test_training_moves_the_block_only(load):
    model = wrap(load())
    before = packed(model)
    others = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad and not is_quantized(p)}
    start = {n: p.detach().clone() for n, p in masters(model).items()}
    train(model)
    assert not any(torch.equal(p, start[n]) for n, p in masters(model).items())
    assert same(packed(model), before)
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    assert {p.dtype for p in masters(model).values()} == {torch.float32}


ONE_KIND = [kind if kind == "nf4" else pytest.param(kind, marks=pytest.mark.more) for kind in KINDS]


@pytest.mark.parametrize("kind", ONE_KIND, indirect=True)
def test_trainer_and_checkpointing(load, tmp_path):
    model = wrap(prepare_model_for_kbit_training(load()))
    start = {n: p.detach().clone() for n, p in masters(model).items()}
    data = [{"input_ids": token_batch(seed=i)[0], "labels": token_batch(seed=i)[0]} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=2, learning_rate=1e-2, gradient_checkpointing=True
    )
    Trainer(model, arguments, train_dataset=data).train()
    assert not any(torch.equal(p, start[n]) for n, p in masters(model).items())


@pytest.mark.parametrize("kind", ONE_KIND, indirect=True)
@pytest.mark.parametrize(
    ("trainer", "trained_before"),
    [
        pytest.param("SFT", True, marks=pytest.mark.more),
        pytest.param("SFT", False, marks=pytest.mark.more),
        pytest.param("GRPO", True, marks=pytest.mark.more),
        ("GRPO", False),
    ],
)
def test_trl_and_resuming(load, kind, tmp_path, tokenizer, trainer, trained_before):
    """TRL casts what trains to bfloat16 on bitsandbytes bases, also before it loads a checkpoint: the masters are
    float32 again from then on, and a resumed run equals the whole one."""
    more = {"num_generations": 4, "max_completion_length": 6} if trainer == "GRPO" else {}
    reward = {"reward_funcs": lambda completions, **_: [float(sum(map(ord, c)) % 17) for c in completions]}

    def run(folder, resume=None):
        model = wrap(load())
        if trained_before:
            move(model)
        before = packed(model)
        start = {n: p.detach().to(torch.bfloat16).float() for n, p in masters(model).items()}
        arguments = getattr(trl, f"{trainer}Config")(
            str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            **more,
        )
        made = getattr(trl, f"{trainer}Trainer")(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(
                {"prompt" if trainer == "GRPO" else "text": ["one", "two", "six", "ten"] * 4}
            ),
            processing_class=tokenizer,
            **(reward if trainer == "GRPO" else {}),
        )
        narrowed = torch.float32 if kind.startswith("ao-") else torch.bfloat16
        assert {p.dtype for p in masters(model).values()} == {narrowed}
        made.train(resume_from_checkpoint=resume)
        tuned = {n: p.detach() for n, p in masters(model).items()}
        assert {p.dtype for p in tuned.values()} == {torch.float32} and same(packed(model), before)
        assert not any(torch.equal(p, start[n]) for n, p in tuned.items())
        return tuned

    whole = run(tmp_path)
    assert same(run(tmp_path / "resumed", str(tmp_path / "checkpoint-2")), whole)


def test_saving_and_loading_are_exact(load, tmp_path):
    model = wrap(load())
    moved = move(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), tmp_path)
    assert same({n: p.detach() for n, p in masters(loaded).items()}, moved)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(loaded.unload()), logits(load()))


def test_the_way_out_of_merging_is_a_dense_base(load, folders, tmp_path):
    model = wrap(load())
    move(model)
    before = packed(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"is quantized, and merging would round.*bfloat16") as error:
            merge()
        assert "\n" not in str(error.value)
    assert same(packed(model), before) and not any(layer.merged for layer in tuner_layers(model))
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folders["Qwen3"], dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    for name, parameter in masters(model).items():
        assert torch.equal(merged.get_parameter(name), parameter.to(torch.bfloat16))


def test_several_adapters(load):
    model = wrap(load())
    move(model)
    alone = logits(model)
    model.add_adapter("b", SingleLayerConfig(layer=2, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), alone)
    model.base_model.set_adapter(["default", "b"])  # the second adds nothing yet
    assert torch.allclose(logits(model), alone, atol=1e-2)
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.set_adapter("copy")
    assert torch.equal(logits(model), alone)
    names = ["copy", "__base__", "default"]
    with torch.no_grad():
        mixed = model.eval()(input_ids=token_batch(), adapter_names=names).logits
        assert torch.equal(mixed[0], model(token_batch()).logits[0])


def test_a_block_kept_out_of_the_quantization_merges(folders):
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.layers.2", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(folders["Qwen3"], quantization_config=config, dtype=torch.bfloat16)
    assert not any(is_quantized(p) for p in model.model.layers[2].parameters())
    assert is_quantized(model.model.layers[1].mlp.up_proj.weight)
    model = wrap(model)
    move(model)
    adapted = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), adapted)


def test_other_quantizations_are_refused(folders):
    config = TorchAoConfig(Float8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folders["Qwen3"], quantization_config=config, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"layers\.2\..*Float8Tensor.*bitsandbytes.*torchao \(int8\)"):
        wrap(model)


def test_peft_takes_the_scales_from_an_8_bit_module_on_the_cpu(folders):
    """Why `dense` does not call peft.utils.integrations.dequantize_module_weight. When this fails, it can."""
    from peft.utils.integrations import dequantize_module_weight

    model = AutoModelForCausalLM.from_pretrained(
        folders["Qwen3"], quantization_config=KINDS["bnb-int8"](), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    layer, x = model.model.layers[0].mlp.up_proj, torch.ones(1, 64, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(x)
        dequantize_module_weight(layer)
        with pytest.raises((AttributeError, RuntimeError)):
            layer(x)
