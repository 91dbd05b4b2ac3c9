"""Real runs of transformers' Trainer and TRL's GRPOTrainer, through both of the ways to hand them an adapter."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from models import build, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner.graph_cut import installed_graph_cuts
from tuner.helpers import base_weights, logits, masters, move, same, wrap


@pytest.fixture
def tokenizer():
    """One token per character, for the 64 ids of the tiny models."""
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456 "
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *characters])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    special = {name: f"<{name[:3]}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def reward(completions, **_):
    """Differs from completion to completion, so that the advantages are not zero."""
    return [float(sum(map(ord, text)) % 17) for text in completions]


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("entrance", ["peft_config", "wrapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grpo(tmp_path, tokenizer, entrance, beta, dtype):
    from trl import GRPOConfig, GRPOTrainer

    model, config = build(dtype=dtype), SingleLayerConfig(layer=1, task_type="CAUSAL_LM")
    before = base_weights(model)
    start = {name: w.float() for name, w in before.items() if name.startswith("model.layers.1.")}
    if entrance == "wrapped":
        model = wrap(model, layer=1, task_type="CAUSAL_LM")
        start = move(model)  # an adapter trained before: the reference is this one, not the base
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        max_steps=2,
        learning_rate=1e-2,
        beta=beta,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["one", "two", "three", "four"]}),
        processing_class=tokenizer,
        peft_config=config if entrance == "peft_config" else None,
    )
    assert arguments.gradient_checkpointing  # TRL's default
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    assert same(base_weights(trained), before)
    tuned = masters(trained)
    assert tuned.keys() == start.keys() and len(tuned) == 11
    assert not any(torch.equal(p, start[name]) for name, p in tuned.items())
    assert {p.dtype for p in tuned.values()} == {torch.float32} and all(p.isfinite().all() for p in tuned.values())
    assert {id(p) for p in trained.parameters() if p.requires_grad} == {id(p) for p in tuned.values()}
    assert len(installed_graph_cuts(trained)) == 1
    assert ("ref" in trained.peft_config) == (entrance == "wrapped" and beta > 0)
    if "ref" in trained.peft_config:
        assert same({name: p.detach() for name, p in masters(trained, "ref").items()}, start)
    if beta:
        # before the first update the policy is its own reference
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert abs(kl[0]) < 1e-6 < abs(kl[1])


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens = token_batch(1, seed=index)[0]
        return {"input_ids": tokens, "labels": tokens}


def run(folder, model, resume=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **options,
    )
    Trainer(model=model, args=arguments, train_dataset=Tokens()).train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, use_reentrant):
    options = {"gradient_checkpointing": use_reentrant is not None}
    if use_reentrant is not None:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}

    def fresh():
        return wrap(build(dtype=torch.bfloat16), layer=2, task_type="CAUSAL_LM")

    whole = run(tmp_path, fresh(), **options)
    elsewhere = fresh()
    move(elsewhere)  # so that only the checkpoint can bring it back
    resumed = run(tmp_path / "resumed", elsewhere, resume=str(tmp_path / "checkpoint-2"), **options)
    assert same(masters(resumed), masters(whole))
    assert {p.dtype for p in masters(resumed).values()} == {torch.float32}
    assert torch.equal(logits(resumed.eval()), logits(whole.eval()))
    assert not any(torch.equal(p, base_weights(whole)[name].float()) for name, p in masters(whole).items())
