import pytest
import torch
from peft import get_peft_model

import models
import peft_onelayer
from peft_onelayer.adapter.reload import fingerprint, fingerprint_in_fresh_process


@pytest.fixture
def saved(tmp_path):
    """A trained adapter saved beside its base: (model in this process, adapter folder)."""
    models.build().save_pretrained(tmp_path / "base")
    base = type(models.build()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, peft_onelayer.SingleLayerConfig(layer=1, task_type="CAUSAL_LM", init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.more
def test_a_fresh_process_finds_the_same_bits_and_a_changed_weight_is_seen(saved):
    model, folder = saved
    ids = models.token_batch().tolist()
    reloaded = fingerprint_in_fresh_process(folder, ids)
    assert reloaded == fingerprint(model, ids)

    parameter = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(9.0))
    assert fingerprint(model, ids)["weights"] != reloaded["weights"]


def test_fingerprint_leaves_the_model_in_its_mode(saved):
    model, _ = saved
    model.train()
    fingerprint(model, models.token_batch().tolist())
    assert model.training


@pytest.mark.more
def test_a_folder_without_an_adapter_is_one_line(tmp_path):
    with pytest.raises(RuntimeError, match="in a fresh process failed") as caught:
        fingerprint_in_fresh_process(tmp_path, [[3]])
    assert "\n" not in str(caught.value)
