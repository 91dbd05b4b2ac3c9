"""What is estimated of a run's memory, from shapes alone, is what the run takes."""

import json
import re
from importlib.resources import files

import demo_model
import pytest
import torch
import trl
from memory_peak import METHODS, estimated_and_measured
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer import utils

from models import build, build_architecture
from peft_onelayer.runs import TrainingSettings, memory, train
from peft_onelayer.runs.dry_run import dry_run
from peft_onelayer.runs.memory import LORA, Batches, estimate_memory, lora
from peft_onelayer.runs.models import load_tokenizer
from peft_onelayer.runs.shapes import LiveBytes
from peft_onelayer.sweep.plan import plan_sweep
from peft_onelayer.sweep.settings import SweepSettings

DEMO = str(files("peft_onelayer") / "demo_model")


@pytest.mark.more
def test_a_small_model():
    torch.manual_seed(0)
    shape = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    config = LlamaConfig(num_attention_heads=4, pad_token_id=0, eos_token_id=16, **shape)
    estimate, measured = estimated_and_measured(LlamaForCausalLM(config), "block", 2, DEMO, 2, 4)
    assert estimate.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.more
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("block", {}),
        ("full", {}),
        ("LoRA", {"beta": 0.0}),
        ("block", {"gradient_checkpointing": False, "optim": "sgd"}),
        ("full", {"beta": 0.0}),
    ],
    ids=str,
)
def test_the_demo_model(method, fields):
    model, _ = demo_model.load()
    estimate, measured = estimated_and_measured(model, method, 5, DEMO, 2, 4, **fields)
    assert estimate.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.more
@pytest.mark.parametrize("method", METHODS)
def test_the_model_of_the_benchmarks(method):
    torch.manual_seed(0)
    shape = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24}
    config = LlamaConfig(num_attention_heads=8, pad_token_id=0, eos_token_id=16, **shape)
    estimate, measured = estimated_and_measured(LlamaForCausalLM(config), method, 12, DEMO, 1, 4, beta=0.0)
    assert estimate.peak == pytest.approx(measured, rel=0.1)


def held(model, train, *, optim="adamw_torch_fused", rows=4, completion=12, outputs=None, **fields):
    given = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": rows, "num_generations": rows}
    arguments = trl.GRPOConfig("unused", optim=optim, max_completion_length=completion, **given, **fields)
    batches = Batches(rows=rows, prompt=20, completion=completion, passes=2, outputs=outputs)
    return estimate_memory(model, train, batches, arguments)


def bytes_of(model, dtype):
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def test_what_does_not_depend_on_the_batch_is_exact():
    model = build("Qwen3", dtype=torch.bfloat16, tie_word_embeddings=False)
    block = sum(p.numel() for p in model.model.layers[2].parameters())
    model.config.dtype = torch.bfloat16
    one, full = held(model.config, [2]), held(model.config, None)
    buffers = sum(b.nbytes for b in model.buffers())
    assert (one.what, one.trained, one.masters, one.gradients) == ("block 2", block, 4 * block, 4 * block)
    assert 0 <= one.weights - bytes_of(model, torch.bfloat16) - buffers <= 64  # a second table of rotations
    assert 8 * block <= one.optimizer <= 8 * block + 64  # a counter for each tensor
    assert 0 <= full.weights - bytes_of(model, torch.float32) - buffers <= 64
    assert full.gradients == bytes_of(model, torch.float32) and full.masters == 0
    assert (one.adapter, full.adapter) == (4 * block, bytes_of(model, torch.bfloat16))
    assert one.sparse == {0.05: round(0.05 * 2 * block), 0.2: round(0.163 * 2 * block)} and full.sparse == {}
    assert one.peak < full.peak


@pytest.mark.more
def test_a_block_takes_less_than_lora_and_lora_less_than_full_training():
    config = build("Qwen3", dtype=torch.bfloat16, tie_word_embeddings=False).config
    config.dtype = torch.bfloat16
    block, adapters, full = (held(config, train).peak for train in ([2], lora(), None))
    assert block < adapters < full


@pytest.mark.more
def test_sgd_keeps_no_state():
    config = build("Llama").config
    adam, sgd = held(config, None), held(config, None, optim="sgd")
    assert (sgd.optimizer, sgd.peak) == (0, adam.peak_without_state)
    assert adam.peak == sgd.peak + adam.optimizer and sgd.peak_without_state == sgd.peak


@pytest.mark.more
def test_without_checkpointing_blocks_above_the_trained_one_keep_activations_and_those_below_none():
    config = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=5)
    with_it = [held(config, [k], rows=64).activations for k in (0, 4)]
    without = [held(config, [k], rows=64, gradient_checkpointing=False).activations for k in (0, 4)]
    assert without[0] > 2 * without[1] and without[0] > 2 * with_it[0]
    assert without[1] < 1.2 * with_it[1]


@pytest.mark.more
def test_keys_and_values_are_those_of_every_block():
    config = build("Qwen3").config
    arguments = trl.GRPOConfig("unused", use_cpu=True, bf16=False)
    found = estimate_memory(config, [1], Batches(rows=2, prompt=5, completion=7, generated=6, group=2), arguments)
    expected = 6 * (5 + 7) * 2 * 2 * 8 * 4 * 4  # rows, tokens, keys and values, heads, width, float32, blocks
    assert 0 <= found.cache - expected <= 64


def test_a_mask_leaves_what_it_trains(tmp_path):
    from safetensors.torch import save_file

    model = build("Llama")
    names = [name for name, _ in model.named_parameters() if ".layers.1." in name]
    masks = {name: torch.zeros(model.get_parameter(name).shape, dtype=torch.bool) for name in names}
    for mask in masks.values():
        mask.view(-1)[:3] = True
    save_file(masks, tmp_path / "mask.safetensors")
    arguments = trl.GRPOConfig("unused", use_cpu=True, bf16=False)
    batches = Batches(rows=2, prompt=5, completion=7)
    found = estimate_memory(model.config, [1], batches, arguments, mask=str(tmp_path / "mask.safetensors"))
    assert found.trained == 3 * len(names)


@pytest.mark.more
@pytest.mark.parametrize("family", ["Gemma3Text", "Mistral"])
def test_other_families(family):
    assert held(build(family).config, [1]).activations > 0


def test_counted_bytes_are_those_that_live():
    kept = torch.ones(100)
    with LiveBytes() as live:
        one = kept + 1
        view = one[10:]
        two = view * 2
        assert live.live == 400 + 360
        del two
        assert live.live == 400 and live.peak == 760
        del one
        assert live.live == 400  # the view holds it
        del view
        assert (live.live, live.restart(), live.peak) == (0, 0, 0)


@pytest.mark.more
@pytest.mark.parametrize("lacks", [False, True])
def test_a_cpu_with_instructions_copies_a_frozen_head_for_every_row_but_for_a_block(monkeypatch, lacks):
    monkeypatch.setattr("peft_onelayer.runs.shapes.lacks_instructions", lambda dtype: lacks)
    sizes = {"vocab_size": 5000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(num_attention_heads=4, dtype=torch.bfloat16, **sizes)
    arguments = trl.GRPOConfig("unused", use_cpu=True, bf16=False)
    batches = Batches(rows=64, prompt=5, completion=2, generated=16, group=8)
    cpu, gpu = (estimate_memory(config, lora(), batches, arguments, on_gpu=on_gpu) for on_gpu in (False, True))
    block = estimate_memory(config, [1], batches, arguments, on_gpu=False)
    copies = 16 * 5000 * 32 * 2
    assert block.sampling < copies / 2 and gpu.sampling < copies / 2
    if lacks:
        assert cpu.sampling < copies / 2
    else:
        assert copies < cpu.sampling + cpu.cache < 1.4 * copies
        assert gpu.activations < cpu.activations


def test_what_shapes_do_not_tell_is_said_in_one_line():
    config = build("Llama").config
    with pytest.raises(ValueError, match=r"^what optim=lomo keeps does not follow from shapes: [^\n]+$"):
        held(config, [1], optim="lomo")
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match=r"^the model is quantized, [^\n]+$"):
        held(config, [1])


def of_type(model_type, dtype):
    config = build_architecture(model_type).config
    config.dtype = dtype
    return config


@pytest.mark.more
@pytest.mark.parametrize(
    ("config", "outputs", "says"),
    [
        (lambda: of_type("mamba2", torch.float32), ("log_probs",), "mamba2 keeps from token to token is not known"),
    ],
    ids=["no keys and values"],
)
def test_a_model_whose_memory_shapes_do_not_tell_is_said_in_one_line(config, outputs, says, logged):
    arguments = trl.GRPOConfig("unused", use_cpu=True, bf16=False)
    batches = Batches(rows=2, prompt=5, completion=3, generated=2, outputs=outputs)
    with pytest.raises(ValueError, match=rf"^what a model of type {says}[^\n]*$"):
        estimate_memory(config(), [1], batches, arguments)
    assert logged == []


@pytest.mark.more
@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError])
def test_a_fault_of_the_count_itself_is_not_told_as_one_of_the_model(monkeypatch, error):
    def broken(*args):
        raise error("ours")

    monkeypatch.setattr(memory, "_sample", broken)
    arguments = trl.GRPOConfig("unused", use_cpu=True, bf16=False)
    with pytest.raises(error, match=r"^ours$"):
        estimate_memory(build("Llama").config, [1], Batches(rows=2, prompt=5, completion=3, generated=2), arguments)


@pytest.mark.more
def test_what_cannot_be_compared_is_left_out_with_a_word(onelayer, tmp_path, monkeypatch):
    of_type("mixtral", torch.bfloat16).save_pretrained(tmp_path / "model")
    counted = memory.estimate_memory

    def but_for_full_training(config, train, *args, **kwargs):
        if train is None:
            raise ValueError("what it holds is not known")
        return counted(config, train, *args, **kwargs)

    monkeypatch.setattr("peft_onelayer.runs.dry_run.estimate_memory", but_for_full_training)
    code, err, out = onelayer("train", tmp_path / "model", *ASKED, "--json")
    assert code == 0 and [one["what"] for one in json.loads(out)["estimates"]] == ["block 1", LORA]
    says = "not compared with full training: what it holds is not known"
    assert err.count(says) == 1 and not any("Traceback" in line for line in err)


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        pytest.param("mixtral", "full", marks=pytest.mark.more),
        pytest.param("qwen3_moe", "block", marks=pytest.mark.more),
        pytest.param("qwen3_5_text", "block", marks=pytest.mark.more),
        pytest.param("bloom", "block", marks=pytest.mark.more),
    ],
)
def test_experts_in_float32_linear_attention_and_blocks_that_take_no_packed_rows(model_type, method):
    sizes = dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 256)
    sizes |= {"hidden_size": 128, "head_dim": 32, "vocab_size": 1000, "eos_token_id": 16, "pad_token_id": 0}
    config = build_architecture(model_type).config
    for name, size in sizes.items():
        if hasattr(config, name):
            setattr(config, name, size)
    model = AutoModelForCausalLM.from_config(config)
    estimate, measured = estimated_and_measured(model, method, 1, DEMO, 2, 4, beta=0.0)
    assert estimate.peak == pytest.approx(measured, rel=0.1)


@pytest.fixture
def only_a_configuration(tmp_path):
    build("Qwen3", num_layers=2).config.save_pretrained(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    return tmp_path / "model"


ASKED = ("--task", "arithmetic", "--layer", "1", "--dry-run")


def test_the_command_needs_a_configuration_and_writes_nothing(onelayer, only_a_configuration):
    code, err, out = onelayer("train", only_a_configuration, *ASKED)
    assert code == 0 and "no tokenizer is there, so 3 characters were taken for a token" in err
    assert "block 1" in out and "LoRA r=16, all linears" in out and "peak with --set optim=sgd" in out
    assert len(list(only_a_configuration.iterdir())) == 1


@pytest.mark.more
def test_the_command_counts_the_run_that_it_is_asked_for(onelayer, tmp_path):
    given = (*ASKED, "--prompts", "4", "--completions", "4", "--set", "optim=sgd", "--json")
    code, _, out = onelayer("train", DEMO, *given, "--out", tmp_path / "run")
    assert code == 0 and not (tmp_path / "run").exists() and not list(tmp_path.glob(".*"))
    found = json.loads(out)
    assert (found["batches"]["rows"], found["batches"]["passes"], found["batches"]["group"]) == (8, 2, 4)
    assert [one["what"] for one in found["estimates"]] == ["block 1", "full", "LoRA r=16, all linears"]
    assert found["estimates"][0]["optimizer"] == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--resume",), "--dry-run looks at a run that is to begin; leave out --resume"),
        (("--layer", "99"), "layer='99' is out of range: the model has 2 blocks"),
        (("--set", "optim=lomo"), "what optim=lomo keeps does not follow from shapes"),
    ],
)
def test_what_cannot_be_is_one_line(onelayer, only_a_configuration, given, says):
    code, err, out = onelayer("train", only_a_configuration, "--task", "arithmetic", "--dry-run", *given)
    assert code != 0 and len([line for line in err if says in line]) == 1 and out == ""


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_key_value_heads": 0}, "ZeroDivisionError: integer division or modulo by zero"),
        ({"num_hidden_layers": None}, "Field 'num_hidden_layers' expected int, got NoneType"),
        ({"pad_token_id": 10**6}, "AssertionError: Padding_idx must be within num_embeddings"),
        ({"vocab_size": 0}, "IndexError: index 0 is out of bounds"),
        ({"architectures": [3]}, "TypeError: "),
        ({"num_hidden_layers": 0, "layer_types": None}, "the model has no blocks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_makes_no_model_is_one_line(only_a_configuration, fields, says):
    path = only_a_configuration / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        dry_run(TrainingSettings(model=str(only_a_configuration), task="arithmetic", layer="middle", out="unused"))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="this TRL has no fused LM head")
@pytest.mark.parametrize("command", ["train", "dry run", "sweep"])
def test_a_model_that_names_no_part_below_its_head_is_one_line(tmp_path, command):
    build_architecture("llama4_text").save_pretrained(tmp_path)
    load_tokenizer(DEMO).save_pretrained(tmp_path)
    given = {"model": str(tmp_path), "task": "arithmetic"}
    run = {
        "train": lambda: train(TrainingSettings(**given, layer=2, learning_rate=1e-3, out=str(tmp_path / "run"))),
        "dry run": lambda: dry_run(TrainingSettings(**given, layer=2, out="unused")),
        "sweep": lambda: plan_sweep(SweepSettings(**given, layers=[2], learning_rate=1e-3)),
    }[command]
    with pytest.raises(ValueError, match=r"^TRL's LM head takes .* a Llama4ForCausalLM does not name in .*$"):
        run()


@pytest.mark.parametrize("model_type", ["gemma2", "bert"])  # without files a tokenizer of special tokens is made
def test_an_empty_tokenizer_made_from_the_configuration_is_none(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert load_tokenizer(str(tmp_path)) is None
    assert load_tokenizer(DEMO) is not None


@pytest.mark.more
@pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="this TRL has no fused LM head")
def test_offline_rows_are_cut_where_the_trainer_cuts_them(tmp_path, only_a_configuration):
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": "1" * n, "chosen": "2" * 27, "rejected": "3"}) + "\n" for n in (12, 60))
    )
    settings = {"model": str(only_a_configuration), "dataset": str(data), "algorithm": "dpo", "layer": 1, "out": "-"}
    whole, cut = (dry_run(TrainingSettings(**settings, config=c)).batches for c in ({}, {"max_length": 16}))
    assert (whole.rows, whole.prompt + whole.completion, whole.prompt, whole.generated) == (16, 29, 4, 0)
    assert cut.prompt + cut.completion == 16
