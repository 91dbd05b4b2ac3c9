"""A safetensors file looked at without a tensor library: what its header says, and NaN and Inf by their bits."""

import json
import math
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from peft_onelayer.adapter import stored
from peft_onelayer.adapter.stored import DTYPES, FLOATS, read_header

FLOAT_TYPES = [getattr(torch, DTYPES[name]) for name in FLOATS]


def test_the_header_says_what_torch_says(tmp_path):
    tensors = {name: torch.ones(3, 2).to(getattr(torch, name)) for name in DTYPES.values()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    header, data = read_header(tmp_path / "x"), (tmp_path / "x").read_bytes()
    assert header.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = header[name]
        assert (DTYPES[found.dtype], found.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert (found.bytes, found.entries) == (tensor.nbytes, tensor.numel())
        assert data[found.start : found.end] == tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert found.is_floating_point == tensor.is_floating_point() and found.is_finite()


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_nan_and_inf_are_found_wherever_they_are(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(stored, "PIECE", 100)
    largest = torch.full((250,), torch.finfo(dtype).max, dtype=dtype)
    smallest = torch.full((250,), torch.finfo(dtype).smallest_normal, dtype=dtype) / 2  # subnormal
    tensors = {"largest": largest, "lowest": -largest, "smallest": smallest}
    for number in (math.nan, -math.nan, math.inf, -math.inf):
        for at in (0, 99, 100, 249):
            tensors[f"{number} {at}"] = largest.clone()
            tensors[f"{number} {at}"][at] = number
    save_file(tensors, tmp_path / "x")
    for name, found in read_header(tmp_path / "x").items():
        assert found.is_finite() == bool(tensors[name].isfinite().all()), name


def test_every_number_of_sixteen_bits_is_judged_as_torch_does(tmp_path):
    bits = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16))
    for dtype in (torch.bfloat16, torch.float16):
        numbers = bits.view(dtype)
        save_file({str(i): numbers[i : i + 1].clone() for i in range(0, 2**16, 61)}, tmp_path / "x")
        for name, found in read_header(tmp_path / "x").items():
            assert found.is_finite() == bool(numbers[int(name)].isfinite()), name


def header(entry: str) -> bytes:
    text = f'{{"w": {entry}}}'.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"abcd"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        header("3"),
        header('["U8", [4], [0, 4]]'),  # safetensors itself takes this one
        header('{"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}'),
        header('{"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}'),
    ],
    ids=range(6),
)
def test_a_damaged_file_is_one_line(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x is damaged") as error:
        read_header(tmp_path / "x")
    assert str(error.value).isprintable()


def test_a_file_that_became_shorter(tmp_path):
    save_file({"w": torch.ones(10)}, tmp_path / "x")
    found = read_header(tmp_path / "x")["w"]
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-4])
    with pytest.raises(ValueError, match="x is truncated"):
        found.is_finite()


def test_numbers_that_no_adapter_has(tmp_path):
    from peft_onelayer.adapter.reader import open_adapter

    key = "base_model.model.model.layers.1.mlp.up_proj.single_layer_params.weight"
    save_file({key: torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "adapter_model.safetensors")
    fields = {"peft_type": "SINGLE_LAYER", "layer_indices": [1], "num_layers": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"holds base_model.*weight as F8_E4M3, which no adapter has"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": ["x"]}))
    with pytest.raises(ValueError, match="base_model_name_or_path is list, expected text or null"):
        open_adapter(tmp_path)
