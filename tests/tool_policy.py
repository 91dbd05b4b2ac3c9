"""A model that calls tools without having been trained to: its head is a table of what follows which token."""

import string

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

CALL = '<tool_call>\n{"name": "add", "arguments": {"n": '
UNKNOWN = '<tool_call>\n{"name": "subtract", "arguments": {"n": '
CLOSE = "}}\n</tool_call>"
END = "<|im_end|>"
# What the toy policy writes after each token: mostly calls of the counter's tool, some of them wrong.
POLICY = {
    "\n": {CALL: 0.6, UNKNOWN: 0.1, "d": 0.2, END: 0.1},
    CALL: {"1": 0.4, "2": 0.3, "4": 0.2, "x": 0.1},  # 4 is refused by the tool, x is no JSON
    UNKNOWN: {"1": 1.0},
    **{digit: {CLOSE: 1.0} for digit in "124x"},
    CLOSE: {END: 0.8, "\n": 0.2},  # a second call in the same turn
    "d": {"o": 1.0},
    "o": {END: 0.7, "d": 0.3},
}


def load():
    """A Qwen3 model that nearly follows `POLICY`, and a tokenizer with one token per character or per phrase of it."""
    phrases = [CALL, UNKNOWN, CLOSE, "<|im_start|>", END, "<think>", "</think>"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *phrases, *string.printable])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "|".join(["".join("\\" + c if c in "|{}" else c for c in phrase) for phrase in phrases]) + "|[\\s\\S]"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=END, pad_token=END)

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=len(vocabulary),
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=vocabulary[END],
        pad_token_id=None,
    )
    model = transformers.Qwen3ForCausalLM(config)
    logits = torch.full((len(vocabulary), len(vocabulary)), -12.0)
    for token, following in POLICY.items():
        for after, probability in following.items():
            logits[vocabulary[after], vocabulary[token]] = torch.tensor(probability).log()
    with torch.no_grad():
        # One-hot embeddings: after the final norm a token's logits are about its column of the head.
        model.model.embed_tokens.weight.copy_(torch.eye(len(vocabulary)))
        model.lm_head.weight.copy_(logits / len(vocabulary) ** 0.5)
    return model.eval(), tokenizer
