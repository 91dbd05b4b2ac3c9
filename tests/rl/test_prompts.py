"""Prompts shared in a trainer's generation: fewer rows in its first pass, the same run."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from models import build
from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import shared_prompts


def reward(completions, **columns):
    return [float(sum(map(ord, text)) % 7) for text in completions]


def run(tokenizer, out, peft_config, share):
    model = build()
    rows = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape[:2])))
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(
            str(out),
            max_steps=2,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=5,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"abc{c}"[: 2 + i % 3]} for i, c in enumerate("ijklmnop")]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if share:
        shared_prompts(trainer)
    trainer.train()
    assert "forward" not in vars(model.model)
    return rows, {name: p.detach() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "config",
    [
        SingleLayerConfig(layer=2, task_type="CAUSAL_LM"),
        pytest.param(None, marks=pytest.mark.more, id="in full"),
        pytest.param(LoraConfig(target_modules="all-linear", init_lora_weights=False), marks=pytest.mark.more),
    ],
)
def test_a_generation_begins_with_each_prompt_once_and_the_run_is_the_same(config, tokenizer, tmp_path):
    torch.manual_seed(0)
    plain_rows, plain = run(tokenizer, tmp_path, config, share=False)
    torch.manual_seed(0)
    rows, shared = run(tokenizer, tmp_path, config, share=True)
    assert [n for n, t in plain_rows if t > 1].count(8) == len([n for n, t in rows if t > 1 and n == 8]) + 2
    assert [n for n, t in rows].count(2) == 2  # two generations of two prompts
    assert all(torch.equal(plain[name], shared[name]) for name in plain)
