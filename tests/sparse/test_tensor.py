"""The sparse encoding of one tensor: lossless, as small as promised, and closed to anything malformed."""

import math

import pytest
import torch
from sparse_forms import form

from peft_onelayer.sparse.digest import config_digest, tensor_digest
from peft_onelayer.sparse.names import split_key
from peft_onelayer.sparse.tensor import changed_entries, count_changed, decode_tensor, encode_tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def make(density: float, how: str, dtype: torch.dtype, size: int = 20_000, seed: int = 0):
    """(base, new): weights as a model has them, with a share `density` changed: by one unit in the last place
    ("step"), by a step too wide for one byte ("far"), or to an unrelated value ("any")."""
    generator = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(size, generator=generator)).to(dtype).reshape(-1, 100)
    move = torch.rand(base.shape, generator=generator) < density
    if how == "any":
        new = (0.02 * torch.randn(base.shape, generator=generator)).to(dtype)
    else:
        new = (base.view(BITS[dtype]) + {"step": 1, "far": 300}[how]).view(dtype)
    return base, torch.where(move, new, base)


def parts_of(encoded: dict[str, torch.Tensor], name: str = "w") -> dict[str, torch.Tensor]:
    assert {split_key(key)[0] for key in encoded} == {name}
    return {split_key(key)[1]: tensor for key, tensor in encoded.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("how", ["step", "far", "any"])
@pytest.mark.parametrize("density", [0, 1e-4, 0.001, 0.01, 0.05, 0.12, 0.2, 0.25, 0.6, 0.9, 1.0])
def test_lossless_and_within_the_size_rule(density, how, dtype):
    base, new = make(density, how, dtype, size=200_000)
    before = base.clone()
    parts = parts_of(encode_tensor("w", new, base))
    restored = decode_tensor("w", parts, base)
    assert same_bits(restored, new)
    assert same_bits(base, before) and restored.data_ptr() != base.data_ptr()
    size = sum(part.nbytes for part in parts.values()) / base.nbytes
    found = (new.view(BITS[dtype]) != base.view(BITS[dtype])).float().mean().item()
    assert size <= 1.02
    if found <= 0.25:
        assert size <= 1.6 * found + 0.02
    if density == 0.05:
        assert size <= 0.1


KINDS = {
    (0.0, "step", torch.bfloat16): "gaps8+values",
    (0.001, "any", torch.bfloat16): "gaps16+values",
    (0.01, "any", torch.bfloat16): "gaps8+values",
    (0.05, "step", torch.bfloat16): "gaps8+ulps8",
    (0.05, "far", torch.bfloat16): "gaps8+values",
    (0.05, "far", torch.float32): "gaps8+ulps16",
    (0.5, "any", torch.bfloat16): "bitmap+values",
    (0.5, "step", torch.float16): "bitmap+ulps8",
    (1.0, "step", torch.bfloat16): "all+ulps8",
    (1.0, "far", torch.float32): "all+ulps16",
    (1.0, "any", torch.bfloat16): "dense",
}


@pytest.mark.parametrize(("case", "expected"), KINDS.items(), ids=[f"{k[0]}-{k[1]}-{NAMES[k[2]]}" for k in KINDS])
def test_the_smallest_form_is_taken(case, expected):
    base, new = make(*case, size=200_000)
    assert form(parts_of(encode_tensor("w", new, base))) == expected


def test_two_changes_far_apart_take_flat_indices():
    base = torch.zeros(3_000_000, dtype=torch.bfloat16)
    new = base.clone()
    new[[5, 2_999_999]] = 1.5
    parts = parts_of(encode_tensor("w", new, base))
    assert {part: tensor.tolist() for part, tensor in parts.items()} == {
        "indices": [5, 2_999_999],
        "values": [1.5, 1.5],
    }
    assert parts["indices"].dtype == torch.int32
    assert same_bits(decode_tensor("w", parts, base), new)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_every_pair_of_neighbours_and_signs_survives(dtype):
    """Over zero, from -0 to 0, from subnormal to normal, and between the largest numbers of both signs."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    marks = torch.tensor([0.0, -0.0, tiny / 2, -tiny / 2, tiny, -tiny, 1.0, -1.0, largest, -largest], dtype=dtype)
    base, new = (grid.flatten().repeat(50) for grid in torch.meshgrid(marks, marks, indexing="ij"))
    parts = parts_of(encode_tensor("w", new, base))
    assert same_bits(decode_tensor("w", parts, base), new)
    up = torch.nextafter(marks[:8], torch.tensor(float("inf"), dtype=dtype)) if dtype == torch.float32 else marks[:8]
    assert same_bits(decode_tensor("w", parts_of(encode_tensor("w", up, marks[:8])), marks[:8]), up)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8,), (9,), (3, 0), (2, 3, 5)])
def test_any_shape(shape):
    base = torch.randn(shape).bfloat16()
    for new in (base, base + 1):
        assert torch.equal(decode_tensor("w", parts_of(encode_tensor("w", new, base)), base), new)


def test_a_tensor_that_is_not_contiguous():
    base, new = make(0.1, "any", torch.bfloat16)
    parts = parts_of(encode_tensor("w", new.T, base.T))
    assert torch.equal(decode_tensor("w", parts, base.T), new.T)


def test_other_dtypes_stay_dense():
    base = torch.randn(1000, dtype=torch.float64)
    parts = parts_of(encode_tensor("w", base + 1, base))
    assert set(parts) == {"values"} and torch.equal(decode_tensor("w", parts, base), base + 1)


def test_gaps_as_the_specification_says():
    """Worked out by hand: entries 3, 258, 259 and 1033 of 1100 are set to 1."""
    base = torch.zeros(1100, dtype=torch.bfloat16)
    gaps = torch.tensor([3, 254, 0, 255, 255, 255, 8], dtype=torch.uint8)
    restored = decode_tensor("w", {"gaps": gaps, "values": torch.ones(4, dtype=torch.bfloat16)}, base)
    assert restored.nonzero().flatten().tolist() == [3, 258, 259, 1033]
    wide = torch.tensor([3, 254, 0, 773], dtype=torch.uint16)
    assert torch.equal(
        decode_tensor("w", {"gaps": wide, "values": torch.ones(4, dtype=torch.bfloat16)}, base), restored
    )


def test_ulps_as_the_specification_says():
    base = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.bfloat16)
    ulps = torch.tensor([1, 1, -1, -128], dtype=torch.int8)
    restored = decode_tensor("w", {"ulps": ulps, "values": torch.tensor([7.0], dtype=torch.bfloat16)}, base)
    # towards plus infinity; below +0 comes -0
    assert restored.tolist() == [1 + 2**-7, -(1 - 2**-8), 0.0, 7.0] and math.copysign(1, restored[2]) == -1


def test_a_bitmap_as_the_specification_says():
    base = torch.zeros(10, dtype=torch.bfloat16)
    parts = {"bitmap": torch.tensor([0b101, 0b10], dtype=torch.uint8), "values": torch.ones(3, dtype=torch.bfloat16)}
    assert decode_tensor("w", parts, base).nonzero().flatten().tolist() == [0, 2, 9]


def ints(*numbers, dtype=torch.uint8):
    return torch.tensor(numbers, dtype=dtype)


ONES = {count: torch.ones(count, dtype=torch.bfloat16) for count in range(12)}
BROKEN = {
    "nothing": {},
    "no_values": {"gaps": ints(1)},
    "unknown_part": {"offsets": ints(1), "values": ONES[1]},
    "two_positions": {"gaps": ints(1), "bitmap": ints(2, 0), "values": ONES[1]},
    "too_few_values": {"values": ONES[9]},
    "too_many_values": {"values": ONES[11]},
    "values_dtype": {"values": torch.ones(10)},
    "values_shape": {"values": torch.ones(2, 5, dtype=torch.bfloat16)},
    "nan": {"values": ONES[10] * float("nan")},
    "inf": {"gaps": ints(1), "values": ONES[1] / 0},
    "nan_by_ulps": {"ulps": torch.full((10,), 127, dtype=torch.int8), "values": ONES[0]},
    "indices_dtype": {"indices": ints(1, dtype=torch.int64), "values": ONES[1]},
    "indices_negative": {"indices": ints(-1, 2, dtype=torch.int32), "values": ONES[2]},
    "indices_beyond": {"indices": ints(1, 10, dtype=torch.int32), "values": ONES[2]},
    "indices_unsorted": {"indices": ints(3, 2, dtype=torch.int32), "values": ONES[2]},
    "indices_twice": {"indices": ints(3, 3, dtype=torch.int32), "values": ONES[2]},
    "indices_matrix": {"indices": ints(3, dtype=torch.int32).reshape(1, 1), "values": ONES[1]},
    "fewer_values_than_indices": {"indices": ints(1, 3, dtype=torch.int32), "values": ONES[1]},
    "gaps_dtype": {"gaps": ints(1, dtype=torch.int8), "values": ONES[1]},
    "gaps_beyond": {"gaps": ints(4, 5), "values": ONES[2]},
    "gaps_escape_beyond": {"gaps": ints(255, 0), "values": ONES[1]},
    "gaps_end_in_escape": {"gaps": ints(1, 255), "values": ONES[1]},
    "gaps_overflow": {"gaps": torch.full((10,), 65534, dtype=torch.uint16), "values": ONES[10]},
    "more_gaps_than_entries": {"gaps": torch.zeros(11, dtype=torch.uint8), "values": ONES[11]},
    "more_values_than_gaps": {"gaps": ints(4), "values": ONES[2]},
    "bitmap_short": {"bitmap": ints(1), "values": ONES[1]},
    "bitmap_long": {"bitmap": ints(1, 0, 0), "values": ONES[1]},
    "bitmap_beyond": {"bitmap": ints(1, 4), "values": ONES[2]},
    "bitmap_count": {"bitmap": ints(3, 0), "values": ONES[1]},
    "ulps_dtype": {"gaps": ints(4), "ulps": ints(1, dtype=torch.int16), "values": ONES[0]},
    "ulps_count": {"gaps": ints(4), "ulps": ints(1, 1, dtype=torch.int8), "values": ONES[0]},
    "ulps_without_their_value": {"gaps": ints(4), "ulps": ints(-128, dtype=torch.int8), "values": ONES[0]},
    "a_value_without_its_ulps": {"gaps": ints(4), "ulps": ints(1, dtype=torch.int8), "values": ONES[1]},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_malformed_is_refused_in_one_line(fault):
    base = torch.full((2, 5), torch.finfo(torch.bfloat16).max if fault == "nan_by_ulps" else 1.0, dtype=torch.bfloat16)
    before = base.clone()
    with pytest.raises(ValueError, match=r"\bw\b") as error:
        decode_tensor("w", BROKEN[fault], base)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert torch.equal(base, before)


def test_another_shape_or_dtype_cannot_be_encoded():
    base = torch.zeros(4)
    for new in (torch.zeros(5), torch.zeros(2, 2), torch.zeros(4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"w: .* cannot be encoded against a base of float32 \[4\]"):
            encode_tensor("w", new, base)


def test_changed_entries_are_those_that_differ_bit_by_bit():
    base = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.bfloat16)
    new = torch.tensor([[-0.0, 1.0], [2.0, 4.0]], dtype=torch.bfloat16)
    indices, values = changed_entries(new, base)
    assert indices.tolist() == [0, 3] and indices.dtype == torch.int64
    assert count_changed(new, base) == 2
    assert count_changed(new.double(), base.double()) == 1  # of float64 the values are compared
    assert values.tolist() == [-0.0, 4.0] and math.copysign(1, values[0]) == -1


def test_a_digest_tells_dtype_shape_and_bits_apart():
    zero = torch.zeros(4, dtype=torch.bfloat16)
    others = [zero.half(), zero.reshape(2, 2), -zero, torch.zeros(5, dtype=torch.bfloat16)]
    assert len({tensor_digest(tensor) for tensor in (zero, *others)}) == 5
    rows = torch.arange(6.0).reshape(2, 3)
    assert tensor_digest(rows.T) == tensor_digest(rows.T.contiguous()) != tensor_digest(rows)


def test_a_config_digest_is_of_the_architecture(tmp_path):
    from transformers import AutoConfig, Qwen3Config

    config = Qwen3Config(num_hidden_layers=4, vocab_size=64, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert config_digest(loaded) == config_digest(config)
    assert config_digest(Qwen3Config(num_hidden_layers=5, vocab_size=64)) != config_digest(config)
