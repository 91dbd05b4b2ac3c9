"""The adapter that follows the policy: TRL's own formula, and where a run with it starts."""

import re
import textwrap
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainerState
from trl import DPOConfig, DPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl_cells import DATA, sdft, sdpo
from trl_runner import COMMON
from trl_table import PAGE
from tuner.helpers import masters, move, same, wrap

from models import build
from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import EMAAdapterCallback, EMATeacherMixin


def copies(model, adapter="default"):
    return {name: p.detach().clone() for name, p in masters(model, adapter).items()}


class Snapshots(EMAAdapterCallback):
    """Keeps what the policy was after each step."""

    def on_train_begin(self, *args, model, **kwargs):
        super().on_train_begin(*args, model=model, **kwargs)
        self.policies = [copies(model)]

    def on_step_end(self, *args, model, **kwargs):
        super().on_step_end(*args, model=model, **kwargs)
        self.policies.append(copies(model))


def dpo(tmp_path, tokenizer, model, callback, **options):
    arguments = DPOConfig(**{**COMMON, "output_dir": str(tmp_path), "max_steps": 3, **options})
    data = Dataset.from_dict(DATA["preference"])
    return DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback])


@pytest.mark.parametrize(("every", "updates"), [pytest.param(1, [1, 2, 3], marks=pytest.mark.more), (2, [2])])
def test_the_reference_moves_by_trls_formula(tmp_path, chat_tokenizer, every, updates):
    model = wrap(build(num_layers=3), layer=1, task_type="CAUSAL_LM")
    start = move(model)
    callback = Snapshots(rate=0.25, every=every)
    dpo(tmp_path, chat_tokenizer, model, callback).train()
    expected = {name: weight.clone() for name, weight in start.items()}
    for step in updates:
        for name, weight in expected.items():
            policy, reference = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
            policy.weight.data, reference.weight.data = callback.policies[step][name], weight
            SyncRefModelCallback._sync_target_model(policy, reference, 0.25)
    assert same(copies(model, "ref"), expected) and not same(expected, start)
    assert not any(p.requires_grad for p in masters(model, "ref").values())


def test_a_reference_that_is_the_base_does_not_move(tmp_path, chat_tokenizer):
    model = wrap(build(num_layers=3), layer=1, task_type="CAUSAL_LM")
    trainer = dpo(tmp_path, chat_tokenizer, model, EMAAdapterCallback("reference"))
    with pytest.raises(ValueError, match="no adapter named reference, only default, ref"):
        trainer.train()


@pytest.mark.parametrize("cell", [sdpo, pytest.param(sdft, marks=pytest.mark.more)], ids=["SDPO", "SDFT"])
def test_an_ema_teacher_starts_as_the_student(tmp_path, chat_tokenizer, cell):
    """At the first step the student is its own teacher: the loss is that of `teacher_model_kind="live"`, then not."""
    losses = {}
    for kind in ("live", "ema"):
        made = cell(teacher_model_kind=kind)
        model = wrap(build(num_layers=3), layer=1, task_type="CAUSAL_LM")
        start = move(model)
        trainer = type("Trainer", (EMATeacherMixin, made.trainer), {})(
            model=model,
            args=made.config(**{**COMMON, **made.options, "output_dir": str(tmp_path)}),
            train_dataset=Dataset.from_dict(DATA[made.data]),
            processing_class=chat_tokenizer,
            **made.extra(),
        )
        assert ("teacher" in model.peft_config) == (kind == "ema")
        if kind == "ema":
            assert same(copies(model, "teacher"), start)
        trainer.train()
        losses[kind] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["live"][0] == losses["ema"][0] and losses["live"][1] != losses["ema"][1]


@pytest.mark.more
def test_a_moving_reference_survives_a_resumed_run(tmp_path, chat_tokenizer):
    def run(folder, resume=None):
        model = wrap(build(num_layers=3, dtype=torch.bfloat16), layer=1, task_type="CAUSAL_LM")
        move(model)
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = dpo(folder, chat_tokenizer, model, EMAAdapterCallback(rate=0.5, every=1), **options)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert same(copies(resumed), copies(whole)) and same(copies(resumed, "ref"), copies(whole, "ref"))


def test_parts_of_an_adapter_are_refused():
    model = wrap(build(num_layers=3), layer=1, task_type="CAUSAL_LM")
    model.add_adapter("ref", model.peft_config["default"])
    for parameter in masters(model).values():
        parameter.data = parameter.data.new_empty(0)  # as DeepSpeed leaves them
    with pytest.raises(ValueError, match="ZeRO-3 holds the adapters in parts"):
        EMAAdapterCallback().on_train_begin(None, None, None, model=model)


@pytest.mark.parametrize("source", ["default", "mlp", "weight"])
@pytest.mark.parametrize("target", ["layers", "self_attn", "default2"])
def test_adapters_may_be_named_like_modules(source, target):
    config = SingleLayerConfig(layer=1, modules_to_save=["lm_head"])
    model = get_peft_model(build(num_layers=3), config, adapter_name=source)
    model.add_adapter(target, model.peft_config[source])
    move(model, source)
    heads = model.get_base_model().lm_head.modules_to_save
    heads[source].weight.data += 1
    head = heads[target].weight.detach().clone()
    start, policy = copies(model, target), copies(model, source)
    others = {n: p.detach().clone() for n, p in model.named_parameters() if f".{target}." not in n}
    callback = EMAAdapterCallback(target, rate=0.25, every=1, source=source)
    callback.on_train_begin(None, None, None, model=model)
    callback.on_step_end(None, TrainerState(global_step=1), None, model=model)
    expected = {n: 0.75 * weight + 0.25 * policy[n] for n, weight in start.items()}
    assert same(copies(model, target), expected) and not same(expected, start)
    assert torch.equal(heads[target].weight, 0.75 * head + 0.25 * heads[source].weight)
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)


@pytest.mark.parametrize("student", ["mlp", "layers"])
def test_a_student_may_be_named_like_a_module(student):
    model = get_peft_model(build(num_layers=3), SingleLayerConfig(layer=1), adapter_name=student)
    start, added = move(model, student), []
    trainer = EMATeacherMixin()
    trainer.args = SimpleNamespace(teacher_model_kind="ema", teacher_update_rate=0.5, teacher_sync_steps=1)
    trainer.model, trainer.accelerator = model, SimpleNamespace(unwrap_model=lambda model: model)
    trainer.add_callback = added.append
    trainer._setup_teacher_model()
    assert same(copies(model, "teacher"), start)
    move(model, student, seed=2)
    added[0].on_step_end(None, TrainerState(global_step=1), None, model=model)
    assert same(copies(model, "teacher"), {n: 0.5 * w + 0.5 * copies(model, student)[n] for n, w in start.items()})


def test_the_trainer_of_the_docs():
    (code,) = re.findall(r"```python\n([^`]*EMATeacherMixin.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    namespace = {}
    exec(textwrap.dedent(code), namespace)
    assert namespace["EMATeacherTrainer"].__mro__[1:3] == (EMATeacherMixin, namespace["SDPOTrainer"])
