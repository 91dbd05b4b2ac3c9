"""Every rule of peft_onelayer/sparse/SPECIFICATION.md under its number.

`decode` is a decoder of its own, entry by entry, written from that page: what the package writes it must read alike.
"""

import hashlib
import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tuner.helpers import base_weights, logits, masters, wrap

import peft_onelayer
from models import build
from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.adapter.write_sparse import write_sparse
from peft_onelayer.records.files import CONFIG, WEIGHTS
from peft_onelayer.sparse.tensor import decode_tensor, encode_tensor

SPECIFICATION = Path(peft_onelayer.__file__).parent / "sparse" / "SPECIFICATION.md"
BF16 = torch.bfloat16
WIDTH = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}


def bits(tensor: torch.Tensor) -> list[int]:
    """The entries' bits as unsigned integers, row by row."""
    size = tensor.element_size()
    if not tensor.numel():
        return []
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]


def ordered(b: int, width: int) -> int:
    """Rule 10: the float's bits as a signed integer; a negative one XOR 0x7FFF... ."""
    b = b - 2**width if b >= 2 ** (width - 1) else b
    return b ^ (2 ** (width - 1) - 1) if b < 0 else b


def decode(parts: dict[str, torch.Tensor], base: torch.Tensor) -> list[int]:
    """Rules 8 to 10: the bits of the restored entries."""
    result, width = bits(base), WIDTH[base.dtype]
    if "indices" in parts:
        listed = parts["indices"].tolist()
    elif "gaps" in parts:
        listed, at = [], 0
        for gap in parts["gaps"].tolist():
            at += gap
            if gap < {torch.uint8: 255, torch.uint16: 65535}[parts["gaps"].dtype]:
                listed.append(at)
                at += 1
    elif "bitmap" in parts:
        bitmap = parts["bitmap"].tolist()
        listed = [i for i in range(base.numel()) if bitmap[i // 8] & 2 ** (i % 8)]
    else:
        listed = list(range(base.numel()))
    values = iter(bits(parts["values"]))
    if "ulps" not in parts:
        for entry in listed:
            result[entry] = next(values)
    else:
        lowest = {torch.int8: -128, torch.int16: -32768}[parts["ulps"].dtype]
        for entry, distance in zip(listed, parts["ulps"].tolist(), strict=True):
            if distance == lowest:
                result[entry] = next(values)
            else:
                result[entry] = ordered(ordered(result[entry], width) + distance, width) % 2**width
    assert next(values, None) is None
    return result


def suffixes(encoded: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    assert all(name.startswith(f"{key}.") for name in encoded)
    return {name.removeprefix(f"{key}."): tensor for name, tensor in encoded.items()}


def sample(dtype: torch.dtype, density: float, kind: str, size: int, seed: int):
    """(base, new) with a share of the entries moved: by a few units in the last place, far, or both."""
    rng = np.random.default_rng(seed)
    base = torch.from_numpy(0.02 * rng.standard_normal(size)).to(dtype)
    step = {16: 0.01, 32: 1e-4}[WIDTH[dtype]]
    near = (base.double() * (1 + step * torch.from_numpy(rng.standard_normal(size)))).to(dtype)
    far = torch.from_numpy(rng.standard_normal(size)).to(dtype)
    share = {"near": 0.0, "far": 1.0, "both": 0.1}[kind]
    new = torch.where(torch.from_numpy(rng.random(size) < share), far, near)
    return base, torch.where(torch.from_numpy(rng.random(size) < density), new, base)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sparse adapter of a bfloat16 base, its master in float32, beside the dense one."""
    root = tmp_path_factory.mktemp("published")
    base = build(dtype=BF16)
    base.save_pretrained(root / "base")
    base.config._name_or_path = "somebody/base"
    model = wrap(base, modules_to_save=["lm_head"])
    generator = torch.Generator().manual_seed(0)
    for parameter in masters(model).values():
        moved = torch.rand(parameter.shape, generator=generator) < 0.2
        parameter.data[moved] *= 1 + 0.01 * torch.randn(parameter.shape, generator=generator)[moved]
    model.save_pretrained(root / "dense")
    write_sparse(root / "dense", root / "sparse", build(dtype=BF16))
    return root


def config_of(folder):
    return json.loads((folder / "sparse" / CONFIG).read_text())


def copy_of(folder, tmp_path, change=lambda config: None):
    """A copy of the sparse adapter with a changed configuration."""
    target = tmp_path / "adapter"
    target.mkdir()
    (target / WEIGHTS).write_bytes((folder / "sparse" / WEIGHTS).read_bytes())
    config = config_of(folder)
    change(config)
    (target / CONFIG).write_text(json.dumps(config))
    return target


def test_every_rule_has_its_test():
    rules = [int(number) for number in re.findall(r"^(\d+)\. ", SPECIFICATION.read_text(), re.MULTILINE)]
    assert rules == list(range(1, len(rules) + 1))
    assert {int(found[1]) for name in globals() if (found := re.match(r"test_rule_(\d+)_", name))} == set(rules)


def test_rule_1_two_plain_files(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    assert {path.name for path in copy.iterdir()} == {CONFIG, WEIGHTS}  # these two suffice
    save_file(load_file(copy / WEIGHTS), copy / WEIGHTS, metadata={"indices": "nonsense"})
    assert open_adapter(copy).encoding == "sparse"
    (copy / "inside").write_bytes((copy / WEIGHTS).read_bytes())
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).symlink_to("inside")
    assert open_adapter(copy).encoding == "sparse"
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).symlink_to(folder / "sparse" / WEIGHTS)
    with pytest.raises(ValueError, match="links and devices are not followed"):
        open_adapter(copy)
    (copy / CONFIG).write_text((copy / CONFIG).read_text() + " " * 16 * 2**20)
    with pytest.raises(ValueError, match="a configuration has less"):
        open_adapter(copy)


def test_rule_2_the_field_encoding(folder, tmp_path):
    encoding = config_of(folder)["encoding"]
    assert encoding.keys() == {"format", "base", "tensors"} and encoding["format"] == "onelayer-sparse-1"
    assert json.loads((folder / "dense" / CONFIG).read_text())["encoding"] is None
    assert open_adapter(folder / "dense").encoding == "dense"
    copy = copy_of(folder, tmp_path, lambda config: config["encoding"].update(format="onelayer-sparse-2"))
    with pytest.raises(ValueError, match="onelayer-sparse-2"):
        open_adapter(copy)


def test_rules_3_and_4_records_and_digests(folder):
    records = config_of(folder)["encoding"]["tensors"]
    base, dense = base_weights(build(dtype=BF16)), load_file(folder / "dense" / WEIGHTS)
    trained = {key.replace(".single_layer_params.", ".").removeprefix("base_model.model."): key for key in dense}
    del trained["lm_head.weight"]
    assert records.keys() == trained.keys() and "model.layers.2.mlp.down_proj.weight" in records

    def digest(tensor):
        head = f"bfloat16 {list(tensor.shape)}\n".encode()
        return hashlib.sha256(head + tensor.view(torch.uint8).numpy().tobytes()).hexdigest()

    assert f"{list(base['model.layers.2.mlp.down_proj.weight'].shape)}" == "[32, 48]"  # as the rule writes it
    for name, record in records.items():
        new = dense[trained[name]].to(BF16)
        assert record == {
            "dtype": "bfloat16",
            "shape": list(new.shape),
            "changed": sum(a != b for a, b in zip(bits(new), bits(base[name]), strict=True)),
            "base": digest(base[name]),
            "result": digest(new),
        }
    assert any(record["changed"] for record in records.values())


test_rule_3_records = test_rule_4_digests = test_rules_3_and_4_records_and_digests
del test_rules_3_and_4_records_and_digests


def test_rule_5_what_is_known_of_the_base_guards_nothing(folder, tmp_path):
    found = config_of(folder)["encoding"]["base"]
    assert found.keys() == {"name", "revision", "config", "num_layers"}
    assert found["num_layers"] == 4 and re.fullmatch("[0-9a-f]{64}", found["config"])
    other = {"name": "x/y", "revision": "0123", "config": "0" * 64, "num_layers": 7}
    copy = copy_of(folder, tmp_path, lambda config: config["encoding"].update(base=other))
    with pytest.warns(UserWarning, match="its configuration is another"):
        loaded = PeftModel.from_pretrained(build(dtype=BF16), copy)
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(build(dtype=BF16), folder / "dense")))
    wrong = build(dtype=BF16, seed=1)
    wrong.config._name_or_path = "somebody/else"
    with pytest.raises(ValueError, match=r"\(x/y at 0123\): .* name x/y there and somebody/else here"):
        PeftModel.from_pretrained(wrong, copy)
    with pytest.raises(ValueError, match="made for a model of 4 blocks and this one has 5"):
        PeftModel.from_pretrained(build(dtype=BF16, num_layers=5), folder / "sparse")


def test_rule_6_the_effective_value_merges_and_serves_alike(folder):
    """Of float32 masters that lie between the numbers of bfloat16; ties go to the even one."""
    dense = PeftModel.from_pretrained(build(dtype=BF16), folder / "dense")
    sparse = PeftModel.from_pretrained(build(dtype=BF16), folder / "sparse")
    differs = False
    for name, master in masters(dense).items():
        loaded = masters(sparse)[name]
        assert loaded.dtype == master.dtype == torch.float32
        assert torch.equal(loaded, master.to(BF16).float())
        differs |= not torch.equal(loaded, master)
    assert differs  # else the masters were no test
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # half-way between numbers of bfloat16
    assert ties.to(BF16).tolist() == [1.0, 1 + 2**-6]
    assert torch.equal(logits(sparse), logits(dense))
    merged = [model.merge_and_unload().state_dict() for model in (sparse, dense)]
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[1])


def test_rule_7_names(folder):
    dense, sparse = load_file(folder / "dense" / WEIGHTS), load_file(folder / "sparse" / WEIGHTS)
    head = "base_model.model.lm_head.weight"
    assert torch.equal(sparse.pop(head), dense.pop(head))
    assert {key.rpartition(".")[0] for key in sparse} == set(dense)
    assert {key.rpartition(".")[2] for key in sparse} <= {"indices", "gaps", "bitmap", "values", "ulps"}
    assert all(tensor.dim() == 1 for tensor in sparse.values())
    base, new = torch.zeros(4, dtype=BF16), torch.tensor([0.0, 1.0, 0.0, 2.0], dtype=BF16)
    common = {"indices": (new != base).nonzero().flatten().int(), "values": new[new != base]}
    assert torch.equal(decode_tensor("w", common, base), new)


def test_rule_8_worked_examples():
    base = torch.zeros(1100, dtype=BF16)
    for gaps in (torch.tensor([3, 254, 0, 255, 255, 255, 8], dtype=torch.uint8), [3, 254, 0, 773], [3, 254, 0, 773]):
        gaps = gaps if isinstance(gaps, torch.Tensor) else torch.tensor(gaps, dtype=torch.uint16)
        parts = {"gaps": gaps, "values": torch.ones(4, dtype=BF16)}
        assert decode_tensor("w", parts, base).nonzero().flatten().tolist() == [3, 258, 259, 1033]
        assert bits(decode_tensor("w", parts, base)) == decode(parts, base)
    parts = {"gaps": torch.tensor([255, 45], dtype=torch.uint8), "values": torch.ones(1, dtype=BF16)}
    assert decode_tensor("w", parts, base).nonzero().flatten().tolist() == [300]
    parts = {"bitmap": torch.tensor([0b101, 0b10], dtype=torch.uint8), "values": torch.ones(3, dtype=BF16)}
    assert decode_tensor("w", parts, base[:10]).nonzero().flatten().tolist() == [0, 2, 9]
    rows = decode_tensor("w", {"indices": torch.tensor([4]).int(), "values": torch.ones(1)}, torch.zeros(2, 3))
    assert rows.tolist() == [[0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("dtype", WIDTH, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_rule_9_what_is_written_decodes_by_the_rules_alone(dtype):
    seen = set()
    for seed, (density, kind, size) in enumerate(
        (density, kind, size)
        for density in (0, 0.0005, 0.004, 0.05, 0.3, 0.8, 0.95, 1)
        for kind in ("near", "far", "both")
        for size in (1, 9, 400, 6_000)
    ):
        base, new = sample(dtype, density, kind, size, seed)
        parts = suffixes(encode_tensor("w", new, base), "w")
        seen.add(frozenset(parts))
        assert parts["values"].dtype == dtype
        assert decode(parts, base) == bits(new) == bits(decode_tensor("w", parts, base))
    payloads = ({"values"}, {"values", "ulps"})
    assert seen >= {frozenset(payload | where) for payload in payloads for where in (set(), {"gaps"}, {"bitmap"})}
    wide = torch.rand(300, dtype=torch.float64)
    assert suffixes(encode_tensor("w", wide + 1, wide), "w").keys() == {"values"}


def test_rule_10_units_in_the_last_place():
    for width in (16, 32):
        zero, minus_zero = 0, 1 << (width - 1)
        assert ordered(zero, width) - ordered(minus_zero, width) == 1
    assert [ordered(b, 16) for b in bits(torch.tensor([1.0, -1.0], dtype=BF16))] == [0x3F80, -0x3F81]
    base = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=BF16)
    parts = {"ulps": torch.tensor([1, 1, -1, -128], dtype=torch.int8), "values": torch.tensor([7.0], dtype=BF16)}
    restored = decode_tensor("w", parts, base)
    assert restored.tolist() == [1 + 2**-7, -(1 - 2**-8), 0.0, 7.0] and math.copysign(1, restored[2]) == -1
    assert bits(restored) == decode(parts, base)
    with pytest.raises(ValueError, match=r"w\.ulps is int16"):  # that width is float32's
        decode_tensor("w", parts | {"ulps": parts["ulps"].short()}, base)


def sizes_of_all_forms(new, base, key):
    """Bytes of every form of the rules, by counting."""
    listed = [i for i, (a, b) in enumerate(zip(bits(new), bits(base), strict=True)) if a != b]
    n, width, extra = new.numel(), new.element_size(), 64 + len(key)
    gaps = [b - a - 1 for a, b in zip([-1, *listed], listed, strict=False)]
    where = [(4 * len(listed), listed), ((n + 7) // 8, listed)]
    where += [(size * sum(1 + gap // top for gap in gaps), listed) for size, top in ((1, 255), (2, 65535))]
    a, b = bits(new), bits(base)
    distance = [abs(ordered(x, 8 * width) - ordered(y, 8 * width)) for x, y in zip(a, b, strict=True)]
    forms = [n * width + extra]
    for positions, entries in [*where, (None, range(n))]:
        more = extra * (positions is not None)
        if positions is not None:
            forms.append(positions + width * len(entries) + extra + more)
        for small, limit in ((1, 127), (2, 32767))[: width // 2]:
            far = sum(distance[i] > limit for i in entries)
            forms.append((positions or 0) + small * len(entries) + width * far + 2 * extra + more)
    return forms


@pytest.mark.parametrize("dtype", WIDTH, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_rule_11_the_smallest_form(dtype):
    key = "model.layers.5.mlp.down_proj.weight"
    for seed, (density, kind, size) in enumerate(
        (density, kind, size)
        for density in (0, 0.0005, 0.01, 0.1, 0.25, 0.6, 0.85, 0.9, 0.96, 1)
        for kind in ("near", "far", "both")
        for size in (1, 55, 120, 300, 1_000)
    ):
        base, new = sample(dtype, density, kind, size, seed)
        encoded = encode_tensor(key, new, base)
        found = sum(part.nbytes + 64 + len(key) for part in encoded.values())
        assert found == min(sizes_of_all_forms(new, base, key)), (density, kind, size, list(encoded))


def refuse(state, change, folder, tmp_path, match):
    """Loading with `change`d tensors is an error in one line, from the reader and from PEFT; the model stays as is."""
    copy = copy_of(folder, tmp_path)
    state = dict(state)
    change(state)
    save_file(state, copy / WEIGHTS)
    model = build(dtype=BF16)
    before = base_weights(model)
    with pytest.raises(ValueError, match=match) as error:
        reader = open_adapter(copy)
        for name in reader.names:
            reader.tensor(name, before[name])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(model, copy)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_weights(model).items() if name in before)


STEM = "base_model.model.model.layers.2.mlp.up_proj.single_layer_params.weight"
FAULTS = {
    "missing": (lambda s: [s.pop(k) for k in list(s) if k.startswith(STEM)], "lacks 1 tensor"),
    "extra": (lambda s: s.update({STEM.replace("up_proj", "x"): torch.ones(1)}), "does not record"),
    "repeated": (lambda s: s.update({f"{STEM.removeprefix('base_model.model.')}.values": torch.ones(1)}), "twice"),
    "form": (lambda s: s.update({f"{STEM}.indices": s[f"{STEM}.values"].int()}), "no form of the sparse"),
    "dtype": (lambda s: s.update({f"{STEM}.values": s[f"{STEM}.values"].float()}), r"values is float32"),
    "dimensions": (lambda s: s.update({f"{STEM}.values": s[f"{STEM}.values"][None]}), r"values is bfloat16 \[1,"),
    "length": (lambda s: s.update({f"{STEM}.values": torch.ones(4000, dtype=BF16)}), r"values is bfloat16 \[4000\]"),
    "count": (lambda s: s.update({f"{STEM}.values": torch.ones(3, dtype=BF16)}), "3 values for"),
    "nan": (lambda s: s[f"{STEM}.values"].fill_(math.nan), "holds NaN or Inf"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_rule_12_malformed_tensors(folder, tmp_path, fault):
    state = load_file(folder / "sparse" / WEIGHTS)
    base = base_weights(build(dtype=BF16))["model.layers.2.mlp.up_proj.weight"]
    parts = {key: t for key, t in state.items() if not key.startswith(STEM)}
    parts |= {f"{STEM}.gaps": torch.tensor([4, 4], dtype=torch.uint8), f"{STEM}.values": base.flatten()[:2].clone()}
    refuse(parts, *FAULTS[fault][:1], folder, tmp_path, FAULTS[fault][1])


def test_rule_12_positions():
    base, one = torch.zeros(10, dtype=BF16), torch.ones(2, dtype=BF16)
    for positions in (
        {"indices": torch.tensor([3, 3], dtype=torch.int32)},
        {"indices": torch.tensor([3, 2], dtype=torch.int32)},
        {"indices": torch.tensor([-1, 2], dtype=torch.int32)},
        {"indices": torch.tensor([2, 10], dtype=torch.int32)},
        {"gaps": torch.tensor([4, 5], dtype=torch.uint8)},
        {"gaps": torch.tensor([1, 2, 255], dtype=torch.uint8)},
        {"bitmap": torch.tensor([1, 4], dtype=torch.uint8)},
        {"bitmap": torch.tensor([3], dtype=torch.uint8)},
    ):
        with pytest.raises(ValueError, match=r"^w has "):
            decode_tensor("w", positions | {"values": one}, base)


def test_rule_13_another_base(folder, tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    other = build(dtype=BF16)
    other.get_parameter(name).data[0, 0] += 1
    for model, match in (
        (other, f"its {name} holds other weights"),
        (build(dtype=torch.float32), "is float32 and was bfloat16 in training"),
        (build(dtype=BF16, intermediate_size=40), r"has shape \[40, 32\], not \[48, 32\]"),
    ):
        with pytest.raises(ValueError, match=match):
            PeftModel.from_pretrained(model, folder / "sparse")
    copy = copy_of(folder, tmp_path, lambda config: config.update(allow_other_base=True))
    with pytest.warns(UserWarning, match="allow_other_base"), pytest.raises(ValueError, match="other weights"):
        PeftModel.from_pretrained(other, copy)
    with pytest.raises(ValueError, match="has shape"):
        PeftModel.from_pretrained(build(dtype=BF16, intermediate_size=40), folder / "sparse", allow_other_base=True)
    base = base_weights(build(dtype=BF16))[name]
    far = base.float() + 1e-4 * torch.randn(base.shape)
    parts = open_adapter(folder / "sparse").parts(name)
    got = open_adapter(folder / "sparse").tensor(name, far, allow_other_base=True)
    assert got.dtype == torch.float32 and bits(got.to(BF16)) == decode(parts, far.to(BF16))


def test_rule_14_a_result_that_is_not_the_published_one(folder, tmp_path):
    for field, value in (("result", "0" * 64), ("changed", 1)):
        target = tmp_path / field
        target.mkdir()
        copy = copy_of(
            folder,
            target,
            lambda c, f=field, v=value: c["encoding"]["tensors"][min(c["encoding"]["tensors"])].update({f: v}),
        )
        for allowed in (False, True):  # on the right base it is damage, whatever is allowed
            with pytest.raises(ValueError, match="is damaged: it does not decode to the tensor that was published"):
                PeftModel.from_pretrained(build(dtype=BF16), copy, allow_other_base=allowed)


def test_a_header_is_what_rule_11_counts():
    """64 bytes and the key's length hold what one more part takes in a safetensors header."""
    from safetensors.torch import save

    key = "base_model.model.model.layers.5.mlp.down_proj.single_layer_params.weight"
    one = {f"{key}.values": torch.zeros(100_000, dtype=BF16)}
    two = one | {f"{key}.gaps": torch.zeros(100_000, dtype=torch.uint8)}
    lengths = [struct.unpack("<Q", save(state)[:8])[0] for state in (one, two)]
    assert abs(lengths[1] - lengths[0] - 64 - len(key)) <= 16
