"""Finding the blocks of a model and naming the ones to train."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from models import FAMILIES, build
from peft_onelayer.layers import parse_layers, resolve_layers
from peft_onelayer.tuner import find_decoder_stack


class Block(nn.Module):
    """A block that holds a ModuleList of its own, as mixtures of experts did."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])


class Plain(nn.Module):
    def __init__(self, **lists: int):
        super().__init__()
        for name, length in lists.items():
            setattr(self, name, nn.ModuleList([Block() for _ in range(length)]))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (0, [0]),
        (27, [27]),
        (-1, [27]),
        (-28, [0]),
        ("14", [14]),
        ("-2", [26]),
        (" 3 ", [3]),
        (np.int64(5), [5]),
        (torch.tensor(5), [5]),
        ([3, -1, 0], [0, 3, 27]),
        ((4, 2), [2, 4]),
        (range(2, 5), [2, 3, 4]),
        ("8-13", [8, 9, 10, 11, 12, 13]),
        ("8-8", [8]),
        ("0-27", list(range(28))),
        ("middle", [14]),
        ("mid-1", [13]),
        ("mid-5", [11, 12, 13, 14, 15]),
        ("mid-28", list(range(28))),
    ],
)
def test_resolve_layers(layer, expected):
    resolved = resolve_layers(layer, 28)
    assert resolved == expected
    assert all(type(index) is int for index in resolved)


@pytest.mark.parametrize("num_layers", [1, 2, 5, 24, 36])
def test_middle_layers_lie_in_the_middle(num_layers):
    assert resolve_layers("middle", num_layers) == [num_layers // 2]
    for count in range(1, num_layers + 1):
        layers = resolve_layers(f"mid-{count}", num_layers)
        assert len(layers) == count
        below, above = layers[0], num_layers - 1 - layers[-1]
        assert abs(below - above) <= 1


@pytest.mark.parametrize(
    ("layer", "parts"),
    [
        (28, ["layer=28", "28 blocks", "0 to 27", "-28 to -1"]),
        (-29, ["layer=-29", "28 blocks"]),
        ([1, 40], ["[1, 40]", "0 to 27"]),
        ("20-40", ["'20-40'", "0 to 27"]),
        ("9-7", ["'9-7'", "empty", "7-9"]),
        ([], ["[]", "empty", '"mid-5"']),
        ("", ["''", "an index"]),
        ([3, 3], ["[3, 3]", "twice"]),
        ([27, -1], ["[27, -1]", "twice", "[27, 27]"]),
        ("mid-0", ["'mid-0'", "no block"]),
        ("mid-29", ["'mid-29'", "29 of 28"]),
        ("midle", ["'midle'", 'Did you mean "middle"?']),
        ("first", ["'first'", "an index, a list of indices"]),
        ("1,,2", ["'1,,2'", "an index, a list of indices"]),
        ("3,8-10,9", ["'3,8-10,9'", "twice"]),
        ("3,mid-29", ["'3,mid-29'", "29 of 28"]),
        (1.5, ["1.5", "an index"]),
        (True, ["True", "an index"]),
        ([1, "2"], ["[1, '2']", "an index"]),
        ([True], ["[True]", "an index"]),
        ({1, 2}, ["{1, 2}", "an index"]),
        (b"1", ["b'1'", "an index"]),
        (None, ["None", "an index"]),
    ],
)
def test_a_wrong_layer_is_refused_with_what_was_given_and_what_is_expected(layer, parts):
    with pytest.raises(ValueError) as error:
        resolve_layers(layer, 28)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_the_form_is_checked_without_the_number_of_layers():
    assert parse_layers(99) == [99]
    assert parse_layers("mid-7, 3") == [("mid", 7, 0), 3]
    with pytest.raises(ValueError, match="not understood"):
        parse_layers("everything")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stack_of_a_causal_lm(family):
    model = build(family, num_layers=3)
    stack = find_decoder_stack(model)
    assert (stack.name, stack.owner) == ("model.layers", "model")
    assert stack.blocks is model.model.layers


def test_a_plain_module_with_one_list_of_blocks():
    model = Plain(layers=4)
    stack = find_decoder_stack(model)
    assert (stack.name, stack.owner) == ("layers", "")
    assert stack.blocks is model.layers
    nested = nn.Sequential(Plain(layers=2))
    assert (find_decoder_stack(nested).name, find_decoder_stack(nested).owner) == ("0.layers", "0")


def test_blocks_that_hold_module_lists():
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = build("Qwen3Moe", num_layers=3, **sizes)
    for block in model.model.layers:
        block.extra = nn.ModuleList([nn.Linear(2, 2) for _ in range(5)])
    assert find_decoder_stack(model).blocks is model.model.layers


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ModuleDict({"a": nn.ModuleList([nn.ReLU()])}), Plain(layers=0)])
def test_a_model_without_a_stack_is_refused(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no stack .*needs a decoder model"):
        find_decoder_stack(model)


def test_several_stacks_of_a_plain_module():
    model = Plain(encoder=2, decoder=3)
    with pytest.raises(ValueError, match=r"more than one.*encoder \(2 blocks\), decoder \(3 blocks\).*layers_pattern"):
        find_decoder_stack(model)
    assert find_decoder_stack(model, "decoder").blocks is model.decoder
    with pytest.raises(ValueError, match=r"layers_pattern='layers' matches 0 of encoder \(2 blocks\), decoder"):
        find_decoder_stack(model, "layers")


def encoder_decoder(name: str, encoder: int, decoder: int) -> nn.Module:
    if name == "T5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": encoder, "num_decoder_layers": decoder}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=32, num_heads=2, **sizes))
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
    sizes |= {"d_model": 16, "encoder_layers": encoder, "decoder_layers": decoder, "max_position_embeddings": 16}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=32, **sizes))


@pytest.mark.parametrize(("name", "end"), [("T5", "block"), ("Bart", "layers")])
def test_an_encoder_decoder_model_needs_the_pattern(name, end):
    model = encoder_decoder(name, 2, 2)
    with pytest.raises(ValueError, match=rf"encoder\.{end} \(2 blocks\), .*decoder\.{end} \(2 blocks\)"):
        find_decoder_stack(model)
    for side in ("encoder", "decoder"):
        blocks = getattr(model.get_encoder() if side == "encoder" else model.get_decoder(), end)
        assert find_decoder_stack(model, f"{side}.{end}").blocks is blocks
    with pytest.raises(ValueError, match="matches 2 of"):
        find_decoder_stack(model, end)


@pytest.mark.parametrize("vision_layers", [2, 3])
def test_a_multimodal_model_gives_the_text_stack(gemma3, vision_layers):
    model = gemma3(num_layers=3, vision_layers=vision_layers)
    stack = find_decoder_stack(model)
    assert stack.name == "model.language_model.layers"
    assert len(stack.blocks) == 3
    assert find_decoder_stack(model, "encoder.layers").name.startswith("model.vision_tower")
