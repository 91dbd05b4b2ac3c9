"""Masks are those that NumPy gives on whole tensors, however they are read."""

import numpy as np
import pytest
import torch
from changes import save_adapter, save_tensors
from safetensors.torch import load_file, save_file
from tuner.helpers import wrap

import models
from peft_onelayer import SingleLayerConfig, make_mask
from peft_onelayer.analysis import mask as mask_module

SHAPES = {
    "model.embed_tokens.weight": (40, 12),
    "model.layers.0.mlp.weight": (12, 20),
    "model.layers.0.norm.weight": (12,),
    "model.layers.1.mlp.weight": (20, 12),
    "model.layers.1.scale": (),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(mask_module, "PIECE", 50)


@pytest.fixture
def pair(tmp_path):
    """A base in bfloat16 and a float32 checkpoint in which most entries moved, many as far, and none in a norm."""
    torch.manual_seed(0)
    base = {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in SHAPES.items()}
    other = {}
    for name, tensor in base.items():
        size = 2.0 ** torch.randint(-18, -6, tensor.shape)
        other[name] = tensor.float() + size * torch.sign(torch.randn(tensor.shape)) * (torch.rand(tensor.shape) < 0.7)
    other["model.layers.0.norm.weight"] = base["model.layers.0.norm.weight"].float()
    save_tensors(tmp_path / "base", base)
    save_tensors(tmp_path / "other", other)
    return base, other


def test_by_default_it_is_what_changed_in_the_bases_dtype(tmp_path, pair):
    base, other = pair
    found = make_mask(tmp_path / "base", tmp_path / "other", tmp_path / "mask.safetensors")
    expected = {n: other[n].bfloat16() != base[n] for n in base}
    expected = {n: m for n, m in expected.items() if m.any()}
    masks = load_file(tmp_path / "mask.safetensors")
    assert masks.keys() == expected.keys() and "model.layers.0.norm.weight" not in masks
    assert all(masks[n].dtype == torch.bool and torch.equal(masks[n], expected[n]) for n in masks)
    total = sum(int(m.sum()) for m in expected.values())
    assert (found.trained, found.changed, found.tensors) == (total, total, len(expected))
    assert found.entries == sum(t.numel() for t in base.values())


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.9])
def test_a_share_has_the_largest_changes_and_of_equal_ones_the_first(tmp_path, pair, share):
    base, other = pair
    make_mask(tmp_path / "base", tmp_path / "other", tmp_path / "mask.safetensors", share=share)
    masks = load_file(tmp_path / "mask.safetensors")
    names = sorted(base)
    sizes = np.concatenate([(other[n].double() - base[n].double()).abs().numpy().reshape(-1) for n in names])
    wanted = min(round(share * len(sizes)), int((sizes > 0).sum()))
    chosen = np.zeros(len(sizes), bool)
    chosen[np.argsort(-sizes, kind="stable")[:wanted]] = True
    given = np.concatenate([masks.get(n, torch.zeros(SHAPES[n], dtype=torch.bool)).numpy().reshape(-1) for n in names])
    assert np.array_equal(given, chosen) and given.sum() == wanted


def test_a_random_mask_has_its_share_whatever_changed(tmp_path, pair):
    base, _ = pair
    drawn, total = [], sum(t.numel() for t in base.values())
    for seed in (0, 0, 1):
        found = make_mask(tmp_path / "base", tmp_path / "other", tmp_path / "mask.safetensors", random=0.3, seed=seed)
        masks = load_file(tmp_path / "mask.safetensors")
        assert found.trained == sum(int(m.sum()) for m in masks.values()) == round(0.3 * total)
        drawn.append(torch.cat([masks.get(n, torch.zeros(SHAPES[n])).flatten().bool() for n in sorted(base)]))
    assert torch.equal(drawn[0], drawn[1])
    both = int((drawn[0] & drawn[2]).sum())
    assert abs(both - 0.09 * total) < 4 * (0.09 * total) ** 0.5  # two independent ones


def test_of_an_adapter_the_trained_tensors_in_order_for_training(tmp_path):
    models.build().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "run", tmp_path / "base", layer=2)
    make_mask(tmp_path / "base", tmp_path / "run", tmp_path / "mask.safetensors", share=0.1)
    masks = load_file(tmp_path / "mask.safetensors")
    assert all(name.startswith("model.layers.2.") for name in masks)
    model = wrap(layer=2, mask=str(tmp_path / "mask.safetensors"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    block = sum(p.numel() for p in models.build().model.layers[2].parameters())
    assert trained == sum(int(m.sum()) for m in masks.values()) == round(0.1 * block)


def test_wrong_use_is_refused_in_one_line(tmp_path, pair):
    base, other, out = tmp_path / "base", tmp_path / "other", tmp_path / "mask.safetensors"
    for options, match in (
        ({"share": 0.1, "random": 0.1}, "exclude each other"),
        ({"share": 0.0}, "share=0.0 is no share"),
        ({"random": 1.5}, "random=1.5 is no share"),
        ({"share": 1e-9}, "is less than one; give a larger share"),
    ):
        with pytest.raises(ValueError, match=match):
            make_mask(base, other, out, **options)
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        make_mask(base, other, tmp_path / "mask.bin")
    with pytest.raises(ValueError, match="changes no entry"):
        make_mask(base, base, out)
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".mask*"))


def test_what_it_writes_is_a_safetensors_file_like_any_other(tmp_path, pair):
    make_mask(tmp_path / "base", tmp_path / "other", tmp_path / "mask.safetensors", share=0.3)
    masks = load_file(tmp_path / "mask.safetensors")
    save_file(masks, tmp_path / "again.safetensors")
    config = [SingleLayerConfig(layer=0, mask=str(tmp_path / f"{name}.safetensors")).mask for name in ("mask", "again")]
    assert config[0] == config[1]
