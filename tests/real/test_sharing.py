"""The trained adapter of SmolLM2-135M on its way: a Hub, a merged checkpoint, plain PEFT, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback import TOKEN, Hub
from peft import PeftModel
from safetensors.torch import load_file
from worker import Worker

from peft_onelayer import export_adapter, merge_into_checkpoint
from peft_onelayer.rl.cpu_products import restore_kernels

from .common import IDS, load, same

pytestmark = pytest.mark.real

PLAIN = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter).eval()
with torch.no_grad():
    logits = model(torch.arange(3, 27).reshape(2, 12)).logits
torch.save([logits, dict(model.merge_and_unload().state_dict())], out)
assert not any(name.startswith("peft_onelayer") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub, home = Hub(), tmp_path_factory.mktemp("home")
    hub.reset()
    hub.users = {TOKEN: "me"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    worker = Worker(environment | {"HF_HUB_DISABLE_TELEMETRY": "1"})
    yield worker
    worker.close()
    hub.close()


def test_pushed_sparse_and_pulled_it_gives_the_same_merged_bits(hub, smollm2, trained, tmp_path):
    pushed = hub("push", trained.folder, "me/sums", "--json")
    assert pushed.code == 0 and json.loads(pushed.out)["encoding"] == "sparse", pushed.err
    pulled = hub("pull", "me/sums", tmp_path / "pulled")
    assert pulled.code == 0, pulled.err
    dense, sparse = (
        Path(folder, "adapter_model.safetensors").stat().st_size for folder in (trained.folder, tmp_path / "pulled")
    )
    assert sparse < dense / 2
    for source, out in ((trained.folder, "mine"), (tmp_path / "pulled", "theirs")):
        merge_into_checkpoint(smollm2, source, tmp_path / out)
    mine, theirs = (load_file(tmp_path / out / "model.safetensors") for out in ("mine", "theirs"))
    assert same(mine, theirs)
    with torch.no_grad():
        base = load(smollm2)
        before = base(IDS).logits
        wrapped = PeftModel.from_pretrained(base, tmp_path / "pulled").eval()(IDS).logits
        assert torch.equal(wrapped, load(tmp_path / "theirs")(IDS).logits) and not torch.equal(wrapped, before)


def test_plain_peft_loads_the_export_to_the_same_bits(smollm2, trained, tmp_path):
    export_adapter(trained.folder, tmp_path / "plain", "peft")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, smollm2, tmp_path / "plain", tmp_path / "outputs"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logits, weights = torch.load(tmp_path / "outputs")
    restore_kernels()  # training may have replaced them, and plain PEFT knows nothing of it
    model = PeftModel.from_pretrained(load(smollm2), trained.folder).eval()
    with torch.no_grad():
        assert torch.equal(logits, model(IDS).logits)
    assert same(weights, dict(model.merge_and_unload().state_dict()))
