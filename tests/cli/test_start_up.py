"""What only reads files, and what is wrong, needs neither torch's nor peft's import, which take seconds."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from worker import HEAVY, Worker

import models
from peft_onelayer import SingleLayerConfig, export_adapter, inspect_adapter


@pytest.fixture(scope="module")
def onelayer():
    worker = Worker(blocked=HEAVY)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, a dense and a sparse adapter of it, and damaged ones of either kind."""
    root = tmp_path_factory.mktemp("files")
    models.build(dtype=torch.bfloat16).save_pretrained(root / "base")
    base = models.build(dtype=torch.bfloat16)
    base.name_or_path = base.config._name_or_path = str(root / "base")
    model = get_peft_model(base, SingleLayerConfig(layer=1))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.1)
    model.save_pretrained(root / "dense")
    export_adapter(root / "dense", root / "sparse", "sparse")
    for name in ("dense", "sparse"):
        shutil.copytree(root / name, root / f"cut-{name}")
        weights = root / f"cut-{name}" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5])
    return root


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["inspect", "--help"], ["train", "--help"]])
def test_help_and_version(onelayer, arguments):
    answer = onelayer(*arguments)
    assert (answer.code, answer.err) == (0, []) and answer.out.startswith(("Usage: onelayer", "onelayer "))


@pytest.mark.parametrize("adapter", ["dense", "sparse"])
def test_inspect_says_all_that_it_says_with_torch(onelayer, files, adapter):
    answer = onelayer("inspect", files / adapter, "--json")
    assert (answer.code, answer.err) == (0, [])
    assert json.loads(answer.out) == json.loads(json.dumps(inspect_adapter(files / adapter).to_json()))
    answer = onelayer("inspect", files / adapter)
    assert (answer.code, answer.err) == (0, []) and "block 1 of 4" in answer.out


LORA = ["--format", "lora"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-command"], 2, "No such command"),
        (["inspect"], 2, "Missing argument"),
        (["inspect", "{root}/cut-dense"], 1, "damaged"),
        (["inspect", "{root}/cut-sparse"], 1, "damaged"),
        (["inspect", "{root}/base"], 1, "adapter_config.json"),
        (["inspect", "./nowhere"], 1, "no adapter folder at nowhere"),
        (["inspect", "{root}/dense", "--base", "./nowhere"], 1, "no model folder at nowhere"),
        (["inspect", "{root}/dense", "--base", "{root}/sparse"], 1, "is an adapter and not a base model"),
        (["inspect", "{root}/dense", "--revision", "v1"], 1, "--revision v1 is for a repository on the Hub, and"),
        (["merge", "{root}/base", "{root}/dense"], 2, "Missing argument"),
        (["merge", "{root}/base", "{root}/dense", "{root}/out", "--revision", "v1"], 1, "base is a folder here; leave"),
        (["merge", "{root}/base", "{root}/dense", "{root}"], 1, "exists and holds other files"),
        (["merge", "{root}/base", "{root}/dense", "{root}/base/out"], 1, "is inside"),
        (["merge", "{root}/base", "{root}/cut-sparse", "{root}/out"], 1, "damaged"),
        (["merge", "{root}/dense", "{root}/dense", "{root}/out"], 1, "is an adapter and not a base model"),
        (["merge", "./nowhere", "{root}/dense", "{root}/out"], 1, "no model folder at nowhere"),
        (["analyze", "{root}/base"], 2, "Missing argument"),
        (["analyze", "./nowhere", "{root}/base"], 1, "no model folder at nowhere"),
        (["analyze", "{root}/base", "{root}/cut-sparse"], 1, "damaged"),
        (["analyze", "{root}/dense", "{root}/base"], 1, "is an adapter and not a base model"),
        (["analyze", "{root}/base", "{root}/dense", "--plot", "change.txt"], 1, "is no image"),
        (["analyze", "{root}/base", "{root}/dense", "--revision", "v1"], 1, "base is a folder here; leave it out"),
        (["compare", "{root}/dense", "{root}/sparse", "--revision", "v1"], 1, "base is a folder here; leave it out"),
        (["export", "{root}/dense", "{root}/out"], 2, "Missing option"),
        (["export", "{root}/dense", "{root}/out", "--format", "zip"], 2, "'zip' is not one of"),
        (["export", "{root}/dense", "{root}/out", "--format", "peft", "--rank", "2"], 1, "those of the format lora"),
        (["export", "{root}/dense", "{root}/out", *LORA, "--rank", "2", "--energy", ".5"], 1, "exclude each other"),
        (["export", "{root}/dense", "{root}/out", *LORA, "--energy", "0"], 1, "energy=0.0 is no share"),
        (["export", "{root}/dense", "{root}", "--format", "peft"], 1, "exists and holds other files"),
        (["export", "{root}/cut-dense", "{root}/out", "--format", "peft"], 1, "damaged"),
        (["export", "{root}/cut-sparse", "{root}/out", "--format", "dense"], 1, "damaged"),
        (["export", "{root}/base", "{root}/out", "--format", "peft"], 1, "adapter_config.json"),
        (["export", "./nowhere", "{root}/out", "--format", "flat"], 1, "no adapter folder at nowhere"),
        (["export", "{root}/dense", "{root}/out", *LORA, "--base", "./nowhere"], 1, "no model folder at nowhere"),
        (["export", "{root}/dense", "{root}/out", *LORA, "--base", "{root}/sparse"], 1, "is an adapter and not a base"),
        (["compare", "{root}/dense"], 1, "takes two or more"),
        (["compare", "{root}/dense", "{root}/base"], 1, "give the base"),
        (["push", "{root}/dense"], 2, "Missing argument"),
        (["push", "{root}/dense", "not a name"], 1, "not a name"),
        (["push", "{root}/cut-dense", "me/x"], 1, "damaged"),
        (["push", "{root}/sparse", "me/x", "--dense"], 1, "is sparse already"),
        (["push", "{root}/dense", "me/x", "--eval", "nowhere.json"], 1, "no file nowhere.json"),
        (["push", "{root}/nowhere", "me/x"], 1, "no adapter folder"),
        (["pull", "me/x", "{root}/dense/adapter_model.safetensors"], 1, "is not a folder"),
        (["pull", "me/x", "{root}"], 1, "exists and holds other files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_at_once(onelayer, files, arguments, code, message):
    before = sorted(files.rglob("*"))
    answer = onelayer(*(argument.format(root=files) for argument in arguments))
    assert (answer.code, answer.out, len(answer.err)) == (code, "", 1), answer
    assert answer.err[0].startswith("onelayer") and message in answer.err[0], answer
    assert sorted(files.rglob("*")) == before
