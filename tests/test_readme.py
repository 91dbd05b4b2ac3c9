"""The README's code runs as it stands there, on a tiny model under the name it uses."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import models
import peft_onelayer

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory in which the README's model and data are tiny local files."""
    demo_model = Path(peft_onelayer.__file__).parent / "demo_model"
    model = models.build("Qwen3", num_layers=28, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = list(range(64))  # any token ends a completion: it keeps the run short
    model.save_pretrained(tmp_path / "Qwen" / "Qwen3-1.7B-Base")
    AutoTokenizer.from_pretrained(demo_model).save_pretrained(tmp_path / "Qwen" / "Qwen3-1.7B-Base")
    rows = [{"prompt": f"A{i:03d}+001=", "answer": str(i % 10)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # TRL trains in bfloat16 by default and transformers refuses that without a GPU, unless asked for the CPU by name.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    return tmp_path


def test_the_ten_lines_train_block_14_and_the_adapter_loads(folder):
    namespace = {}
    exec(BLOCKS[0], namespace)
    trained = load_file(folder / "my-adapter" / "adapter_model.safetensors")
    base = load_file(folder / "Qwen" / "Qwen3-1.7B-Base" / "model.safetensors")
    before = {name: t.float() for name, t in base.items() if ".layers.14." in name}
    after = {
        name.removeprefix("base_model.model.").replace(".single_layer_params", ""): t for name, t in trained.items()
    }
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)

    model = namespace["model"].eval()
    exec(BLOCKS[1], namespace)
    ids = models.token_batch()
    with torch.no_grad():
        assert torch.equal(namespace["model"](input_ids=ids).logits, model(input_ids=ids).logits)
