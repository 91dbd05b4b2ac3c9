"""The README's code runs as it stands there."""

import re
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_fits_on_a_page():
    assert README.count("\n") <= 150


def test_the_lines_of_python_train_block_7_and_the_adapter_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training, loading = BLOCKS
    namespace = {}
    exec(training, namespace)
    trained = load_file(tmp_path / "my-adapter" / "adapter_model.safetensors")
    base = load_file(files("peft_onelayer") / "demo_model" / "model.safetensors")
    before = {name: tensor for name, tensor in base.items() if ".layers.7." in name}
    after = {
        name.removeprefix("base_model.model.").replace(".single_layer_params", ""): t for name, t in trained.items()
    }
    assert after.keys() == before.keys()
    assert not all(torch.equal(after[name], before[name]) for name in before)

    model = namespace["trainer"].model.eval()
    exec(loading, namespace)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(input_ids=ids.to(model.device)).logits.cpu()
        assert torch.equal(namespace["model"](input_ids=ids).logits, expected)
