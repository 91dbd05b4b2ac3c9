"""A chat template that adds tokens: TRL would train their embeddings, which are outside of the block."""

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from models import build
from peft_onelayer import SingleLayerConfig


def train(model, chat_tokenizer, tokenizer, folder) -> SFTTrainer:
    chat_tokenizer.save_pretrained(folder / "chat")
    data = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    arguments = SFTConfig(
        str(folder / "run"),
        chat_template_path=str(folder / "chat"),
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    config = SingleLayerConfig(layer=2, task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=config)
    trainer.train()
    return trainer


def test_tokens_that_a_chat_template_adds_are_refused_in_one_line(tmp_path, chat_tokenizer, tokenizer):
    chat_tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    with pytest.raises(AttributeError, match=r"SingleLayerConfig has no trainable_token_indices.*adds tokens") as error:
        train(build(), chat_tokenizer, tokenizer, tmp_path)
    assert "\n" not in str(error.value)
    assert getattr(SingleLayerConfig(layer=1), "trainable_token_indices", None) is None  # as PEFT reads it
