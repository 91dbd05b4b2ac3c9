"""Hidden states on disk: later epochs and runs of an offline trainer start above the frozen blocks."""

import errno
import os
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils

from models import build
from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import packed_prompts, shared_prefix
from peft_onelayer.rl.state_cache import StateCache
from peft_onelayer.tuner.pass_inputs import PassInputs
from peft_onelayer.tuner.prefix import HiddenStates

PAIRS = [
    {"prompt": f"{c}bcdefgh", "chosen": "ab" * (1 + i % 3), "rejected": "ba"[: 1 + i % 2]}
    for i, c in enumerate("klmnop")
]


@pytest.fixture
def dpo(tokenizer, tmp_path):
    def run(cache=None, *, packs=False, seed=0, layer=2, rows=1, epochs=3, dtype=torch.float32, most=10**9):
        """Three epochs: the trained weights, and what shared the prefix."""
        settings = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
        trainer = DPOTrainer(
            build(seed=seed, dtype=dtype),
            args=DPOConfig(
                str(tmp_path / "out"),
                num_train_epochs=epochs,
                per_device_train_batch_size=rows,
                learning_rate=1e-3,
                **settings,
            ),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer,
            peft_config=SingleLayerConfig(layer=layer, task_type="CAUSAL_LM"),
        )
        prefix = shared_prefix(trainer) if cache is None else shared_prefix(trainer, tmp_path / cache, most)
        if packs:
            packed_prompts(trainer)
        trainer.train()
        return {n: p.detach() for n, p in trainer.model.named_parameters() if ".default." in n}, prefix

    return run


def same(a, b):
    assert a.keys() == b.keys() and a
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("packs", [pytest.param(False, marks=pytest.mark.more), True])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.more)])
def test_later_epochs_and_runs_start_above_the_frozen_blocks_with_the_same_weights(dpo, packs, dtype):
    plain, without = dpo(packs=packs, dtype=dtype)
    found, first = dpo("cache", packs=packs, dtype=dtype)
    again, second = dpo("cache", packs=packs, dtype=dtype)
    assert same(plain, found) and same(plain, again)
    packs = packs and hasattr(utils, "add_fused_lm_head")
    each = 6 if packs else 12  # rows of an epoch
    assert first.cache.kept == each and first.cache.found == 2 * each
    assert second.cache.kept == 0 and second.cache.found == 3 * each
    assert first.whole == without.whole - 12 and second.whole == 1  # the one that is compared
    assert first.off is second.off is None


@pytest.mark.more
def test_rows_are_found_in_batches_that_are_padded_otherwise(dpo):
    plain, _ = dpo(rows=4)
    found, prefix = dpo("cache", rows=4)
    assert prefix.cache.kept == 12 and prefix.cache.found >= 12
    assert all(torch.allclose(plain[name], found[name], atol=1e-5) for name in plain)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        pytest.param({"layer": 3}, marks=pytest.mark.more),
        pytest.param({"dtype": torch.bfloat16}, marks=pytest.mark.more),
    ],
    ids=str,
)
def test_another_base_another_block_or_dtype_finds_nothing(dpo, other):
    plain, _ = dpo(epochs=1, **other)
    dpo("cache", epochs=1)
    found, prefix = dpo("cache", epochs=1, **other)
    assert prefix.cache.kept == 12 and prefix.cache.found == 0 and same(plain, found)


def test_a_file_that_is_none_is_written_again(dpo, tmp_path):
    plain, _ = dpo("cache", epochs=1)
    files = sorted((tmp_path / "cache").glob("*/*.safetensors"))
    files[0].write_bytes(b"no tensors")
    files[1].write_bytes(files[1].read_bytes()[:-5])
    with pytest.warns(UserWarning, match="holds no hidden states; it is written again"):
        found, prefix = dpo("cache", epochs=1)
    assert same(plain, found) and prefix.cache.kept == 2
    assert sorted((tmp_path / "cache").glob("*/*")) == files
    assert prefix.cache.size == sum(file.stat().st_size for file in files)


def test_a_full_disk_ends_keeping_and_not_training(dpo, monkeypatch, tmp_path):
    plain, _ = dpo(epochs=1)
    written, own = [], Path.write_bytes

    def write_bytes(path, content):
        own(path, content[:9] if len(written) == 3 else content)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.warns(UserWarning, match=r"no more are kept \(.*No space left on device") as warned:
        found, prefix = dpo("cache", epochs=1)
    assert sum("no more are kept" in str(one.message) for one in warned) == 1
    assert same(plain, found) and prefix.cache.kept == 3
    assert len([*(tmp_path / "cache").glob("*/*"), *(tmp_path / "cache").glob("*/.*")]) == 3


def test_it_holds_no_more_than_it_may(dpo, tmp_path):
    plain, _ = dpo(epochs=1)
    with pytest.warns(UserWarning, match=r"and no more are kept \(the bound is 9,000 bytes\)"):
        found, prefix = dpo("cache", epochs=1, most=9000)
    held = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*/*"))
    assert same(plain, found) and 0 < prefix.cache.kept < 12 and held == prefix.cache.size <= 9000
    assert StateCache(tmp_path / "cache", 9000).size == held


@pytest.mark.parametrize("room", [-1, 0])
def test_the_bound_counts_whole_files(tmp_path, room):
    ids = torch.arange(5)[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = PassInputs(given, (b"",), (), ())
    states = HiddenStates(nn.ModuleList(), 1, torch.ones(1, 5, 8), (False,))
    first = StateCache(tmp_path / "first", 10**6)
    first.write(inputs, states, tmp_path / "first" / "base")
    bounded = StateCache(tmp_path / "bounded", first.size + room)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bounded.write(inputs, states, tmp_path / "bounded" / "base")
    files = list((tmp_path / "bounded").glob("*/*.safetensors"))
    assert bounded.full == (room < 0) and len(files) == 1 + room
    assert StateCache(tmp_path / "bounded", 0).size == bounded.size <= bounded.most_bytes
