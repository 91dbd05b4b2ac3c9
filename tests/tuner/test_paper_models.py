"""The seven models of the paper, in their real sizes on the meta device: what trains, and how much of the whole."""

import pytest
import torch
from peft import get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from models import token_batch
from peft_onelayer import SingleLayerConfig
from tuner.helpers import base_name

# name: (hidden, intermediate, layers, heads, KV heads, vocabulary, tied, block in millions, whole model in billions)
PAPER = {
    "Qwen3-1.7B-Base": (2048, 6144, 28, 16, 8, 151936, True, 50.3, 1.72),
    "Qwen3-4B-Base": (2560, 9728, 36, 32, 8, 151936, True, 100.9, 4.02),
    "Qwen3-8B-Base": (4096, 12288, 36, 32, 8, 151936, False, 192.9, 8.19),
    "Qwen2.5-Math-1.5B": (1536, 8960, 28, 12, 2, 151936, True, 46.8, 1.54),
    "Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151936, True, 46.8, 1.54),
    "Qwen2.5-3B-Instruct": (2048, 11008, 36, 16, 2, 151936, True, 77.1, 3.09),
    "DeepSeek-R1-Distill-Qwen-7B": (3584, 18944, 28, 28, 4, 152064, False, 233.1, 7.62),
}


@pytest.mark.parametrize("layer", ["middle", pytest.param(0, marks=pytest.mark.more)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i % 3 == 0 else pytest.mark.more) for i, name in enumerate(PAPER)]
)
def test_the_trained_share(name, layer):
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, block_millions, billions = PAPER[name]
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    with torch.device("meta"):
        if name.startswith("Qwen3"):
            base = Qwen3ForCausalLM(Qwen3Config(head_dim=128, **sizes))
        else:
            base = Qwen2ForCausalLM(Qwen2Config(**sizes))
    index = layers // 2 if layer == "middle" else layer
    names = {f"model.layers.{index}.{n}" for n, _ in base.model.layers[index].named_parameters()}
    whole = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, SingleLayerConfig(layer=layer))
    trained = {base_name(n): p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == names
    assert model.get_nb_trainable_parameters() == (sum(trained.values()), whole + sum(trained.values()))
    assert round(sum(trained.values()) / 1e6, 1) == block_millions
    assert round(whole / 1e9, 2) == billions
    with pytest.raises(RuntimeError, match="on the meta device"):
        model(token_batch().to("meta"))
