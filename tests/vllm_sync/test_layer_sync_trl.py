"""`sync_trained_layer` under TRL's own trainers, in the process and with a server, and what it refuses."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from tuner.helpers import move, same, wrap

from models import build
from peft_onelayer.rl import sync_trained_layer
from vllm_sync.test_sync import Run

BF16 = torch.bfloat16


class LayerRun(Run):
    """A run whose pushes are compared with the policy at that moment."""

    def __init__(self, *args, backend="nccl", changed_only=True, checker=True, **options):
        serve = args[-1]
        super().__init__(*args[:-1], lambda path: serve(path, backend=backend, checker=checker), **options)
        self.generation.sync_weights = type(self.generation).sync_weights.__get__(self.generation)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* takes whole tensors only")
            self.layers = sync_trained_layer(self.trainer, changed_only=changed_only)
        self.sync = self.generation.sync_weights
        self.generation.sync_weights = self.checked_sync

    def checked_sync(self) -> None:
        expected = {name: p.detach() for name, p in self.merged().named_parameters()}
        self.sync()
        self.check(expected)

    def check(self, expected=None) -> None:
        expected = expected or {name: p.detach() for name, p in self.merged().named_parameters()}
        assert same(dict(self.engine.model.named_parameters()), expected)
        self.assert_base_untouched()

    @property
    def whys(self) -> list[str]:
        return [push.why for push in self.layers.pushes]


@pytest.fixture
def run(tmp_path, tokenizer, serve):
    return lambda **options: LayerRun(tmp_path, tokenizer, serve, **options)


CASES = [
    {"mode": "colocate", "dtype": BF16},
    {"mode": "server", "dtype": BF16, "backend": "sparse_nccl", "layer": [0, 3]},
]
MORE_TRANSFERS = [("nccl", True), ("sparse_nccl", False)]
MORE = [
    {"mode": "server", "dtype": BF16},
    {"mode": "colocate", "changed_only": False, "family": "gpt_oss"},
    {"mode": "server", "changed_only": False, "modules_to_save": ["lm_head"]},
    {"mode": "server", "backend": "sparse_nccl", "family": "qwen3_moe", "modules_to_save": ["lm_head"]},
    {"mode": "colocate", "name": "RLOO", "entrance": "peft_config", "beta": 0.05},
    {"mode": "server", "name": "SDPO"},
    {"mode": "server", "name": "Distillation", "dtype": BF16, "backend": "sparse_nccl"},
]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.more) for case in MORE)],
    ids=lambda case: "-".join(str(value) for value in case.values()),
)
def test_a_trainer_that_sends_the_trained_block(run, case):
    r = run(max_steps=3, learning_rate=1e-4, **case)
    r.train(3)
    assert r.whys == ["first", *["changes" if case.get("changed_only", True) else "block"] * 2]
    if "name" not in case and "dtype" not in case:
        difference = [e["sampling/sampling_logp_difference/max"] for e in r.trainer.state.log_history[:-1]]
        assert len(difference) == 3 and max(difference) < 1e-4


def test_the_layer_is_at_most_a_part_of_l_of_what_trl_sends(tmp_path, tokenizer, serve):
    trl = Run(tmp_path, tokenizer, serve, mode="server", dtype=BF16)
    trl.generation.sync_weights()
    everything = sum(t.nbytes for t in trl.engine.syncs[-1].values())
    ours = LayerRun(tmp_path, tokenizer, serve, mode="server", dtype=BF16, changed_only=False, vllm_group_port=51217)
    for _ in range(3):
        move(ours.model)
        ours.generation.sync_weights()
    block = sum(t.nbytes for n, t in trl.engine.syncs[-1].items() if "layers.1." in n)
    assert [push.nbytes for push in ours.layers.pushes] == [everything, block, block]
    assert 4 * block <= everything and ours.engine.syncs[-1].keys() < trl.names


def test_with_a_server_that_takes_entries_they_cross_the_wire(run):
    r = run(mode="server", dtype=BF16, backend="sparse_nccl")
    r.generation.sync_weights()
    move(r.model, scale=1e-5)
    r.generation.sync_weights()
    first, second = r.layers.pushes
    numel = sum(p.numel() for p in r.engine.model.parameters())
    assert (first.entries, first.nbytes, first.tensors) == (numel, 6 * numel, 0)
    assert 0 < second.entries == second.nbytes // 6 < numel / 20


@pytest.mark.parametrize("mode", [pytest.param("colocate", marks=pytest.mark.more), "server"])
def test_an_engine_that_was_started_anew_is_sent_everything_aloud(run, mode):
    r = run(mode=mode, dtype=BF16)
    r.generation.sync_weights()
    for _ in range(2):
        r.engine.model = AutoModelForCausalLM.from_pretrained(r.checkpoint, dtype="auto").eval()
        move(r.model, scale=1e-5)
        with pytest.warns(UserWarning, match=r"push \d: the digests of \d+ tensors of the .* everything is sent again"):
            r.generation.sync_weights()
    assert r.whys == ["first", "changes", "digest", "changes", "digest"]


def test_a_server_started_anew_with_other_weights_is_found_outside_of_the_block_too(run):
    r = run(mode="server", dtype=BF16)
    r.generation.sync_weights()
    move(r.model)  # every tensor of the block is sent whole
    r.engine.model.model.norm.weight.data += 1
    with pytest.warns(UserWarning, match=r"the digests of 1 tensors of .* \(first: model.norm.weight\)"):
        r.generation.sync_weights()
    assert r.whys == ["first", "changes", "digest"]


def test_a_tensor_beside_the_block_that_was_lost_in_the_first_push_is_sent_again(run):
    r = run(mode="server", dtype=BF16)
    r.engine.model.model.norm.weight.data += 1
    faults = iter(["drop"] * 100)
    r.engine.fault = lambda: next(faults) if len(r.layers.pushes) == 0 else ""
    with pytest.warns(UserWarning, match=r"push 1: the digests of \d+ tensors"):
        r.generation.sync_weights()
    assert r.whys == ["first", "digest"]


def test_a_form_of_the_engines_own_beside_the_block_is_accepted_aloud_and_watched(run):
    """vLLM pads embeddings, for instance: their digest never is the policy's."""
    r = run(mode="server", dtype=BF16)
    named, own = r.engine.named_parameters, torch.zeros(3)
    name = "model.embed_tokens.weight"
    r.engine.named_parameters = lambda: [(n, own if n == name else p) for n, p in named()]
    with pytest.warns(UserWarning, match=rf"has 1 tensors that adapters do not change, first {name}, in a form of its"):
        r.generation.sync_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        r.generation.sync_weights()
    own += 1
    with pytest.warns(UserWarning, match=rf"push 4: the digests of 1 tensors .*first: {name}"):
        r.generation.sync_weights()
    assert r.whys == ["first", "digest", "changes", "changes", "digest"]


def test_another_engine_in_the_process_is_sent_everything(run):
    r = run(dtype=BF16)
    r.generation.sync_weights()
    r.generation.llm = type(r.generation.llm)(r.checkpoint)
    r.generation.sync_weights()
    assert r.whys == ["first", "restart"]


@pytest.mark.more
def test_after_sleep_at_level_2_everything_is_sent(run):
    r = run(vllm_enable_sleep_mode=True, gradient_accumulation_steps=2, steps_per_generation=1)
    r.train(syncs=4)
    assert r.whys == ["first", *["sleep"] * 3]
    assert all(p.isnan().all() for p in r.engine.model.parameters())


@pytest.mark.parametrize("mode", [pytest.param("colocate", marks=pytest.mark.more), "server"])
def test_after_a_push_that_failed_everything_is_sent(run, mode):
    r = run(mode=mode, dtype=BF16)
    r.generation.sync_weights()
    move(r.model)
    if mode == "server":
        r.generation.vllm_client.communicator.fail = True
    else:
        r.engine.fail_at = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=r"connection was lost|out of memory"):
        r.generation.sync_weights()
    r.engine.arrived, r.engine.fail_at = {}, None
    if mode == "server":
        r.generation.vllm_client.communicator.fail = False
    r.generation.sync_weights()
    assert r.whys == ["first", "error"]


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_what_cannot_be_synced_is_refused_in_one_line(run, monkeypatch):
    r = run()
    with pytest.raises(ValueError, match="was called for this trainer before") as error:
        r.generation.sync_weights = r.sync
        sync_trained_layer(r.trainer)
    one_line(error)
    r.generation.sync_weights = type(r.generation).sync_weights.__get__(r.generation)
    monkeypatch.setattr(r.generation, "tensor_parallel_size", 2)
    with pytest.raises(ValueError, match="vllm_tensor_parallel_size=2 shares each tensor") as error:
        sync_trained_layer(r.trainer)
    one_line(error)
    monkeypatch.setattr(r.trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="FSDP or DeepSpeed ZeRO-3 leaves each process a part") as error:
        sync_trained_layer(r.trainer)
    one_line(error)
    monkeypatch.undo()
    r.generation.model = r.generation.model.get_base_model()
    with pytest.raises(ValueError, match="a Qwen3ForCausalLM, is not wrapped with SingleLayerConfig") as error:
        sync_trained_layer(r.trainer)
    one_line(error)
    r.trainer.vllm_generation = None
    with pytest.raises(ValueError, match="this GRPOTrainer has no sync to take over: it needs use_vllm=True") as error:
        sync_trained_layer(r.trainer)
    one_line(error)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"checker": False}, r"does not tell the digests of its weights \(POST /weight_checker: .*no endpoint"),
        ({"backend": "ipc"}, "has the weight-transfer backend 'ipc'; start it with --weight-transfer-config"),
    ],
    ids=["no digests", "backend"],
)
def test_servers_that_cannot_be_synced_with_are_refused_in_one_line(run, options, says):
    with pytest.raises(ValueError, match=says) as error:
        run(mode="server", **options)
    one_line(error)


def test_a_server_that_takes_whole_tensors_only_is_named(tmp_path, tokenizer, serve):
    r = Run(tmp_path, tokenizer, serve, mode="server")
    with pytest.warns(UserWarning, match=r"the vLLM server at http://\S+ takes whole tensors only, so every tensor"):
        sync_trained_layer(r.trainer)


def test_an_engine_without_the_blocks_tensors_is_refused_in_one_line(tmp_path, tokenizer, serve):
    r = Run(tmp_path, tokenizer, serve)
    r.engine.named_parameters = lambda: [("language_model.norm.weight", torch.zeros(1))]
    with pytest.raises(
        ValueError, match=r"has no parameter model\.layers\.1\.\S+, alone or fused with others"
    ) as error:
        sync_trained_layer(r.trainer)
    one_line(error)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize(
    ("backend", "masked"),
    [("nccl", False), ("sparse_nccl", True), *(pytest.param(*p, marks=pytest.mark.more) for p in MORE_TRANSFERS)],
)
def test_async_grpo_sends_the_trained_block(tmp_path, tokenizer, serve, monkeypatch, backend, masked):
    """TRL's own transfer and its calls, as `AsyncGRPOTrainer._sync_weight_merged` makes them, without the trainer."""
    from trl.experimental.async_grpo import async_grpo_trainer, weight_transfer
    from trl.experimental.async_grpo.vllm_client import VLLMClient

    monkeypatch.setattr(weight_transfer, "get_open_port", lambda: 51300)
    base = build(dtype=BF16)
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    served = serve(str(tmp_path / "model"), backend=backend)
    for parameter in served.engine.model.parameters():
        parameter.data.normal_()
    mask = None
    if masked:
        save_file({"model.layers.2.mlp.up_proj.weight": torch.rand(48, 32) < 0.1}, tmp_path / "mask.safetensors")
        mask = str(tmp_path / "mask.safetensors")
    model = wrap(base, mask=mask)
    rows = [(n, str(p.dtype)[6:], list(p.shape)) for n, p in async_grpo_trainer._iter_vllm_named_params(model)]
    info = dict(zip(("names", "dtype_names", "shapes"), map(list, zip(*rows, strict=True)), strict=True))
    accelerator = SimpleNamespace(
        unwrap_model=lambda model: model,
        state=SimpleNamespace(deepspeed_plugin=None),
        is_main_process=True,
        wait_for_everyone=lambda: None,
        device=torch.device("cpu"),
    )
    trainer = SimpleNamespace(
        model=model,
        accelerator=accelerator,
        is_fsdp_enabled=False,
        weight_transfer=weight_transfer.WeightTransferClient(VLLMClient(served.url), info),
        rollout_worker=None,
        model_version=0,
    )
    trainer._streaming_iter = lambda: async_grpo_trainer.AsyncGRPOTrainer._streaming_iter(trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* takes whole tensors only")
        sync = sync_trained_layer(trainer)
    trainer.weight_transfer.init_weight_transfer()
    for step in range(3):
        if step:
            move(model, seed=step, scale=1e-3)
        async_grpo_trainer.AsyncGRPOTrainer._sync_weight_merged(trainer, 0.0)
        expected = {n: p.detach() for n, p in copy.deepcopy(model).merge_and_unload().named_parameters()}
        assert same(dict(served.engine.model.named_parameters()), expected)
    assert [push.why for push in sync.pushes] == ["first", "changes", "changes"] and trainer.model_version == 3
    assert bool(sync.pushes[-1].entries) == (backend == "sparse_nccl")
    assert [push.tensors <= (1 if masked else 11) for push in sync.pushes] == [backend == "sparse_nccl", True, True]
    trainer.weight_transfer.destroy()
    assert trainer.weight_transfer.transfer.model_update_group is None
