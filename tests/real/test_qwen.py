"""Qwen2.5-Coder-0.5B in bfloat16: it loads, is wrapped, takes a step and merges."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_onelayer import SingleLayerConfig
from peft_onelayer.runs import TrainingSettings, train

from .common import IDS, SUMS, load, moved

pytestmark = pytest.mark.real


def test_wrapped_it_computes_what_it_did(qwen):
    model = load(qwen)
    with torch.no_grad():
        before = model(IDS).logits
        wrapped = get_peft_model(model, SingleLayerConfig(layer=12)).eval()
        assert torch.equal(wrapped(IDS).logits, before)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len(trained) == 12 and all(".layers.12." in name for name in trained)
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == 14_912_384


def test_a_step_moves_the_block_alone_and_the_merged_model_computes_the_same(qwen, tmp_path):
    run = train(
        TrainingSettings(
            model=qwen,
            task=SUMS,
            chat=False,
            layer=12,
            learning_rate=1e-4,
            prompts=4,
            completions=4,
            steps=1,
            eval_problems=0,
            out=tmp_path / "run",
        )
    )
    assert run.record.results.steps == 1 and run.record.settings.model.dtype == "bfloat16"
    assert moved(qwen, tmp_path / "run", tmp_path / "merged") == {12}
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load(qwen), tmp_path / "run").eval()(IDS).logits
        assert torch.equal(adapted, load(tmp_path / "merged")(IDS).logits)
