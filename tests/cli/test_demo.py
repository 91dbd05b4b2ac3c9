"""`onelayer demo` from a new user's folder: the whole job, in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

import peft_onelayer  # noqa: F401  registers the method, in whatever process this file runs
from peft_onelayer.runs import demo


def run(folder, *arguments):
    command = [sys.executable, "-m", "onelayer_cli.main", "demo", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(["--layer", "5", "--steps", "50"], marks=pytest.mark.more),
        pytest.param([], marks=pytest.mark.more),
    ],
    ids=["short", "whole"],
)
def default_run(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(folder, *request.param)


def test_the_demo_gains_and_says_so(default_run):
    folder, done = default_run
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "onelayer-demo" / "demo.json").read_text())
    sampled = summary["results"]["sampled"]
    assert sampled["difference"] == pytest.approx(sampled["adapter"] - sampled["base"], abs=1e-12)
    assert sampled["difference"] > 3 * sampled["standard_error"] > 0
    assert f" {', '.join(map(str, summary['layers']))} helped" in done.stdout
    assert summary["reload_bit_equal"] is True
    for word in ("base", "adapter", "difference", "standard error", "trained parameters", "bytes", "time"):
        assert word in done.stdout
    assert [p.name for p in folder.iterdir()] == ["onelayer-demo"]


def test_it_leaves_an_adapter_that_stands_alone(default_run):
    folder, _ = default_run
    out = folder / "onelayer-demo"
    summary = json.loads((out / "demo.json").read_text())
    ranked = summary["why"] != "chosen by the user"
    of_ranking = set() if ranked else {"ranking.png", "layer_profile.json"}
    assert {p.name for p in out.iterdir()} == demo.FILES - of_ranking
    later = {"layer_profile.png", "reward.png"}  # which a card that is written anew brings
    assert {p.name for p in (out / "adapter").iterdir()} == demo.ADAPTER_FILES - of_ranking - later
    (layer,) = summary["layers"]
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == summary["trained_parameters"] == 43168
    assert all(f".layers.{layer}." in name for name in tensors)
    assert summary["adapter_bytes"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size
    if ranked:
        profile = json.loads((out / "adapter" / "layer_profile.json").read_text())
        assert profile["pick"] == layer and profile["num_layers"] == 12
        assert profile["cost"] == summary["probe_cost"]
    for picture in out.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")

    model = AutoPeftModelForCausalLM.from_pretrained(out / "adapter")
    base = dict(model.get_base_model().named_parameters())
    with torch.no_grad():  # it changed every tensor of the block against the embedded base
        for name, tensor in tensors.items():
            path, _, parameter = name.removeprefix("base_model.model.").rpartition(".single_layer_params.")
            assert not torch.equal(base[f"{path}.base_layer.{parameter}"], tensor), name


def test_the_card_states_the_run_and_invents_nothing(default_run):
    folder, _ = default_run
    card = (folder / "onelayer-demo" / "adapter" / "README.md").read_text()
    summary = json.loads((folder / "onelayer-demo" / "demo.json").read_text())
    assert "$" not in card and "None" not in card and "More Information Needed" not in card
    assert summary["verdict"] in card and summary["command"] in card
    assert all(reason in card for reason in summary["why"].split("; "))
    sampled = summary["results"]["sampled"]
    assert f"| {sampled['base']:.4f} ± " in card and f"| {sampled['adapter']:.4f} ± " in card
    assert f"| {sampled['difference']:+.4f} ± {sampled['standard_error']:.4f} |" in card


@pytest.mark.more
def test_our_own_folder_is_replaced_and_no_gain_is_reported_as_none(default_run):
    folder, _ = default_run
    done = run(folder, "--layer", "0", "--steps", "1", "--task", "sort", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert "did not help measurably" in summary["verdict"] or "made the model worse" in summary["verdict"]
    assert summary == json.loads((folder / "onelayer-demo" / "demo.json").read_text())
    assert not (folder / "onelayer-demo" / "ranking.png").exists()
    assert summary["layers"] == [0] and summary["why"] == "chosen by the user"


@pytest.mark.slow
def test_seeds_0_to_9_gain(tmp_path):
    gains = []
    for seed in range(10):
        done = run(tmp_path, "--seed", str(seed), "--json")
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        sampled = summary["results"]["sampled"]
        gains.append(sampled["difference"] > 3 * sampled["standard_error"])
        print(seed, summary["layers"], summary["verdict"], f"{summary['seconds']} s", flush=True)
    assert sum(gains) >= 8, gains
