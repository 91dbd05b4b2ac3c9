"""A merge of files gives what merge_and_unload gives, all of it or nothing, and refuses what it cannot merge."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import models
from peft_onelayer import SingleLayerConfig, merge_into_checkpoint
from peft_onelayer.adapter import merge as merge_module
from peft_onelayer.adapter.checkpoint import Checkpoint
from peft_onelayer.adapter.reader import AdapterFile
from peft_onelayer.adapter.write_sparse import write_sparse
from peft_onelayer.records.locate import hub_identity

CASES = [(family, torch.bfloat16) for family in models.FAMILIES]
CASES += [("Qwen3", torch.float16), ("Qwen2", torch.float32), ("Gemma3Text", torch.float16)]
SHARD = "model-{:05d}-of-{:05d}.safetensors"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def save_adapter(folder, base, layer, seed=0, share=1.0, **config):
    """Save an adapter of the checkpoint `base`, a share of whose entries is moved."""
    model = get_peft_model(load(base), SingleLayerConfig(layer=layer, task_type="CAUSAL_LM", **config))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter) * (torch.rand_like(parameter) <= share)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base, *adapters):
    model = PeftModel.from_pretrained(load(base), adapters[0], adapter_name="0")
    for i, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, str(i))
    return model.merge_and_unload(adapter_names=[str(i) for i in range(len(adapters))])


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def contents(folder):  # without the card, which names the adapters
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "README.md"
    }


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A sharded bfloat16 base with files beside the weights, and adapters of two layers."""
    root = tmp_path_factory.mktemp("sharded")
    models.build(dtype=torch.bfloat16).save_pretrained(root / "base", max_shard_size="12KB")
    (root / "base" / "tokenizer.json").write_text("{}")
    (root / "base" / "extra").mkdir()
    (root / "base" / "extra" / "notes.txt").write_text("notes")
    save_adapter(root / "one", root / "base", 1)
    save_adapter(root / "three", root / "base", 3, seed=1, share=0.1)
    return root


@pytest.mark.parametrize(
    ("family", "dtype", "shard"),
    [
        pytest.param(*case, shard, marks=[pytest.mark.more] if shard == "1GB" and case != CASES[0] else [])
        for case in CASES
        for shard in ("12KB", "1GB")
    ],
    ids=str,
)
def test_it_equals_merge_and_unload(tmp_path, family, dtype, shard):
    base = tmp_path / "base"
    tied = family in ("Qwen2", "Gemma3Text")
    models.build(family, dtype=dtype, tie_word_embeddings=tied).save_pretrained(base, max_shard_size=shard)
    before = contents(base)
    adapter = save_adapter(tmp_path / "adapter", base, "mid-2")
    merged = merge_into_checkpoint(base, adapter, tmp_path / "out")
    assert same(load(tmp_path / "out"), merged_by_peft(base, adapter))
    assert not same(load(tmp_path / "out"), load(base))
    assert contents(base) == before
    assert contents(tmp_path / "out").keys() == before.keys()
    changed = {name for name, data in contents(tmp_path / "out").items() if data != before[name]}
    assert changed == set(merged.rewritten)
    card = (tmp_path / "out" / "README.md").stat().st_size
    assert merged.layers == [1, 2] and merged.bytes == sum(map(len, before.values())) + card
    assert shard == "1GB" or len(merged.rewritten) < len(Checkpoint(base).shards)


def test_several_adapters_and_sparse_ones(sharded, tmp_path):
    base, adapters = sharded / "base", [sharded / "one", sharded / "three"]
    write_sparse(sharded / "three", tmp_path / "sparse", base)
    want = merged_by_peft(base, *adapters)
    merge_into_checkpoint(base, adapters, tmp_path / "both")
    assert same(load(tmp_path / "both"), want)
    merge_into_checkpoint(base, [adapters[0], tmp_path / "sparse"], tmp_path / "with_sparse")
    assert contents(tmp_path / "with_sparse") == contents(tmp_path / "both")
    # and one after the other
    merge_into_checkpoint(base, adapters[0], tmp_path / "first")
    with pytest.raises(ValueError, match=r"is not the base .* if block 1 was trained before, give that adapter too"):
        merge_into_checkpoint(tmp_path / "first", adapters[1], tmp_path / "second")
    merge_into_checkpoint(tmp_path / "first", adapters[1], tmp_path / "second", allow_other_base=True)
    assert contents(tmp_path / "second") == contents(tmp_path / "both")
    with pytest.raises(ValueError, match=r"both train model\.layers\.1\."):
        merge_into_checkpoint(base, [adapters[0], adapters[0]], tmp_path / "out")


def test_part_of_a_block_and_a_composite_module(tmp_path):
    models.build(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    part = save_adapter(tmp_path / "part", tmp_path / "base", 1, target_modules=["mlp"])
    merged = merge_into_checkpoint(tmp_path / "base", part, tmp_path / "out")
    assert len(merged.tensors) == 3
    assert same(load(tmp_path / "out"), merged_by_peft(tmp_path / "base", part))
    models.build_architecture("qwen3_5_text", dtype=torch.bfloat16).save_pretrained(tmp_path / "hybrid")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "hybrid", 2)
    merge_into_checkpoint(tmp_path / "hybrid", adapter, tmp_path / "merged")
    assert same(load(tmp_path / "merged"), merged_by_peft(tmp_path / "hybrid", adapter))


def test_a_sparse_adapter_trained_in_another_dtype_than_the_files(tmp_path):
    models.build(dtype=torch.float32).save_pretrained(tmp_path / "base")
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base", 1)
    write_sparse(adapter, tmp_path / "sparse", narrow)
    merge_into_checkpoint(tmp_path / "base", tmp_path / "sparse", tmp_path / "out")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert same(got, PeftModel.from_pretrained(narrow, adapter).merge_and_unload())


def test_names_that_transformers_changes_on_loading(tmp_path):
    # a checkpoint of the bare decoder, without the prefix "model."
    models.build(dtype=torch.bfloat16, tie_word_embeddings=True).model.save_pretrained(tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    assert "layers.1.mlp.up_proj.weight" in Checkpoint(tmp_path / "bare").places
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "bare", 1)
    merge_into_checkpoint(tmp_path / "bare", adapter, tmp_path / "out")
    assert same(load(tmp_path / "out"), merged_by_peft(tmp_path / "bare", adapter))


def test_weights_that_are_stored_in_another_form_are_refused(tmp_path):
    models.build_architecture("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")  # fused on loading
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base", 1)
    with pytest.raises(ValueError, match=r"as one tensor.*merge_and_unload and save_pretrained"):
        merge_into_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    attention = save_adapter(tmp_path / "attention", tmp_path / "base", 1, target_modules=["self_attn"])
    merge_into_checkpoint(tmp_path / "base", attention, tmp_path / "out")
    assert same(load(tmp_path / "out"), merged_by_peft(tmp_path / "base", attention))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pickle(base):
    (base / "model.safetensors.index.json").rename(base / "pytorch_model.bin.index.json")
    for i in range(1, 8):
        (base / SHARD.format(i, 7)).rename(base / f"pytorch_model-{i:05d}-of-00007.bin")


def refused(base, adapter, tmp_path, message, **options):
    with pytest.raises(ValueError, match=message) as error:
        merge_into_checkpoint(base, adapter, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda base: (base / SHARD.format(2, 7)).unlink(), "is incomplete: model-00002"),
        (lambda base: os.truncate(base / SHARD.format(2, 7), 3000), "is damaged, incomplete or no safe"),
        (lambda base: (base / SHARD.format(2, 7)).write_bytes(b"\xff" * 64), "is damaged, incomplete or no safe"),
        (lambda base: edit(base / "config.json", quantization_config={"quant_method": "fp8"}), "is quantized"),
        (lambda base: (base / "config.json").write_text("{"), "is not JSON"),
        (lambda base: (base / "config.json").unlink(), "holds no readable config.json"),
        (lambda base: (base / "adapter_config.json").write_text("{}"), "is an adapter and not a base"),
        (lambda base: edit(base / "model.safetensors.index.json", weight_map={"w": "../x"}), "has no weight_map"),
        (lambda base: (base / "model.safetensors.index.json").unlink(), "holds neither model.safetensors nor"),
        (pickle, "pickled weights, which are not opened here"),
    ],
)
def test_a_base_that_cannot_be_merged_into(sharded, tmp_path, break_it, message):
    shutil.copytree(sharded / "base", tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 7
    break_it(tmp_path / "base")
    refused(tmp_path / "base", sharded / "one", tmp_path, message)


def test_an_index_that_promises_too_much(sharded, tmp_path):
    shutil.copytree(sharded / "base", tmp_path / "base")
    index = tmp_path / "base" / "model.safetensors.index.json"
    edit(index, weight_map={**json.loads(index.read_text())["weight_map"], "ghost": SHARD.format(1, 7)})
    refused(tmp_path / "base", sharded / "one", tmp_path, "lacks ghost")


def test_an_adapter_of_another_model(sharded, tmp_path):
    models.build(num_layers=6, dtype=torch.bfloat16).save_pretrained(tmp_path / "deep")
    models.build(dtype=torch.bfloat16, intermediate_size=64).save_pretrained(tmp_path / "wide")
    models.build("Qwen2", dtype=torch.bfloat16).save_pretrained(tmp_path / "qwen2")
    refused(tmp_path / "deep", sharded / "one", tmp_path, "made for a model of 4 blocks and .* has 6")
    refused(tmp_path / "wide", sharded / "one", tmp_path, "shape", allow_other_base=True)
    refused(tmp_path / "qwen2", sharded / "one", tmp_path, r"holds no model\.layers\.1\.self_attn\.k_norm")
    head = save_adapter(tmp_path / "head", sharded / "base", 1, modules_to_save=["lm_head"])
    refused(sharded / "base", head, tmp_path, r"lm_head\.weight.*modules_to_save")


def test_an_adapter_trained_on_another_base_of_the_same_shapes(sharded, tmp_path):
    models.build(dtype=torch.bfloat16, seed=1).save_pretrained(tmp_path / "other")
    write_sparse(sharded / "one", tmp_path / "sparse", sharded / "base")
    for adapter in (sharded / "one", tmp_path / "sparse"):
        refused(tmp_path / "other", adapter, tmp_path, "trained on")
        out = tmp_path / f"{adapter.name}-anyway"
        merge_into_checkpoint(tmp_path / "other", adapter, out, allow_other_base=True)
        assert not same(load(out), load(tmp_path / "other"))
    shutil.copytree(sharded / "base", tmp_path / "copy")
    merge_into_checkpoint(tmp_path / "copy", sharded / "one", tmp_path / "copied")


def test_a_hub_base_is_told_by_its_name_and_commit(sharded, tmp_path):
    snapshot = tmp_path / "models--org--base" / "snapshots" / "c0ffee"
    shutil.copytree(sharded / "base", snapshot)
    assert hub_identity(snapshot) == ("org/base", "c0ffee")
    adapter = tmp_path / "adapter"
    for name, revision, message in (
        ("org/base", "c0ffee", None),
        ("org/base", None, None),
        ("org/base", "decaf", "org/base at commit decaf, and .* is at c0ffee"),
        ("org/else", None, "org/else, and .* is org/base"),
    ):
        shutil.copytree(sharded / "one", adapter)
        edit(adapter / "adapter_config.json", base_model_name_or_path=name, revision=revision)
        if message:
            refused(snapshot, adapter, tmp_path, message)
        else:
            merge_into_checkpoint(snapshot, adapter, tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        shutil.rmtree(adapter)
    trace = sharded.parent / "local" / ".cache" / "huggingface" / "download" / "config.json.metadata"
    trace.parent.mkdir(parents=True)
    trace.write_text("decaf\netag\n1.0\n")
    assert hub_identity(sharded.parent / "local") == (None, "decaf")


def test_an_output_folder_that_may_not_be_one(sharded, tmp_path):
    before = contents(sharded)
    for out in (sharded / "base" / "out", sharded / "one" / "out", sharded / "base" / "extra" / "out"):
        with pytest.raises(ValueError, match="is inside"):
            merge_into_checkpoint(sharded / "base", sharded / "one", out)
    (tmp_path / "link").symlink_to(sharded / "base")
    for out in (sharded / "base", sharded / "one", tmp_path / "link"):
        with pytest.raises(ValueError, match="exists and holds other files"):
            merge_into_checkpoint(sharded / "base", sharded / "one", out)
    with pytest.raises(ValueError, match="is inside"):
        merge_into_checkpoint(sharded / "base", sharded / "one", tmp_path / "link" / "out")
    assert contents(sharded) == before


def test_a_damaged_adapter(sharded, tmp_path):
    shutil.copytree(sharded / "one", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "nan" / "adapter_model.safetensors")
    refused(sharded / "base", tmp_path / "nan", tmp_path, "holds NaN or Inf")
    models.build(dtype=torch.float16).save_pretrained(tmp_path / "half")
    large = save_adapter(tmp_path / "large", tmp_path / "half", 1)
    tensors = load_file(large / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = 1e6  # finite in float32 and not in float16
    save_file(tensors, large / "adapter_model.safetensors")
    refused(tmp_path / "half", large, tmp_path, "holds NaN or Inf")


def test_the_bases_weights_in_other_formats_are_left_out(sharded, tmp_path):
    shutil.copytree(sharded / "base", tmp_path / "base")
    stale = ["consolidated.safetensors", "original/model.pth", "pytorch_model.bin", "q4.gguf"]
    kept = [".gitattributes", "2_Dense/model.safetensors"]
    for name in [*stale, *kept, ".git/config", ".cache/x", ".eval_results/gsm8k.yaml"]:
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text(name)
    merged = merge_into_checkpoint(tmp_path / "base", sharded / "one", tmp_path / "out")
    assert merged.left_out == stale
    assert contents(tmp_path / "out").keys() == contents(sharded / "base").keys() | set(kept)


def test_the_merged_folder_has_a_card_of_its_own(sharded, tmp_path):
    shutil.copytree(sharded / "base", tmp_path / "base")
    card = "---\nlicense: mit\nlanguage: [en]\nmodel-index: []\n---\n# The base\n\n| GSM8K | 50 |\n"
    (tmp_path / "base" / "README.md").write_text(card)
    merge_into_checkpoint(tmp_path / "base", sharded / "one", tmp_path / "out")
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert found.data.to_dict() == {"license": "mit", "language": ["en"], "tags": ["onelayer", "merged"]}
    assert "# base with block 1 trained" in found.text and "`one` merged into it" in found.text
    assert "GSM8K" not in found.text and str(tmp_path) not in found.content


def test_links_of_the_hubs_cache_become_files(sharded, tmp_path):
    base = tmp_path / "snapshot"
    base.mkdir()
    for path in (sharded / "base").iterdir():
        (base / path.name).symlink_to(path)
    merge_into_checkpoint(base, sharded / "one", tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    before = contents(sharded / "base")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.stat().st_nlink == 1
        path.write_bytes(b"")
    assert contents(sharded / "base") == before


def test_a_file_system_that_can_clone(sharded, tmp_path, monkeypatch):
    import fcntl

    def ioctl(new, request, old):
        assert request == merge_module.FICLONE
        os.write(new.fileno(), os.pread(old, os.fstat(old).st_size, 0))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert merge_into_checkpoint(sharded / "base", sharded / "one", tmp_path / "out").reflinked
    assert same(load(tmp_path / "out"), merged_by_peft(sharded / "base", sharded / "one"))


def test_a_full_disk(sharded, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(merge_module.shutil, "disk_usage", lambda folder: usage(10, 9, 1))
        patch.setattr(merge_module, "_clone", lambda source, target: False)
        with pytest.raises(OSError, match="GB free and the merged model takes"):
            merge_into_checkpoint(sharded / "base", sharded / "one", tmp_path / "out")
    real = shutil.copyfile

    def copyfile(source, target):
        if Path(source).name == SHARD.format(7, 7):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(merge_module.shutil, "copyfile", copyfile)
    with pytest.raises(OSError, match="No space left"):
        merge_into_checkpoint(sharded / "base", sharded / "one", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time(sharded, tmp_path, monkeypatch):
    decode, alive = AdapterFile.tensor, []

    def counted(self, name, base, allow_other_base):
        alive[:] = [ref for ref in alive if ref() is not None]
        assert len(alive) <= 1  # the one before may live until its name is bound again
        tensor = decode(self, name, base, allow_other_base)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(AdapterFile, "tensor", counted)
    merge_into_checkpoint(sharded / "base", sharded / "one", tmp_path / "out")
    assert alive


@pytest.mark.more
def test_killed_at_any_moment(sharded, tmp_path):
    """SIGKILL before the nth opening or renaming of a file; forks of one process, so that imports are paid once."""
    out, survived = tmp_path / "out", 0
    Checkpoint(sharded / "base").stored_as  # imports the model's code  # noqa: B018
    expected = tmp_path / "expected"
    merge_into_checkpoint(sharded / "base", sharded / "one", expected)
    armed = False
    left = 0

    def hook(event, args):
        nonlocal left
        if armed and event in ("open", "os.rename", "os.chmod", "os.mkdir", "fcntl.ioctl"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    for moment in range(1, 200, 3):
        pid = os.fork()
        if pid == 0:
            left, armed = moment, True
            sys.addaudithook(hook)
            merge_into_checkpoint(sharded / "base", sharded / "one", out)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        if os.WIFSIGNALED(status):
            assert not out.exists() or contents(out) == contents(expected)
            survived += out.exists()
            for partial in tmp_path.glob(".out.partial-*"):
                # until its last file is there, what is left in the hidden folder does not even look like a model
                assert not (partial / "config.json").exists() or contents(partial).keys() >= contents(expected).keys()
                shutil.rmtree(partial)
            shutil.rmtree(out, ignore_errors=True)
        else:
            break
    else:
        pytest.fail("never came to an end")
    assert moment > 30  # kills were spread over the whole merge
    assert contents(out) == contents(expected)


@pytest.mark.more
def test_terminated_in_the_middle(sharded, tmp_path):
    """The command removes what it has written when it is asked to end."""
    slow = """
import sys, time
from peft_onelayer.adapter import merge
real = merge._replace
def replace(*args):
    print("now", flush=True)
    time.sleep(60)
merge._replace = replace
from onelayer_cli.main import main
main()
"""
    running = subprocess.Popen(
        [sys.executable, "-c", slow, "merge", str(sharded / "base"), str(sharded / "one"), "out"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stdout.readline() == "now\n"
        time.sleep(0.2)
        assert len(list(tmp_path.iterdir())) == 2  # the hidden folder and the lock
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, monkeypatch):
    """SIGKILL of a process that merges a gigabyte, at moments drawn from all of its life."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmarks")
    import merge_checkpoint

    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    layers = merge_checkpoint.write_checkpoint(base, gigabytes=1, shards=8)
    merge_checkpoint.write_adapter(adapter, base, layers)
    merge_into_checkpoint(base, adapter, out)

    def digests(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}

    expected = digests(out)
    assert expected.keys() == {path.name for path in base.iterdir()} | {"README.md"}
    shutil.rmtree(out)
    start = time.perf_counter()
    merge_into_checkpoint(base, adapter, out)  # now that all is imported
    duration = time.perf_counter() - start
    shutil.rmtree(out)
    draw, unfinished = random.Random(0), 0
    for _ in range(20):
        pid = os.fork()  # imports are paid once
        if pid == 0:
            try:
                merge_into_checkpoint(base, adapter, out)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if out.exists():
            assert digests(out) == expected
            shutil.rmtree(out)
        for partial in tmp_path.glob(".out.partial-*"):
            names = {path.name for path in partial.iterdir()}
            assert "config.json" not in names or names == expected.keys()
            unfinished += names < expected.keys()
            shutil.rmtree(partial)
    assert unfinished  # some of the kills came in the middle
