"""Sync of the trained block alone: what is sent, and that the engine has the policy's weights bit for bit after it."""

import copy
import random
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from tuner.helpers import masters, move, same, wrap

from models import build, build_architecture
from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import layer_sync
from peft_onelayer.rl.engines import InProcess
from peft_onelayer.rl.layer_sync import LayerSync, Push
from peft_onelayer.rl.policy_weights import FUSED
from vllm_sync.engine import LLM, Engine

BF16 = torch.bfloat16
BOTH, ENTRIES, TENSORS = ("tensors", "entries"), ("entries",), ("tensors",)  # what an engine takes


def plain(model) -> dict[str, torch.Tensor]:
    """Copies of the weights of the model that the policy stands for."""
    merged = copy.deepcopy(model).merge_and_unload()
    return {name: p.detach().clone() for name, p in merged.named_parameters()}


class Pair:
    """A policy and an engine that has been pushed to once."""

    def __init__(self, model, dtype=None, changed_only=True, takes=("tensors", "entries"), engine=Engine):
        self.model = model
        served = copy.deepcopy(model).merge_and_unload()
        for parameter in served.parameters():
            parameter.data.normal_()  # only a push can make it right
        self.engine = engine(served.to(dtype or served.dtype))
        channel = InProcess(LLM(self.engine))
        channel.takes_tensors, channel.takes_entries = "tensors" in takes, "entries" in takes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* takes whole tensors only")
            self.sync = LayerSync(model, channel, changed_only)
        self.push()

    def push(self, why: str | None = None) -> Push:
        """Push once, without a repair; returns what was sent."""
        before = len(self.sync.pushes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.sync.push()
        self.check()
        assert len(self.sync.pushes) == before + 1
        assert why in (None, self.sync.pushes[-1].why)
        return self.sync.pushes[-1]

    def check(self) -> None:
        """The engine has the policy's weights, in its dtype, bit for bit."""
        expected, held = plain(self.model), dict(self.engine.model.named_parameters())
        assert same(held, {name: tensor.to(held[name].dtype) for name, tensor in expected.items()})

    def changes(self, act) -> tuple[int, int]:
        """In how many entries, and in how many tensors, the policy's weights differ in the engine's dtype after it."""
        held = dict(self.engine.model.named_parameters())
        before = {name: tensor.to(held[name].dtype) for name, tensor in plain(self.model).items()}
        act()
        after = {name: tensor.to(held[name].dtype) for name, tensor in plain(self.model).items()}
        counts = [int((before[n] != after[n]).sum()) for n in after]
        return sum(counts), sum(map(bool, counts))


def nudge(model, adapter="default", seed=0, scale=1e-5) -> None:
    """A step that changes some of the entries in bfloat16, and some tensors in no entry."""
    generator = torch.Generator().manual_seed(seed)
    for number, parameter in enumerate(masters(model, adapter).values()):
        if number % 3:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def block_bytes(model, index, itemsize=2) -> int:
    return itemsize * sum(t.numel() for n, t in plain(model).items() if f"layers.{index}." in n)


def test_first_everything_then_what_has_changed():
    pair = Pair(wrap(build(dtype=BF16)))
    everything = plain(pair.model)
    size = sum(t.nbytes for t in everything.values())
    assert pair.sync.pushes == [Push("first", size, len(everything), 0)]
    entries, _ = pair.changes(lambda: nudge(pair.model))
    assert 0 < 6 * entries < block_bytes(pair.model, 2)
    assert pair.push() == Push("changes", entries * (4 + 2), 0, entries)
    assert pair.push() == Push("changes", 0, 0, 0)


def test_without_changed_only_the_block_is_sent_which_is_less_than_a_part_of_l():
    model = wrap(build(dtype=BF16))
    pair = Pair(model, changed_only=False)
    for seed in range(2):
        nudge(model, seed=seed)
        push = pair.push("block")
        assert (push.nbytes, push.tensors, push.entries) == (block_bytes(model, 2), 11, 0)
        assert push.nbytes * 4 <= pair.sync.pushes[0].nbytes  # what TRL sends, with 4 blocks


def test_what_rounds_to_the_same_is_not_sent():
    model = wrap(build(dtype=BF16))
    pair = Pair(model)
    for parameter in masters(model).values():
        parameter.data *= 1 + 1e-6
    assert {p.dtype for p in masters(model).values()} == {torch.float32}
    assert pair.push() == Push("changes", 0, 0, 0)


@pytest.mark.parametrize("takes", [ENTRIES, TENSORS, pytest.param(BOTH, marks=pytest.mark.more)], ids="-".join)
def test_a_float32_base_and_an_engine_in_bfloat16(takes):
    model = wrap(build())
    pair = Pair(model, dtype=BF16, takes=takes)
    numel = sum(t.numel() for t in plain(model).values())
    assert pair.sync.pushes[0].nbytes == numel * (2 if "tensors" in takes else 6)
    entries, tensors = pair.changes(lambda: nudge(model))
    push = pair.push("changes")
    if "entries" in takes:
        assert (push.nbytes, push.entries) == (6 * entries, entries)
    else:
        assert (push.tensors, push.entries) == (tensors, 0) and tensors < 11


def test_a_whole_tensor_is_sent_where_it_is_smaller():
    model = wrap(build(dtype=BF16))
    pair = Pair(model)
    pair.changes(lambda: move(model))
    push = pair.push("changes")
    assert push.tensors > 0 and push.nbytes <= block_bytes(model, 2)


def test_the_sign_of_a_zero_is_a_change():
    model = wrap(build(dtype=BF16))
    weight = masters(model)["model.layers.2.input_layernorm.weight"]
    weight.data[:2] = 0.0
    pair = Pair(model)
    weight.data[0] = -0.0
    assert pair.push().entries == 1
    held = dict(pair.engine.model.named_parameters())["model.layers.2.input_layernorm.weight"]
    assert held[:2].signbit().tolist() == [True, False]


@pytest.mark.parametrize(
    ("takes", "changed_only"),
    [
        (ENTRIES, True),
        (BOTH, False),
        *(pytest.param(t, c, marks=pytest.mark.more) for t, c in ((BOTH, True), (TENSORS, True), (ENTRIES, False))),
    ],
)
def test_several_blocks_and_modules_to_save(takes, changed_only):
    model = wrap(build(dtype=BF16), layer=[0, 3], modules_to_save=["lm_head"])
    pair = Pair(model, takes=takes, changed_only=changed_only)

    def step():
        nudge(model)
        model.base_model.model.lm_head.modules_to_save["default"].weight.data[:3] += 0.25

    entries, tensors = pair.changes(step)
    push = pair.push("changes" if changed_only else "block")
    if changed_only:
        assert push.entries == (entries if "entries" in takes else 0)
        assert push.tensors == (0 if "entries" in takes else tensors)
    else:
        size = block_bytes(model, 0) + block_bytes(model, 3) + plain(model)["lm_head.weight"].nbytes
        assert push.nbytes == (size if "tensors" in takes else 3 * size)


def test_tied_embeddings_have_one_name():
    model = wrap(build(dtype=BF16, tie_word_embeddings=True))
    pair = Pair(model)
    assert pair.sync.pushes[0].tensors == len(plain(model))
    assert "lm_head.weight" not in plain(model)
    nudge(model)
    pair.push("changes")


def test_positions_beyond_int32_are_refused_or_sent_in_whole_tensors(monkeypatch):
    model = wrap(build(dtype=BF16))
    pair = Pair(model)
    monkeypatch.setattr(layer_sync, "POSITIONS", 32 * 32 - 1)  # what is smaller: k, v, and the norms
    nudge(model)
    push = pair.push("changes")
    assert push.entries and push.tensors
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight has more entries than vLLM's backend sparse_nccl"
    ):
        Pair(model, takes=ENTRIES)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens"])
def test_an_engine_that_ties_a_head_which_is_apart_is_refused(trained):
    model = wrap(build(dtype=BF16, tie_word_embeddings=True), modules_to_save=[trained])
    served = Engine(build(dtype=BF16, tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"has no parameter lm_head\.weight: it ties the head to .* modules_to_save"):
        LayerSync(model, InProcess(LLM(served)), True)


@pytest.mark.parametrize(
    ("family", "takes"),
    [
        ("qwen3_moe", ENTRIES),
        ("phi3", TENSORS),
        *(pytest.param(f, ENTRIES, marks=pytest.mark.more) for f in ("gpt_oss", "phi3", "gemma3_text")),
        *(pytest.param(f, TENSORS, marks=pytest.mark.more) for f in ("gpt_oss", "qwen3_moe", "gemma3_text")),
    ],
)
def test_experts_and_fused_tensors_of_the_checkpoint(family, takes):
    model = wrap(build_architecture(family, dtype=BF16), layer=1)
    pair = Pair(model, takes=takes)
    entries, _ = pair.changes(lambda: nudge(model))
    assert pair.push("changes").entries == (entries if "entries" in takes else 0)


class FusedEngine(Engine):
    """Holds q, k and v as one tensor, and gate and up, as vLLM does; it is sent what a checkpoint has."""

    def __init__(self, model):
        super().__init__(model)
        own, self.held = dict(model.named_parameters()), {}
        later = [f".{part}." for parts in FUSED.values() for part in parts[1:]]
        for name in own:
            fused, parts = next(((f, p) for f, p in FUSED.items() if f".{p[0]}." in name), (None, None))
            if parts:
                names = [name.replace(parts[0], part) for part in parts]
                whole = torch.cat([own[n].data for n in names])
                self.held[name.replace(parts[0], fused)] = nn.Parameter(whole)
                for n, view in zip(names, whole.split([len(own[n]) for n in names]), strict=True):
                    own[n].data = view
            elif not any(part in name for part in later):
                self.held[name] = own[name]

    def named_parameters(self):
        super().named_parameters()
        return self.held.items()


@pytest.mark.parametrize("takes", [pytest.param(TENSORS, marks=pytest.mark.more), ENTRIES], ids="-".join)
def test_an_engine_that_fuses_tensors(takes):
    """The digest of what it holds as one covers tensors that do not train, too."""
    model = wrap(build("Qwen2", dtype=BF16), target_modules=["q_proj", "up_proj"])
    pair = Pair(model, takes=takes, engine=FusedEngine)
    assert "model.layers.2.self_attn.qkv_proj.bias" in pair.engine.held and len(masters(model)) == 3
    for seed in range(2):
        nudge(model, seed=seed)
        pair.push("changes")
    pair.engine.held["model.layers.2.self_attn.qkv_proj.weight"].data[-1, -1] += 1  # of v
    with pytest.warns(
        UserWarning, match=r"push 4: the digests of 1 tensors .* \(first: .*2.self_attn.qkv_proj.weight\)"
    ):
        pair.sync.push()
    pair.check()


def masked(tmp_path, share, layer=2, seed=0):
    """A model whose mask trains `share` of the entries of its matrices in the block."""
    model = build(dtype=BF16)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.rand(p.shape, generator=generator) < share
        for name, p in model.named_parameters()
        if f"layers.{layer}." in name and p.ndim == 2
    }
    save_file(tensors, tmp_path / "mask.safetensors")
    return wrap(model, layer=layer, mask=str(tmp_path / "mask.safetensors")), tensors


@pytest.mark.parametrize(
    ("takes", "changed_only"),
    [
        (ENTRIES, True),
        (BOTH, False),
        *(pytest.param(t, c, marks=pytest.mark.more) for t, c in ((BOTH, True), (TENSORS, True), (ENTRIES, False))),
    ],
)
def test_under_a_mask_its_entries_are_sent(tmp_path, takes, changed_only):
    model, mask = masked(tmp_path, 0.2)
    pair = Pair(model, takes=takes, changed_only=changed_only)
    entries, tensors = pair.changes(lambda: nudge(model, scale=3e-3))
    push = pair.push()
    if "entries" in takes:
        count = entries if changed_only else sum(int(m.sum()) for m in mask.values())
        assert (push.entries, push.nbytes, push.tensors) == (count, 6 * count, 0)
    else:
        assert push.tensors == (tensors if changed_only else len(mask))


@pytest.mark.parametrize("changed_only", [True, pytest.param(False, marks=pytest.mark.more)])
def test_after_a_switch_of_adapters_the_blocks_are_sent_whole(tmp_path, changed_only):
    model = wrap(build(dtype=BF16), layer=1)
    model.add_adapter("other", SingleLayerConfig(layer=[2, 3], modules_to_save=["lm_head"]))
    move(model), move(model, "other")
    pair = Pair(model, changed_only=changed_only)
    size = sum(block_bytes(model, k) for k in (1, 2, 3)) + plain(model)["lm_head.weight"].nbytes
    for name in ("other", "default"):
        model.set_adapter(name)
        push = pair.push("adapters")
        assert (push.nbytes, push.entries) == (size, 0)
        nudge(model, name)
        pair.push("changes" if changed_only else "block")
    model.base_model.set_adapter(["default", "other"])  # the sum of both
    pair.push("adapters")


def test_a_merged_adapter_is_the_same_policy():
    model = wrap(build(dtype=BF16))
    pair = Pair(model)
    nudge(model)
    expected = plain(model)
    model.merge_adapter()  # as TRL does for AsyncGRPO
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.sync.push()
    model.unmerge_adapter()
    assert same(dict(pair.engine.model.named_parameters()), expected)
    assert [push.why for push in pair.sync.pushes] == ["first", "changes"]


@pytest.mark.parametrize(
    "takes",
    [("entries",), *(pytest.param(t, marks=pytest.mark.more) for t in (("tensors",), ("tensors", "entries")))],
    ids="-".join,
)
def test_200_steps_with_dropped_repeated_and_late_pushes(takes):
    """A late tensor comes behind a newer one; repeated, it comes in time and again, late."""
    model = wrap(build(dtype=BF16, num_layers=2), layer=1)
    pair = Pair(model, takes=takes)
    base, held = plain(model), dict(pair.engine.model.named_parameters())
    chance, happened, repaired = random.Random(0), [], 0

    def fault():
        happened.append(chance.choices(["", "drop", "repeat", "late"], [40, 1, 1, 1])[0])
        return happened[-1]

    pair.engine.fault = fault
    for step in range(200):
        nudge(model, seed=step)
        for _ in range(20):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    pair.sync.push()
                    break
                except RuntimeError as error:  # the repair met with a fault, too: said aloud, and tried again
                    assert "though everything was sent twice" in str(error)
        assert bool(caught) == (pair.sync.pushes[-1].why == "digest")
        repaired += bool(caught)
        assert same(held, base | {name: master.detach().to(BF16) for name, master in masters(model).items()})
    assert min(happened.count(kind) for kind in ("drop", "repeat", "late")) >= 20
    assert 20 <= repaired < 150
    pair.check()


def test_an_engine_that_never_holds_the_policys_weights_is_an_error():
    model = wrap(build(dtype=BF16))
    pair = Pair(model)
    pair.engine.fault = lambda: "drop"
    nudge(model)
    with (
        pytest.warns(UserWarning, match="everything is sent again"),
        pytest.raises(RuntimeError, match=r"other weights than the policy, though everything was sent twice") as error,
    ):
        pair.sync.push()
    assert "\n" not in str(error.value)
    assert [push.why for push in pair.sync.pushes] == ["first", "changes", "digest", "digest"]
    pair.engine.fault = None
    pair.push("error")
