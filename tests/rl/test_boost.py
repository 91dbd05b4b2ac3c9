"""Boosted blocks: their own rate in every group, through schedules, checkpoints and any trainer."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from models import build, token_batch
from peft_onelayer.rl.boost import BOOST, boosted, parse_boost


def data(rows=24):
    return Dataset.from_list([{"input_ids": t.tolist(), "labels": t.tolist()} for t in token_batch(rows)])


def trainer(folder, steps=4, **config):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **config,
    )
    return boosted(Trainer, [1, 3], 2.0)(build(), arguments, train_dataset=data())


def rates(each):
    """The learning rate of each parameter, by name."""
    of = {id(p): group["lr"] for group in each.optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in each.model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor"])
def test_the_blocks_train_at_their_rate_and_the_rest_at_its_own(tmp_path, optimizer):
    each = trainer(tmp_path, optim=optimizer, lr_scheduler_type="constant", weight_decay=0.1)
    each.create_optimizer()
    found = rates(each)
    assert found.keys() == dict(each.model.named_parameters()).keys()
    for name, rate in found.items():
        assert rate == (2e-3 if name.startswith(("model.layers.1.", "model.layers.3.")) else 1e-3), name
    kept = {id(p): group["weight_decay"] for group in each.optimizer.param_groups for p in group["params"]}
    plain = Trainer(build(), each.args, train_dataset=data())
    plain.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in plain.optimizer.param_groups for p in group["params"]}
    names = dict(plain.model.named_parameters())
    assert all(kept[id(p)] == decay[id(names[n])] for n, p in each.model.named_parameters())
    each.create_optimizer()
    assert rates(each) == found


def test_one_step_of_sgd_is_twice_as_far(tmp_path):
    start, moved = dict(build().named_parameters()), []
    for factor in (1.0, 2.0):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(factor)),
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        each = boosted(Trainer, [2], factor)(build(), arguments, train_dataset=data())
        each.train()
        moved.append({n: p.detach() - start[n] for n, p in each.model.named_parameters()})
    for name in start:
        scale = 2.0 if name.startswith("model.layers.2.") else 1.0
        assert torch.allclose(moved[1][name], scale * moved[0][name], atol=1e-6), name


def test_the_schedule_scales_both_and_a_checkpoint_keeps_them(tmp_path):
    whole = trainer(tmp_path / "whole", lr_scheduler_type="linear")
    whole.train()
    seen = {group[BOOST]: group["initial_lr"] for group in whole.optimizer.param_groups}
    assert seen == {1.0: 1e-3, 2.0: 2e-3}
    resumed = trainer(tmp_path / "whole", lr_scheduler_type="linear")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert {group[BOOST]: group["initial_lr"] for group in resumed.optimizer.param_groups} == seen
    after = dict(resumed.model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in whole.model.named_parameters())


@pytest.mark.parametrize("text", ["8-13", "8-13:", ":2", "8:zero", "8:0", "8:-1", "8:inf", "8:nan"])
def test_another_form_is_refused(text):
    with pytest.raises(ValueError, match="is not BLOCKS:FACTOR"):
        parse_boost(text)


def test_blocks_of_a_ranking(tmp_path):
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps({"num_layers": 4, "order": [3, 1, 0, 2]}))
    assert parse_boost(f"top-2@{path}:1.5") == (f"top-2@{path}", 1.5)
    with pytest.raises(ValueError, match="ranks 4"):
        parse_boost(f"top-9@{path}:2")
