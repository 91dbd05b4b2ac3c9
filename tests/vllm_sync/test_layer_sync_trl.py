"""`sync_trained_layer` under TRL's own trainers, in the process and with a server, and what it refuses."""

import warnings

import pytest
import torch
from tuner.helpers import move, same

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
    {"mode": "server", "dtype": BF16},
    {"mode": "server", "dtype": BF16, "backend": "sparse_nccl", "layer": [0, 3]},
]
MORE = [
    {"mode": "colocate", "changed_only": False, "family": "gpt_oss"},
    {"mode": "server", "changed_only": False, "modules_to_save": ["lm_head"]},
    {"mode": "server", "backend": "sparse_nccl", "family": "gemma3_text", "modules_to_save": ["lm_head"]},
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
