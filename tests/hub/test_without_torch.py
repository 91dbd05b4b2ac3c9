"""search, pull and push --dry-run of an adapter whose base is not here run where torch cannot be imported."""

import json

import pytest
import torch
from loopback import TOKEN
from safetensors.torch import load, load_file, save, save_file
from worker import HEAVY, Worker

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def _worker(_server):
    worker = Worker(_server.environment, HEAVY)
    yield worker
    worker.close()


@pytest.fixture
def onelayer(_worker, hub):
    def run(*arguments):
        answer = _worker(*arguments, environment={"HF_TOKEN": TOKEN})
        return answer.code, answer.out, answer.err

    return run


def away(folder):
    """Have the adapter's base be one that is not on this machine."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/elsewhere"}))


def test_push_dry_run(hub, onelayer, ask, adapter):
    away(adapter)
    code, out, err = onelayer("push", adapter, "me/gsm", "--dry-run", "--json")
    assert code == 0 and err[0].startswith("the base org/elsewhere is not on this machine")
    shown = json.loads(out)
    with_torch = json.loads(ask("push", adapter, "me/gsm", "--dry-run", "--json").out)
    plot = "layer_profile.png"
    assert shown["files"].pop(plot) and with_torch["files"].pop(plot)
    assert shown == with_torch and shown["encoding"] == "dense" and hub.requests == []


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_that_is_none_is_found_by_its_bits(onelayer, quick, dtype, number):
    away(quick)
    (quick / "eval.json").unlink()
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(quick / WEIGHTS).items()}
    save_file(tensors, quick / WEIGHTS)
    assert onelayer("push", quick, "me/gsm", "--dry-run")[0] == 0
    tensors[max(tensors)].view(-1)[-1] = number
    save_file(tensors, quick / WEIGHTS)
    code, out, err = onelayer("push", quick, "me/gsm", "--dry-run")
    assert (code, out, len(err)) == (1, "", 1) and "holds NaN or Inf" in err[0], err


@pytest.mark.more
def test_pull_and_search(hub, onelayer, ask, quick, tmp_path):
    assert ask("push", quick, "me/gsm", "--base-model", "org/tiny").code == 0
    code, out, err = onelayer("pull", "me/gsm", tmp_path / "here", "--json")
    assert (code, err) == (0, [])
    pulled = json.loads(out)
    assert (pulled["encoding"], pulled["layers"], pulled["values_checked"]) == ("sparse", [1], False)
    files = hub.files("me/gsm")
    assert (tmp_path / "here" / WEIGHTS).read_bytes() == files[WEIGHTS]
    tensors = load(files[WEIGHTS])
    name = min(n for n in tensors if n.endswith(".values"))
    assert tensors[name].dtype == torch.bfloat16
    tensors[name] = tensors[name] * float("nan")
    hub.add("you/bad", {**files, WEIGHTS: save(tensors)})
    code, out, err = onelayer("pull", "you/bad", tmp_path / "bad")
    assert (code, out, len(err)) == (1, "", 1) and "holds NaN or Inf" in err[0]
    assert sorted(path.name for path in tmp_path.glob("*bad*")) == []
    code, out, err = onelayer("search", "--base", "org/tiny", "--json")
    assert (code, err) == (0, [])
    assert "me/gsm" in [found["repo_id"] for found in json.loads(out)["adapters"]]
