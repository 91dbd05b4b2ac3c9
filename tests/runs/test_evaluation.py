"""An evaluation from Python: one model in memory, and the base exactly as it is without the adapter."""

import weakref
from importlib.resources import files

import demo_model
import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_onelayer import SingleLayerConfig
from peft_onelayer.runs import EvaluationSettings, evaluate
from peft_onelayer.runs import evaluation as runs_evaluation

BASE = str(files("peft_onelayer") / "demo_model")
CONFIGS = {
    "block": SingleLayerConfig(layer=5, task_type="CAUSAL_LM"),
    "lora": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    "pissa": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"),
}


@pytest.mark.parametrize("kind", ["block", *(pytest.param(kind, marks=pytest.mark.more) for kind in ("lora", "pissa"))])
def test_it_holds_one_model(tmp_path, monkeypatch, kind):
    torch.manual_seed(0)
    adapted = get_peft_model(demo_model.load()[0], CONFIGS[kind])
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path)
    loaded, alive = [], []
    load = runs_evaluation.load_causal_lm

    def counted(*arguments, **options):
        alive.append(sum(model() is not None for model in loaded))
        model, tokenizer = load(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(runs_evaluation, "load_causal_lm", counted)
    given = {"model": BASE, "task": "arithmetic", "problems": 24, "samples": 2}
    with_adapter = evaluate(EvaluationSettings(**given, adapter=str(tmp_path)))
    assert len(loaded) == (2 if kind == "pissa" else 1)
    assert not any(alive)  # nothing else is in memory when a model is loaded
    alone = evaluate(EvaluationSettings(**given))
    for mode, measured in with_adapter.results.items():
        assert measured.base.mean == alone.results[mode].base.mean
        assert measured.adapter is not None and measured.adapter.mean != measured.base.mean
    assert with_adapter.model == alone.model and alone.adapter is None
