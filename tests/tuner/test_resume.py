"""A run resumed from a checkpoint is the uninterrupted run: weights, optimizer, schedule, random state, rollouts."""

import random

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from models import build, token_batch
from peft_onelayer import SingleLayerConfig
from tuner.helpers import base_weights, logits, masters, move, same

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 1e-2,
}


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens = token_batch(1, seed=index)[0]
        return {"input_ids": tokens, "labels": tokens}


def fresh(adapter: str = "default", master_dtype: str = "float32"):
    config = SingleLayerConfig(layer=2, task_type="CAUSAL_LM", master_dtype=master_dtype)
    return get_peft_model(build(dtype=torch.bfloat16), config, adapter_name=adapter)


def supervised(folder, model, resume=None, **options):
    """A run of transformers' Trainer."""
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments = TrainingArguments(str(folder), **COMMON, **batches, **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors that `tensor` is made of: torchao's 8-bit states hold codes, scales and a table."""
    if type(tensor) is torch.Tensor:
        return {name: tensor}
    return {f"{name}.{part}": getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}


def state(trainer: Trainer, adapter: str = "default") -> dict[str, object]:
    """Everything a further step would depend on."""
    optimizer = trainer.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {f"{i}.{key}": v for i, p in enumerate(parameters) for key, v in optimizer.state[p].items()}
    tensors = {name: value for name, value in entries.items() if torch.is_tensor(value)}
    return {
        "weights": {n: p.detach() for n, p in masters(trainer.model, adapter).items()},
        "optimizer": {part: tensor for name in tensors for part, tensor in parts(name, tensors[name]).items()},
        "counts": {name: value for name, value in entries.items() if name not in tensors},
        "groups": [{key: v for key, v in group.items() if key != "params"} for group in optimizer.param_groups],
        "schedule": trainer.lr_scheduler.state_dict(),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


def assert_equal(resumed: dict, whole: dict) -> None:
    for tensors in ("weights", "optimizer"):
        assert same(resumed.pop(tensors), whole.pop(tensors))
    assert resumed == whole


def assert_resumes(run, folder, make=fresh, adapter="default", master=torch.float32):
    whole = run(folder, make())
    expected = state(whole, adapter)
    saved = load_file(folder / "checkpoint-2" / ("" if adapter == "default" else adapter) / "adapter_model.safetensors")
    assert len(saved) == 11 and {t.dtype for t in saved.values()} == {master}
    elsewhere = make()
    move(elsewhere, adapter, seed=7)  # so that only the checkpoint can bring it back
    resumed = run(folder / "resumed", elsewhere, str(folder / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_equal(state(resumed, adapter), expected)
    assert {p.dtype for p in masters(resumed.model, adapter).values()} == {master}
    assert torch.equal(logits(resumed.model.eval()), logits(whole.model.eval()))
    untrained = base_weights(whole.model)
    assert same(base_weights(resumed.model), untrained)
    assert not any(torch.equal(p, untrained[n].to(master)) for n, p in masters(whole.model, adapter).items())
    return whole, resumed


@pytest.mark.parametrize(
    "use_reentrant",
    [None, *(pytest.param(way, marks=pytest.mark.more) for way in (False, True))],
    ids=["plain", "non_reentrant", "reentrant"],
)
def test_trainer(tmp_path, use_reentrant):
    options = {"gradient_checkpointing": use_reentrant is not None}
    if use_reentrant is not None:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
    assert_resumes(lambda *given: supervised(*given, **options), tmp_path)


@pytest.mark.parametrize(
    ("adapter", "master"),
    [
        pytest.param("policy", "float32", marks=pytest.mark.more),
        pytest.param("default", "base", marks=pytest.mark.more),
        ("policy", "base"),
    ],
)
def test_another_adapter_name_and_masters_in_the_base_dtype(tmp_path, adapter, master):
    dtype = torch.bfloat16 if master == "base" else torch.float32
    assert_resumes(supervised, tmp_path, lambda: fresh(adapter, master), adapter, dtype)


class Rollouts:
    """A reward that differs from completion to completion, and remembers them."""

    __name__ = "rollouts"

    def __init__(self):
        self.seen = []

    def __call__(self, completions, **_):
        self.seen += completions
        return [float(sum(map(ord, text)) % 17) for text in completions]


PROMPTS = ["one", "two", "three", "four"]


# Before transformers 5.23 a checkpoint's "default" adapter is not loaded where there is a second one.
SECOND_ADAPTER = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23.0.dev0"), reason="resuming loads the second adapter only"
)


@pytest.mark.parametrize("beta", [0.0, pytest.param(0.05, marks=[SECOND_ADAPTER, pytest.mark.more])])
@pytest.mark.parametrize("trained_before", [pytest.param(False, marks=pytest.mark.more), True])
def test_grpo(tmp_path, tokenizer, beta, trained_before):
    from trl import GRPOConfig, GRPOTrainer

    def make():
        model = fresh()
        if trained_before:  # the reference of beta > 0 is this adapter then
            move(model, seed=3)
        return model

    def run(folder, model, resume=None):
        options = {"num_generations": 4, "max_completion_length": 6, "beta": beta}
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=Rollouts(),
            args=GRPOConfig(str(folder), per_device_train_batch_size=4, **COMMON, **options),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, resumed = assert_resumes(run, tmp_path, make)
    completions = whole.reward_funcs[0].seen
    assert len(completions) == 16 and len(set(completions)) > 8
    assert resumed.reward_funcs[0].seen == completions[8:]
    if beta:
        assert same(*({n: p.detach() for n, p in masters(t.model, "ref").items()} for t in (resumed, whole)))


@pytest.mark.parametrize(
    "name", [pytest.param("SFT", marks=pytest.mark.more), pytest.param("DPO", marks=SECOND_ADAPTER)]
)
def test_sft_and_dpo(tmp_path, tokenizer, name):
    import trl

    data = {
        "SFT": {"text": ["a", "bc", "def", "ghij"] * 4},
        "DPO": {"prompt": PROMPTS * 4, "chosen": ["a", "bc", "def", "g"] * 4, "rejected": ["hi", "j", "k", "lm"] * 4},
    }

    def run(folder, model, resume=None):
        trainer = getattr(trl, f"{name}Trainer")(
            model=model,
            args=getattr(trl, f"{name}Config")(str(folder), per_device_train_batch_size=4, **COMMON),
            train_dataset=Dataset.from_dict(data[name]),
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    assert_resumes(run, tmp_path)
