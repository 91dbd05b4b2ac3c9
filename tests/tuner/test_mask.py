"""Training the entries of a mask and no others: exact, and the same files, merging and resuming as for a block."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from models import build, token_batch
from peft_onelayer import SingleLayerConfig, export_adapter
from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.adapter.write_sparse import write_sparse
from peft_onelayer.analysis.movement import movement_of_model
from tuner.helpers import logits, masters, move, same, train, tuner_layers

STACK = "model.layers."


def draw(model, share=0.2, seed=3):
    """A mask of about this share of every parameter of `model`, and of no entry of block 2's last norm."""
    generator = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(p.shape, generator=generator) < share for n, p in model.named_parameters()}
    masks[f"{STACK}2.post_attention_layernorm.weight"].zero_()
    return masks


@pytest.fixture
def mask(tmp_path):
    path = tmp_path / "mask.safetensors"
    save_file(draw(build()), path)
    return path


def masked(mask, layer=2, dtype=torch.float32, **config):
    return get_peft_model(build(dtype=dtype), SingleLayerConfig(layer=layer, mask=str(mask), **config))


def changed(model, dtype=torch.float32):
    """By the base's names, which entries of a merged copy of `model` differ from the base's."""
    after = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    return {name: after[name] != before for name, before in build(dtype=dtype).named_parameters()}


def allowed(masks, *blocks):
    """The mask within these blocks."""
    prefixes = tuple(f"{STACK}{block}." for block in blocks)
    return {n: m if n.startswith(prefixes) else torch.zeros_like(m) for n, m in masks.items()}


def steps(model, make, clip=None, count=3):
    model.train()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for step in range(count):
        tokens = token_batch(seed=step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.3, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.more)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_other_entry_changes(mask, optimizer, dtype):
    model = masked(mask, [1, 2], dtype)
    assert {p.dtype for p in masters(model).values()} == {torch.float32}
    steps(model, OPTIMIZERS[optimizer], clip=0.1)
    masks = allowed(load_file(mask), 1, 2)
    for name, entries in changed(model, dtype).items():
        assert not (entries & ~masks[name]).any(), name
    moved = sum(int(entries.sum()) for entries in changed(model, dtype).values())
    assert moved > 0.9 * sum(int(m.sum()) for m in masks.values())


def test_base_dtype_masters_change_no_other_entry(mask):
    model = masked(mask, [1, 2], torch.bfloat16, master_dtype="base")
    assert {p.dtype for p in masters(model).values()} == {torch.bfloat16}
    steps(model, OPTIMIZERS["sgd"])
    masks = allowed(load_file(mask), 1, 2)
    assert all(not (entries & ~masks[name]).any() for name, entries in changed(model, torch.bfloat16).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_are_those_of_the_whole_block_at_its_entries(mask, dtype, reentrant):
    tokens, grads = token_batch(), []
    for model in (masked(mask, 2, dtype), get_peft_model(build(dtype=dtype), SingleLayerConfig(layer=2))):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in masters(model).items()})
    masks = load_file(mask)
    assert f"{STACK}2.post_attention_layernorm.weight" not in grads[0] and len(grads[0]) > 8
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name][masks[name]]), name


def test_the_norm_that_clips_is_of_the_trained_entries(mask):
    model = masked(mask, 2)
    model.train()
    model(input_ids=token_batch(), labels=token_batch()).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, 1e9)
    assert torch.allclose(norm, torch.cat([p.grad for p in trained]).norm())
    assert sum(p.numel() for p in trained) == sum(int(m.sum()) for m in allowed(load_file(mask), 2).values())


def test_all_blocks(mask):
    model = masked(mask, "all")
    assert model.peft_config["default"].layer_indices == [0, 1, 2, 3]
    train(model)
    masks = allowed(load_file(mask), 0, 1, 2, 3)
    found = changed(model)
    assert all(not (entries & ~masks[name]).any() for name, entries in found.items())
    assert all(found[f"{STACK}{k}.mlp.up_proj.weight"].any() for k in range(4))


def test_a_full_mask_trains_as_the_block_does(tmp_path):
    save_file(
        {n: torch.ones_like(p, dtype=torch.bool) for n, p in build().named_parameters()}, tmp_path / "all.safetensors"
    )
    model, block = masked(tmp_path / "all.safetensors"), get_peft_model(build(), SingleLayerConfig(layer=2))
    for each in (model, block):
        train(each)
    assert same({n: p.flatten() for n, p in masters(block).items()}, masters(model))
    assert torch.equal(logits(model.eval()), logits(block.eval()))


@pytest.mark.parametrize(
    ("low", "dtype"),
    [
        pytest.param(False, torch.float32, marks=pytest.mark.more),
        (False, torch.bfloat16),
        (True, torch.float32),
        pytest.param(True, torch.bfloat16, marks=pytest.mark.more),
    ],
)
def test_an_adapter_needs_no_mask_file(mask, tmp_path, dtype, low):
    model = masked(mask, [1, 2], dtype)
    train(model)
    model.save_pretrained(tmp_path / "run")
    masks = load_file(mask)
    mask.unlink()
    said = (tmp_path / "run" / "adapter_config.json").read_text()
    assert str(tmp_path) not in said and json.loads(said)["mask"].keys() == {"trained", "entries", "sha256"}
    again = PeftModel.from_pretrained(
        build(dtype=dtype), str(tmp_path / "run"), is_trainable=True, low_cpu_mem_usage=low
    )
    assert same(masters(again), masters(model))
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    again.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "run" / "adapter_model.safetensors"
    ).read_bytes()
    for each in (model, again):
        train(each)
    assert same(masters(again), masters(model))
    kept = allowed(masks, 1, 2)
    assert all(not (entries & ~kept[name]).any() for name, entries in changed(again, dtype).items())


def test_a_second_adapter_has_the_mask_of_the_first(mask):
    model = masked(mask, 2)
    model.add_adapter("ref", model.peft_config["default"])  # as TRL makes its reference
    move(model)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    moved = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_switching_off_are_exact(mask, dtype):
    model, base = masked(mask, 2, dtype), logits(build(dtype=dtype))
    assert torch.equal(logits(model), base)
    move(model)
    moved = logits(model)
    assert not torch.equal(moved, base)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), moved)
    model.unmerge_adapter()
    assert torch.equal(logits(model), moved)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(copy.deepcopy(model)), moved)


def test_adapters_with_and_without_a_mask_are_summed(mask):
    model = masked(mask, 2)
    move(model)
    model.add_adapter("b", SingleLayerConfig(layer=2))
    move(model, "b", seed=5)
    base = dict(build().named_parameters())
    masks = load_file(mask)
    model.base_model.set_adapter(["default", "b"])
    layer = next(m for m in tuner_layers(model) if "up_proj" in repr(m) or m.base_layer.weight.shape == (48, 32))
    name = f"{STACK}2.mlp.gate_proj.weight"
    own, other = masters(model)[name], masters(model, "b")[name]
    whole = base[name].masked_scatter(masks[name], own)
    assert torch.equal(layer.weight.detach(), (base[name] + ((whole - base[name]) + (other - base[name]))).detach())
    model.base_model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "both")
    expected = base[name].double() + (whole - base[name].double()) + 0.5 * (other.double() - base[name].double())
    assert torch.equal(masters(model, "both")[name], expected.float().detach())


def test_merged_files_and_the_sparse_encoding_hold_the_trained_entries(mask, tmp_path):
    build().save_pretrained(tmp_path / "base")
    model = masked(mask, 2)
    train(model)
    moved = logits(model.eval())
    model.save_pretrained(tmp_path / "run")
    from peft_onelayer import merge_into_checkpoint

    merge_into_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "merged")
    import transformers

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(merged), moved)
    encoding = write_sparse(tmp_path / "run", tmp_path / "sparse", tmp_path / "base")
    masks = load_file(mask)
    assert all(record.changed <= int(masks[name].sum()) for name, record in encoding.tensors.items())
    sparse = PeftModel.from_pretrained(build(), str(tmp_path / "sparse"))
    assert torch.equal(logits(sparse), moved)
    export_adapter(tmp_path / "run", tmp_path / "peft", "peft", base=tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(build(), str(tmp_path / "peft"))), moved)


def test_training_a_sparse_adapter_further_takes_the_mask_again(mask, tmp_path):
    build().save_pretrained(tmp_path / "base")
    model = masked(mask, 2)
    train(model)
    model.save_pretrained(tmp_path / "run")
    write_sparse(tmp_path / "run", tmp_path / "sparse", tmp_path / "base")
    with pytest.raises(ValueError, match="trained under a mask, which its file does not hold"):
        PeftModel.from_pretrained(build(), str(tmp_path / "sparse"), is_trainable=True)
    config = SingleLayerConfig.from_pretrained(str(tmp_path / "sparse"))
    config.mask, config.inference_mode = str(mask), False
    again = PeftModel.from_pretrained(build(), str(tmp_path / "sparse"), config=config, is_trainable=True)
    assert same(masters(again), masters(model))


def test_another_mask_for_the_same_adapter_is_refused(mask, tmp_path):
    model = masked(mask, 2)
    move(model)
    model.save_pretrained(tmp_path / "run")
    save_file(draw(build(), seed=9), tmp_path / "other.safetensors")
    other = masked(tmp_path / "other.safetensors", 2)
    with pytest.raises(ValueError, match="another mask was given"):
        other.load_adapter(str(tmp_path / "run"), "default")


def test_damage_is_found(mask, tmp_path):
    model = masked(mask, 2)
    move(model)
    model.save_pretrained(tmp_path / "run")
    weights = tmp_path / "run" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(k for k in tensors if k.endswith("up_proj.single_layer_params.weight"))
    for change, match in (
        ({key: tensors[key] + 1.0}, "beside its mask"),
        ({f"{key}_mask": ~tensors[f"{key}_mask"]}, "it is damaged"),
        ({f"{key}_mask": tensors[f"{key}_mask"][:-1].clone()}, "no bits of a mask"),
    ):
        save_file(tensors | change, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=match):
            PeftModel.from_pretrained(build(), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="is no mask that"):
        open_adapter(tmp_path / "run")


def test_writing_to_a_weight_reaches_the_trained_entries_alone(mask):
    model = masked(mask, 2)
    layer = next(m for m in tuner_layers(model) if tuple(m.base_layer.weight.shape) == (48, 32))
    entries = load_file(mask)[f"{STACK}2.mlp.gate_proj.weight"]
    with torch.no_grad():
        layer.weight[entries] = 0.5
    assert torch.equal(masters(model)[f"{STACK}2.mlp.gate_proj.weight"], torch.full((int(entries.sum()),), 0.5))
    with pytest.raises(ValueError, match="stay as they are in the base"), torch.no_grad():
        layer.weight.fill_(1.0)


def test_movement_counts_the_whole_tensors(mask):
    model = masked(mask, 2)
    train(model)
    movement = movement_of_model(model)
    found = changed(model)
    assert {t.name: t.changed for t in movement.tensors} == {t.name: int(found[t.name].sum()) for t in movement.tensors}
    assert all(t.entries == found[t.name].numel() for t in movement.tensors)


def refused(tmp_path, tensors, match, layer=2, **config):
    save_file(tensors, tmp_path / "bad.safetensors")
    base = build()
    with pytest.raises(ValueError, match=match) as error:
        get_peft_model(base, SingleLayerConfig(layer=layer, mask=str(tmp_path / "bad.safetensors"), **config))
    assert "\n" not in str(error.value)
    assert not tuner_layers(base)


@pytest.mark.parametrize("kind", ["name", "shape", "dtype", "false", "empty", "elsewhere", "part"])
def test_a_mask_that_cannot_be_is_refused_in_one_line(tmp_path, kind):
    masks = draw(build())
    up = f"{STACK}2.mlp.up_proj.weight"
    if kind == "name":
        refused(tmp_path, {f"{up}x": masks[up]}, "no parameter of the base")
    elif kind == "shape":
        refused(tmp_path, {up: masks[up].T.contiguous()}, r"has shape \[32, 48\], and the base's tensor \[48, 32\]")
    elif kind == "dtype":
        refused(tmp_path, {up: masks[up].to(torch.uint8)}, "expected torch.bool")
    elif kind == "false":
        refused(tmp_path, {up: torch.zeros_like(masks[up])}, "no True entry: nothing would train")
    elif kind == "empty":
        refused(tmp_path, {}, "no True entry")
    elif kind == "elsewhere":
        refused(tmp_path, {up: masks[up]}, "no True entry in block 1", layer=1)
    else:
        refused(tmp_path, {up: masks[up]}, "or the chosen parts of it", target_modules=["self_attn"])


@pytest.mark.parametrize("content", [None, b"no mask"])
def test_a_file_that_is_no_mask_is_refused_at_once(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^mask='.*(no such file|no readable safetensors file)"):
        SingleLayerConfig(layer=2, mask=str(path))


def test_a_stranger_names_no_file(tmp_path, mask):
    model = masked(mask, 2)
    model.save_pretrained(tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask": str(mask)}))
    with pytest.raises(ValueError, match="names a file as its mask"):
        SingleLayerConfig.from_pretrained(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="mask"):
        open_adapter(tmp_path / "run")


def test_a_base_of_which_a_process_has_a_part_is_refused(mask):
    model = masked(mask, 2)
    layer = tuner_layers(model)[0]
    part = torch.empty(0)
    part.ds_status = "NOT_AVAILABLE"  # DeepSpeed's mark
    with pytest.raises(RuntimeError, match="use ZeRO-2 or DDP"):
        layer.whole("default", "weight", part)
