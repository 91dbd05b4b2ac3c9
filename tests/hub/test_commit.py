"""The commit of a base from the Hub, which the adapter records so that its base is found again after main has moved."""

import pytest
import torch

import models

# A model loaded as LOAD says, wrapped, saved; "main" of org/two has other weights than its tag "v1".
CODE = """
import json, torch
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM, get_peft_model
from peft_onelayer import SingleLayerConfig
from peft_onelayer.runs.describe import describe_model
from peft_onelayer.runs.models import load_causal_lm
revision = {revision!r}
for other in {before!r}:
    AutoModelForCausalLM.from_pretrained("org/two", revision=other)
base = {load}
model = get_peft_model(base, SingleLayerConfig(layer=1))
model.save_pretrained({out!r})
result = [json.load(open({out!r} + "/adapter_config.json"))["revision"], describe_model(base).revision]
"""
PLAIN = "AutoModelForCausalLM.from_pretrained('org/two', revision=revision or 'main'{more})"


@pytest.fixture
def two(hub, tmp_path):
    """The commits of "main" and of the tag "v1" of org/two, and of "card", which has the weights of "main"."""
    repo = hub.add("org/two", {})
    files = {}
    for name, seed in (("v1", 3), ("main", 4)):
        folder = tmp_path / name
        models.build(dtype=torch.bfloat16, seed=seed).save_pretrained(folder)
        files[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.commit(repo, name, files[name], name)
    hub.commit(repo, "card", files["main"] | {"README.md": b"new"}, "card")
    return repo.branches


@pytest.mark.parametrize("revision", [None, "v1"])
@pytest.mark.parametrize("load", ["load_causal_lm('org/two', revision)[0]", PLAIN.format(more="")])
def test_an_adapter_names_the_commit_of_its_base_and_finds_it(two, ask, tmp_path, load, revision):
    code = CODE.format(load=load, revision=revision, before=["v1", "main"], out=str(tmp_path / "adapter"))
    code += f"AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'adapter')!r})  # compares the weights"
    answer = ask(code=code)
    assert answer.code == 0, answer.err
    assert answer.result == [two[revision or "main"]] * 2


def test_our_loaders_know_the_commit_without_its_weights(two, ask):
    code = """
from peft_onelayer.runs.models import load_causal_lm, load_skeleton
result = []
for revision in (None, "v1", "main"):
    result += [load("org/two", revision)[0].config._commit_hash for load in (load_skeleton, load_causal_lm)]
"""
    assert ask(code=code).result == [two["main"]] * 2 + [two["v1"]] * 2 + [two["main"]] * 2


def test_a_model_in_another_dtype_and_with_a_larger_vocabulary(two, ask, tmp_path):
    load = PLAIN.format(more=", dtype=torch.float32") + "\nbase.resize_token_embeddings(80)"
    code = CODE.format(load=load, revision="v1", before=["main"], out=str(tmp_path / "adapter"))
    assert ask(code=code).result == [two["v1"]] * 2


def test_a_commit_that_cannot_be_told_is_not_named(two, ask, tmp_path):
    changed = PLAIN.format(more="") + "\nbase.model.norm.weight.data[0] += 1"
    code = CODE.format(load=changed, revision=None, before=[], out=str(tmp_path / "changed"))
    assert ask(code=code).result == [None] * 2
    elsewhere = PLAIN.format(more=f", cache_dir={str(tmp_path / 'cache')!r}")
    code = CODE.format(load=elsewhere, revision="v1", before=["main"], out=str(tmp_path / "elsewhere"))
    assert ask(code=code).result == [None] * 2


@pytest.mark.parametrize("loaded", ["main", "card"])
def test_commits_of_the_same_weights(two, ask, tmp_path, loaded):
    code = CODE.format(load=PLAIN.format(more=""), revision=loaded, before=["main"], out=str(tmp_path / "adapter"))
    assert ask(code=code).result == [two["main"]] * 2
