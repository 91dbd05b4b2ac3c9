"""Mutated adapter folders: each is refused in one line or gives exactly the tensors that were published.

Nothing crashes, hangs, takes much memory or writes anything.
"""

import copy
import json
import os
import random
import resource
import struct
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sparse_forms import form
from tuner.helpers import base_weights, masters, wrap

from models import build
from peft_onelayer import inspect_adapter
from peft_onelayer.adapter.reader import open_adapter
from peft_onelayer.adapter.validation import check_tensors
from peft_onelayer.adapter.write_sparse import write_sparse
from peft_onelayer.records.files import CONFIG, WEIGHTS

SIZES = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 96}  # large enough for every form of the encoding


def nested(depth):
    """[[[...]]]"""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


BIG = [0, -1, 1, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, 2**64, 10**30]
HOSTILE = [None, True, -1, 0.5, 1e308, float("nan"), "", "x" * 10_000, "../../secret", "/etc/passwd", "a\nb", [], {}]
HOSTILE += [nested(50), nested(900), [10**4000] * 50, "\x1b[2J\r", "\u0661", [[]], [None], {"": None}, [0] * 1000, *BIG]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of a sparse adapter in which every form occurs, the base, and what the tensors must be."""
    folder = tmp_path_factory.mktemp("published")
    base = build(dtype=torch.bfloat16, **SIZES)
    model = wrap(copy.deepcopy(base), layer=1)
    generator = torch.Generator().manual_seed(0)
    shares = {
        "q_proj": 0.05,
        "k_proj": 0.3,
        "v_proj": 0.02,
        "o_proj": 0.5,
        "gate_proj": 1.0,
        "up_proj": 1.0,
        "down_proj": 0.1,
    }
    for name, parameter in masters(model).items():
        share = next((share for part, share in shares.items() if part in name), 0.004)
        move = torch.rand(parameter.shape, generator=generator) < share
        if any(part in name for part in ("v_proj", "k_proj", "up_proj")):
            parameter.data[move] += 1
        else:
            parameter.data[move] *= 1.005
    model.save_pretrained(folder / "dense")
    write_sparse(folder / "dense", folder / "sparse", base)
    weights, tuned = base_weights(base), {name: p.detach().bfloat16() for name, p in masters(model).items()}
    return folder / "sparse", base, {name: weights[name] for name in tuned}, tuned


def test_the_original_holds_every_form(original):
    folder, _, weights, tuned = original
    reader = open_adapter(folder)
    kinds = {form(reader.parts(name)) for name in reader.names}
    assert {"gaps8+ulps8", "gaps8+values", "bitmap+ulps8", "bitmap+values", "all+ulps8", "dense"} <= kinds
    assert all(torch.equal(reader.tensor(name, weights[name]), tuned[name]) for name in reader.names)


# Each takes the copied folder and a random generator, and changes the folder.


def flip_bytes(folder, rng):
    path = folder / rng.choice([CONFIG, WEIGHTS, WEIGHTS])
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 30])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def cut_or_extend(folder, rng):
    path = folder / rng.choice([CONFIG, WEIGHTS])
    data = path.read_bytes()
    end = rng.randrange(len(data) + 1)
    path.write_bytes(rng.choice([data[:end], data[end:], data + bytes(rng.randrange(1, 100)), b"", data + data]))


def header_length(folder, rng):
    data = (folder / WEIGHTS).read_bytes()
    length = rng.choice([0, 1, 7, 2**20, 10**8, 2**31, 2**63, 2**64 - 1, len(data), rng.randrange(len(data))])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])


def header(folder, rng):
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    fields = json.loads(data[8 : 8 + length])
    key, other = rng.sample([name for name in fields if name != "__metadata__"], 2)
    entry = fields[key]
    what = rng.randrange(10)
    if what == 0:
        entry["dtype"] = rng.choice(
            ["BF16", "F16", "F32", "F64", "I8", "U8", "I32", "U16", "I64", "BOOL", "F8_E4M3", "X", 3]
        )
    elif what == 1:
        entry["shape"] = rng.choice(
            [[], [0], [-1], [2**62, 8], [entry["shape"][0], 1], [1, *entry["shape"]], *BIG, None]
        )
    elif what == 2:
        entry["data_offsets"] = rng.choice([[0, 0], [0, 2**40], [-1, 5], [5, 1], [0], fields[other]["data_offsets"]])
    elif what == 3:
        fields[rng.choice([other, key + "x", key.rpartition(".")[0], "", "../" + key])] = fields.pop(key)
    elif what == 4:
        del fields[key]
    elif what == 5:
        fields[key], fields[other] = fields[other], fields[key]
    elif what == 6:
        fields[rng.choice(["__metadata__", key])] = rng.choice(HOSTILE)
    elif what == 7:
        fields[key.removeprefix("base_model.model.")] = entry
    elif what == 8:
        fields[key + rng.choice(["\n", "\x1b[2J", "\x00", "/../../x", "." * 5_000])] = fields.pop(key)
    else:
        entry[rng.choice(list(entry))] = rng.choice(HOSTILE)
    text = json.dumps(fields).encode()
    if rng.random() < 0.1:
        text = rng.choice([b"[" * 100_000, b'{"a":' * 50_000, b"{}", b"", b"\xff\xfe{", text[:-1]])
    text += b" " * (-len(text) % 8)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def tensors(folder, rng):
    """A well-formed file whose tensors are wrong: positions, counts, dtypes, shapes, names, NaN and Inf."""
    state = load_file(folder / WEIGHTS)
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(list(state))
        part = state[key]
        what = rng.randrange(10)
        if what == 0 and part.numel():
            at = rng.randrange(part.numel())
            low, high = (
                (-9, 9) if part.is_floating_point() else (torch.iinfo(part.dtype).min, torch.iinfo(part.dtype).max)
            )
            part = part.clone()
            part[at] = rng.choice([low, high, 0, rng.randint(low, high)])
        elif what == 1 and part.is_floating_point() and part.numel():
            part = part.clone()
            part[rng.randrange(part.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
        elif what == 2:
            part = part[: rng.randrange(part.numel() + 1)].clone()
        elif what == 3:
            part = torch.cat([part, part[: rng.randrange(part.numel() + 1)]])
        elif what == 4:
            part = part.to(
                rng.choice([torch.int8, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
            )
        elif what == 5:
            part = part.reshape(rng.choice([(1, -1), (-1, 1)])) if part.numel() else part.reshape(0, 3)
        elif what == 6:
            part = part.flip(0).contiguous()
        elif what == 7:
            state.pop(key)
            key = key.rpartition(".")[0] + rng.choice(
                [".indices", ".gaps", ".bitmap", ".ulps", ".values", "", ".offsets"]
            )
        elif what == 8:
            stem = key.rpartition(".")[0]
            size = rng.choice([0, 1, 5, 300, 6144])
            for old in [k for k in state if k.startswith(stem + ".")]:
                del state[old]
            low, high = rng.choice([(0, 6144), (-5, 5), (0, 2**31 - 1), (-(2**31), 0)])
            numbers = [rng.randint(low, high) for _ in range(size)]
            state[stem + ".indices"] = torch.tensor(
                sorted(numbers) if rng.random() < 0.5 else numbers, dtype=torch.int32
            )
            key, part = stem + ".values", torch.zeros(size, dtype=torch.bfloat16)
        else:
            key, part = key + rng.choice([".more", ".values"]), part.clone()
        state[key] = part
    save_file({key: part.contiguous() for key, part in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def config(folder, rng):
    """One field, at any depth, exchanged, removed or added."""
    root = json.loads((folder / CONFIG).read_text())
    node = root
    if rng.random() < 0.6:
        node = root["encoding"]
        if rng.random() < 0.8:
            node = node["tensors"]
            if rng.random() < 0.7:
                node = node[rng.choice(list(node))]
    key = rng.choice(list(node))
    what = rng.randrange(4)
    if what == 0:
        del node[key]
    elif what == 1:
        node[rng.choice(["allow_other_base", "../x", "new", ""])] = node.pop(key)
    elif what == 2 and isinstance(node[key], str) and node[key]:
        node[key] = node[key][:-1] + rng.choice("0aF\x00 ")
    else:
        node[key] = rng.choice(HOSTILE)
    (folder / CONFIG).write_text(json.dumps(root))


def twice(folder, rng):
    """A key that stands twice in the JSON of the configuration or the header, with another value."""
    if rng.random() < 0.5:
        text = (folder / CONFIG).read_text()
        key, value = rng.choice(['"encoding": null', '"num_layers": 5', '"layer_indices": [0]', '"tensors": {}']).split(
            ": "
        )
        at = rng.choice([text.index("{") + 1, text.index("{", 2) + 1])
        (folder / CONFIG).write_text(f"{text[:at]}{key}: {value},{text[at:]}")
        return
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    fields = json.loads(data[8 : 8 + length])
    key, other = rng.sample([name for name in fields if name != "__metadata__"], 2)
    text = data[8 : 8 + length].decode().rstrip()[:-1] + f",{json.dumps(key)}:{json.dumps(fields[other])}}}"
    text += " " * (-len(text) % 8)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + length :])


def not_a_config(folder, rng):
    texts = [b"", b"null", b"[]", b"3", b'"x"', b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe", b"{" + b" " * 10_000]
    texts += [b'{"peft_type": "SINGLE_LAYER"}', b'{"peft_type": "LORA"}', b"NaN", b"9" * 10_000, b" " * 2**21]
    (folder / CONFIG).write_bytes(rng.choice(texts))


def links(folder, rng):
    path = folder / rng.choice([CONFIG, WEIGHTS])
    secret = folder.parent / "secret"
    path.unlink()
    what = rng.randrange(8)
    if what == 0:
        path.symlink_to(secret)
    elif what == 1:
        path.symlink_to("/dev/zero")
    elif what == 2:
        path.symlink_to("nowhere")
    elif what == 3:
        path.symlink_to(path.name)
    elif what == 4:
        path.mkdir()
    elif what == 5:
        os.mkfifo(path)
    elif what == 6:
        os.link(secret, path)
    # else it is missing


MUTATIONS = [flip_bytes, cut_or_extend, header_length, header, header, tensors, tensors, tensors, config, config]
MUTATIONS += [twice, not_a_config, links]


def mutated(original_folder, target, seed):
    """Write the mutation number `seed` to `target` and return its name."""
    rng = random.Random(seed)
    target.mkdir()
    for name in (CONFIG, WEIGHTS):
        (target / name).write_bytes((original_folder / name).read_bytes())
    mutation = rng.choice(MUTATIONS)
    mutation(target, rng)
    return mutation.__name__


def remove(folder):
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    folder.rmdir()


def read_all(folder, weights):
    reader = open_adapter(folder)
    return {name: reader.tensor(name, weights.get(name)) for name in reader.names}


@contextmanager
def bounded_memory(more=256 * 2**20):
    """An allocation beyond `more` bytes above what the process has now is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(tmp_path, original, count, first=0):
    """Open `count` mutated folders with the reader; prints how many were refused and how many loaded, by mutation."""
    folder, _, weights, tuned = original
    (tmp_path / "secret").write_text('{"secret": 1}')
    before = {name: tensor.clone() for name, tensor in weights.items()}
    results: Counter = Counter()
    slowest = 0.0
    for seed in range(first, first + count):
        target = tmp_path / "adapter"
        name = mutated(folder, target, seed)
        start = time.process_time()
        try:
            with bounded_memory():
                loaded = read_all(target, weights)
        except ValueError as error:
            assert str(error).isprintable(), (seed, name, str(error))
            assert 0 < len(str(error)) < 2000, (seed, name, str(error))
            assert "secret" not in str(error).replace("../../secret", ""), (seed, name, str(error))
            results[name, "refused"] += 1
            loaded = None
        else:
            assert loaded.keys() == tuned.keys(), (seed, name)
            assert all(torch.equal(loaded[n].view(torch.int16), tuned[n].view(torch.int16)) for n in tuned), (
                seed,
                name,
            )
            results[name, "loaded"] += 1
        for look in (lambda folder: check_tensors(open_adapter(folder), None), inspect_adapter):  # without the base
            try:
                with bounded_memory():
                    look(target)
            except ValueError as error:
                assert loaded is None and str(error).isprintable(), (seed, name, str(error))
        slowest = max(slowest, time.process_time() - start)
        remove(target)
    assert slowest < 5, "seconds for one folder of 100 kB"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert {name for name, _ in results} == {mutation.__name__ for mutation in MUTATIONS}
    assert sum(n for (_, result), n in results.items() if result == "refused") > 0.7 * count
    for (name, result), number in sorted(results.items()):
        print(f"{name:15} {result:8} {number:6}")
    print(f"slowest: {slowest:.2f} s")


@pytest.mark.more
def test_mutated_folders_are_refused_or_load_exactly(tmp_path, original):
    check(tmp_path, original, 400)


@pytest.mark.slow
def test_ten_thousand_mutated_folders(tmp_path, original):
    check(tmp_path, original, 10_000, first=1_000)


def through_peft(tmp_path, original, count, first):
    """As `check`, through PeftModel.from_pretrained. What PEFT itself opens (links, devices, other formats) it opens;
    and of a file that is no adapter it complains in its own way."""
    folder, base, _, tuned = original
    weights = base_weights(base)
    loaded_ones = 0
    (tmp_path / "secret").write_text("{}")
    for seed in range(first, first + count):
        target = tmp_path / "adapter"
        name = mutated(folder, target, seed)
        if name not in ("links", "not_a_config"):
            model = copy.deepcopy(base)
            try:
                with warnings.catch_warnings(), bounded_memory():
                    warnings.simplefilter("ignore")
                    loaded = PeftModel.from_pretrained(model, target)
            except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
                assert "\n" not in str(error), (seed, name, str(error))
            else:
                loaded_ones += 1
                values = {n: p.detach().bfloat16() for n, p in masters(loaded).items()}
                assert values.keys() == tuned.keys(), (seed, name)
                assert all(torch.equal(values[n].view(torch.int16), tuned[n].view(torch.int16)) for n in tuned), (
                    seed,
                    name,
                )
            after = {n: w for n, w in base_weights(model).items() if n in weights}
            assert all(torch.equal(weights[n], after[n]) for n in weights), (seed, name)
        remove(target)
    assert 0 < loaded_ones < count / 2


def test_peft_loads_mutated_folders_exactly_or_not_at_all(tmp_path, original):
    through_peft(tmp_path, original, 60, first=0)


@pytest.mark.slow
def test_peft_and_two_thousand_mutated_folders(tmp_path, original):
    through_peft(tmp_path, original, 2_000, first=20_000)


# Structure-aware mutants: a file of the right form, one or two of whose values are of another type, size or name.

DEEP = {"a": 1}
for _ in range(900):
    DEEP = {"a": DEEP}
TYPES = [3, 2.5, -1, True, None, "text", "", [], {}, ["a"], {"a": 1}, [[["a"]]], [None], {"a": None}, 10**300, 2**64]
SIZES_OF_TEXT = [
    "x" * 10**7,
    "\n" * 50,
    "a\nb: forged\n\u202egnp",
    "\x1b[2J",
    "[/b]",
    "a[/b]",
    "\ud800",
    "\x00",
    "y" * 5000,
]
HOSTILE_VALUES = [*TYPES, *SIZES_OF_TEXT, float("nan"), float("inf"), DEEP, nested(900), nested(70), [0] * 10**5]
HOSTILE_VALUES += ["(a|a|l|l)*" * 20 + "!", "a{999999999}", "0-9999999999999", "../../secret", ["../x"], "/etc/passwd"]
FOREIGN = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
FOREIGN += ["model.layers.1.mlp.up_proj.base_layer.weight", "lm_head.modules_to_save.default.weight", "x", "", "a\nb"]


def nodes(value):
    """Every object and list within `value`, itself included."""
    found, left = [], [value]
    while left:
        item = left.pop()
        if isinstance(item, (dict, list)) and item:
            found.append(item)
            left += item.values() if isinstance(item, dict) else item
    return found


def change_json(path, rng):
    """Exchange, remove, add, rename or nest one or two values of a JSON file, at any depth."""
    root = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 1, 2])):
        node = root if rng.random() < 0.5 else rng.choice(nodes(root) or [root])
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key, what = rng.choice(keys), rng.randrange(8)
        if what == 0:
            del node[key]
        elif what == 1 and isinstance(node, dict):
            node[rng.choice(["new", "", "a\nb", "x" * 10**6, "__class__", "encoding", "layer"])] = node.pop(key)
        elif what == 2:
            node[key] = rng.choice([[node[key]], {"a": node[key]}])
        else:
            node[key] = rng.choice(HOSTILE_VALUES)
        if not root:
            break
    path.write_text(json.dumps(root))


def change_header(path, rng):
    """A header of right form: foreign names of right shape, other dtypes, shapes, lengths, offsets that overlap."""
    state = load_file(path)
    what = rng.randrange(6)
    name = rng.choice(FOREIGN)
    if what < 3:  # well-formed, with a tensor that the configuration does not name
        shapes = {"lm_head.weight": (64, 64), "model.embed_tokens.weight": (64, 64), "model.norm.weight": (64,)}
        shape = rng.choice([shapes.get(name, (96, 64)), (3,), ()])
        key = rng.choice(["base_model.model.", "base_model.model.", "", "base_model."]) + name
        state[key] = torch.zeros(shape, dtype=rng.choice([torch.float32, torch.bfloat16, torch.float8_e4m3fn]))
        save_file(state, path)
        return
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    fields = json.loads(data[8 : 8 + length])
    key = rng.choice([key for key in fields if key != "__metadata__"])
    entry = fields[key]
    if what == 3:
        entry[rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice(HOSTILE_VALUES)
    elif what == 4:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice([[start - 1, end - 1], [start + 1, end], [0, end - start], [end, start]])
    else:
        fields[rng.choice(["__metadata__", key])] = rng.choice(HOSTILE_VALUES)
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    said = rng.choice([len(text)] * 6 + [len(text) + 8, 2**40, 0])
    path.write_bytes(struct.pack("<Q", said) + text + data[8 + length :])


def structured(tmp_path, original, count, first=0):
    """Open `count` mutants in every way; prints how many were refused and how many loaded, by the file that was changed
    and the way."""
    from peft_onelayer.records.files import RUN
    from peft_onelayer.runs.models import load_adapter

    folder, base, weights, tuned = original
    record = (Path(__file__).parents[1] / "records" / "old" / "train" / "run.json").read_text()
    results: Counter = Counter()
    slowest, longest = 0.0, 0
    target = tmp_path / "a"

    def through_peft_in_one_line():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {n: p.detach().bfloat16() for n, p in masters(load_adapter(copy.deepcopy(base), target)).items()}

    ways = {
        "read": lambda: read_all(target, weights),
        "inspect": lambda: inspect_adapter(target) and None,
        "peft": through_peft_in_one_line,
    }
    for seed in range(first, first + count):
        rng = random.Random(seed)
        target.mkdir()
        sparse = rng.random() < 0.5
        for name in (CONFIG, WEIGHTS):
            (target / name).write_bytes(((folder if sparse else folder.parent / "dense") / name).read_bytes())
        (target / RUN).write_text(record)
        changed = rng.choice([CONFIG, CONFIG, RUN, WEIGHTS])
        (change_header if changed == WEIGHTS else change_json)(target / changed, rng)
        for way, enter in ways.items():
            start = time.perf_counter()
            try:
                with bounded_memory(2**30):
                    loaded = enter()
            except ValueError as error:
                message = str(error)
                assert message.isprintable() and 0 < len(message) < 500, (seed, changed, way, message[:1000])
                results[changed, way, "refused"] += 1
                longest = max(longest, len(message))
            else:
                results[changed, way, "loaded"] += 1
                assert loaded is None or loaded.keys() == tuned.keys(), (seed, changed, way)
                assert loaded is None or all(
                    torch.equal(loaded[n].bfloat16().view(torch.int16), tuned[n].view(torch.int16)) for n in tuned
                ), (seed, changed, way)
            took = time.perf_counter() - start
            assert took < 5, (seed, changed, way, took)
            slowest = max(slowest, took)
        remove(target)
    for (changed, way, result), number in sorted(results.items()):
        print(f"{changed:28} {way:8} {result:8} {number:6}")
    print(f"slowest: {slowest:.2f} s, longest message: {longest} characters")
    assert sum(results.values()) == len(ways) * count
    assert {key[0] for key in results} == {CONFIG, RUN, WEIGHTS} and {key[2] for key in results} == {
        "refused",
        "loaded",
    }


def test_structured_mutants_are_refused_in_one_line_or_load_exactly(tmp_path, original):
    structured(tmp_path, original, 30)


@pytest.mark.slow
def test_two_thousand_structured_mutants(tmp_path, original):
    structured(tmp_path, original, 2_000, first=50_000)
