"""A set of tensors encoded against a base and restored: `encode` and `SparseEncoding.decode` are inverses."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from peft_onelayer.sparse.encoding import SparseEncoding, describe_base, encode

KEY = "base_model.model.model.layers.1.mlp.{}.single_layer_params.weight"
NAME = "model.layers.1.mlp.{}.weight"


@pytest.fixture
def encoded():
    """(state of the file, encoding, the trained tensors by key, the base's by name)."""
    generator = torch.Generator().manual_seed(0)
    base = {NAME.format(name): torch.randn(8, 300, generator=generator).bfloat16() for name in ("up", "down")}
    base[NAME.format("wide")] = torch.randn(5, dtype=torch.float64)
    trained = {}
    for name, tensor in base.items():
        key = KEY.format(name.split(".")[-2])
        trained[key] = torch.where(torch.rand(tensor.shape, generator=generator) < 0.1, tensor * 1.02, tensor)
    pairs = zip(trained.items(), base.values(), strict=True)
    known = describe_base(None, "org/base", None, 4)
    state, encoding = encode(((key, value, original) for (key, value), original in pairs), known)
    return state, encoding, trained, base


def access(base, during):
    @contextmanager
    def base_tensor(name):
        during.append(name)
        yield base[name]
        during.pop()

    return base_tensor


def test_decoding_gives_what_was_encoded_and_leaves_other_tensors(encoded):
    state, encoding, trained, base = encoded
    assert set(encoding.tensors) == set(base) and encoding.base["name"] == "org/base"
    assert sum(tensor.nbytes for tensor in state.values()) < 0.5 * sum(tensor.nbytes for tensor in trained.values())
    head, during = torch.ones(3), []
    shapes = {name: tensor.shape for name, tensor in base.items()}
    decoded = encoding.decode({**state, "base_model.model.lm_head.weight": head}, shapes, access(base, during))
    assert decoded.pop("base_model.model.lm_head.weight") is head and not during
    assert decoded.keys() == trained.keys()
    assert all(decoded[k].dtype == trained[k].dtype and torch.equal(decoded[k], trained[k]) for k in trained)
    assert SparseEncoding.from_json(json.loads(json.dumps(encoding.to_json()))) == encoding


def test_the_plainest_difference_is_named_before_any_tensor_is_decoded(encoded):
    state, encoding, _, base = encoded
    shapes = {name: tensor.shape for name, tensor in base.items()}
    for change, message in (
        (lambda s: s.pop(NAME.format("up")), r"differ in 1 tensor\(s\), for example model\.layers\.1\.mlp\.up"),
        (lambda s: s.update({NAME.format("down"): (8, 301)}), r"down\.weight has shape \[8, 301\], not \[8, 300\]"),
    ):
        changed, during = dict(shapes), []
        change(changed)
        with pytest.raises(ValueError, match=message):
            encoding.decode(state, changed, access({}, during))
        assert during == []
    other = {**base, NAME.format("up"): base[NAME.format("up")] + 1}
    with pytest.raises(ValueError, match=r"up\.weight holds other weights"):
        encoding.decode(state, shapes, access(other, []))
    assert encoding.decode(state, shapes, access(other, []), allow_other_base=True)


def test_values_that_are_not_there(encoded):
    state, encoding, _, _ = encoded
    key = KEY.format("up")
    with pytest.raises(ValueError, match=r"lacks the values of model\.layers\.1\.mlp\.up\.weight"):
        encoding.group(set(state) - {f"{key}.values"})


def test_what_is_recorded_is_read_without_torch(encoded):
    _, encoding, _, _ = encoded
    code = f"""
import sys
sys.modules["torch"] = None
from peft_onelayer.sparse.encoding import SparseEncoding
print(SparseEncoding.from_json({encoding.to_json()!r}).tensors[{NAME.format("up")!r}].dtype)
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "bfloat16\n"
