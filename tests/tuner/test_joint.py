"""Joint passes: what every model gets is what it computes alone, up to the rounding of another batching."""

import pytest
import torch
from peft import get_peft_model
from transformers.cache_utils import DynamicCache

from models import build, build_architecture, token_batch
from peft_onelayer import SingleLayerConfig
from peft_onelayer.tuner.joint import JointDecoder, JointPass, sharing_weights, without_frozen_blocks
from peft_onelayer.tuner.pass_inputs import pass_inputs

LAYERS = {"a": 2, "b": 0, "c": [1, 3], "d": 2, "base": None}


def models(base, layers):
    """Models that share the base's weights, each with a block that has moved; None for the base."""
    made = {}
    for seed, (name, layer) in enumerate(layers.items()):
        model = sharing_weights(base)
        if layer is not None:
            model = get_peft_model(model, SingleLayerConfig(layer=layer))
            torch.manual_seed(seed)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn_like(parameter)
        made[name] = model.eval()
    return made


def joined(base, made):
    joint = JointDecoder(base)
    for name, model in made.items():
        joint.add(name, model)
    return joint


def decoder(model):
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()


def one(name, model, ids, cache=None, width=None, **kwargs):
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": cache is not None, **kwargs}
    return JointPass(name, pass_inputs(decoder(model), (), given, left_out=("past_key_values",)), cache, width)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["Qwen3", "Gemma3Text", "qwen3_moe"])
def base(request):
    if request.param == "qwen3_moe":
        return build_architecture("qwen3_moe")
    return build(request.param).requires_grad_(False)


def test_forward_and_backward(base):
    made = models(base, LAYERS)
    joint = joined(base, made)
    ids = {name: token_batch(3, 10, seed=i) for i, name in enumerate(made)}
    ids["d"][1] = ids["a"][0]  # an equal row of another model
    for _ in range(2):  # the second time from what was kept of the first
        passes = [one(name, made[name], ids[name]) for name in made]
        joint.run(passes)
        weights = torch.linspace(-1, 1, passes[0].output[0].numel()).view_as(passes[0].output[0])
        for own in passes:
            if own.name != "base":
                (own.output * weights).sum().backward()
        assert not passes[-1].output.requires_grad
        outputs = {own.name: own.output.detach() for own in passes}
        joint.backward(passes)
        for name, model in made.items():
            alone = decoder(model)(input_ids=ids[name], attention_mask=torch.ones_like(ids[name])).last_hidden_state
            close(outputs[name], alone.detach())
            if name != "base":
                trained = [p for p in model.parameters() if p.requires_grad]
                expected = torch.autograd.grad((alone * weights).sum(), trained, allow_unused=True)
                for parameter, gradient in zip(trained, expected, strict=True):
                    close(parameter.grad, torch.zeros_like(parameter) if gradient is None else gradient)
                    parameter.grad = None
    assert all(p.grad is None for p in base.parameters())


def test_padding_behind_a_row_is_cut_off(base):
    made = models(base, {"a": 1, "b": 2})
    joint = joined(base, made)
    long, short = token_batch(2, 9), token_batch(2, 6, seed=1)
    padded = torch.nn.functional.pad(short, (0, 3))
    passes = [
        one("a", made["a"], long, width=9),
        one("b", made["b"], padded, width=6, attention_mask=(padded > 0).long()),
    ]
    with torch.no_grad():
        joint.run(passes)
        close(passes[1].output, decoder(made["b"])(input_ids=short).last_hidden_state)
    assert passes[1].output.shape[1] == 6


def test_rows_below_their_block_take_no_part_in_the_backward_pass():
    base = build("Qwen3").requires_grad_(False)
    made = models(base, {"low": 0, "high": 3})
    joint = joined(base, made)
    seen = []
    joint.blocks[1].mlp.register_forward_hook(
        lambda module, args, output: seen.append((len(output), output.requires_grad))
    )
    joint.run([one(name, model, token_batch(2, 5, seed=i)) for i, (name, model) in enumerate(made.items())])
    assert seen == [(2, False), (2, True)]


def test_a_generation_that_models_leave(base):
    made = models(base, LAYERS)
    joint = joined(base, made)
    prompts = token_batch(3, 8)  # the same of all models
    caches = {name: DynamicCache(config=decoder(model).config) for name, model in made.items()}
    own = {name: DynamicCache(config=decoder(model).config) for name, model in made.items()}
    ids = dict.fromkeys(made, prompts)
    rows = []
    joint.blocks[0].register_forward_pre_hook(lambda block, args: rows.append(len(args[0])))
    with torch.no_grad():
        for step in range(5):
            living = list(made)[: 5 - step // 2]
            passes = [one(name, made[name], ids[name], caches[name]) for name in living]
            for each in passes:
                mask = torch.ones(3, 8 + step, dtype=torch.long)
                each.inputs.given["attention_mask"] = mask
            joint.run(passes)
            for each in passes:
                name = each.name
                alone = decoder(made[name])(
                    input_ids=ids[name], attention_mask=mask, past_key_values=own[name], use_cache=True
                )
                close(each.output, alone.last_hidden_state)
                ids[name] = token_batch(3, 1, seed=step + len(name) + ord(name[0]))
                assert caches[name].get_seq_length() == own[name].get_seq_length() == 8 + step
    assert rows == [3, 15, 12, 12, 9]  # equal prompts are run once below the blocks


def test_a_weight_that_is_read_without_a_call_is_refused():
    base = build("Qwen3").requires_grad_(False)
    made = models(base, {"a": 1, "b": 2})
    joint = joined(base, made)
    with pytest.raises(RuntimeError, match="a Linear's weight is read without a call"):
        _ = joint.blocks[1].mlp.up_proj.weight
    assert joint.blocks[1].mlp.up_proj.in_features == 32
    joint.remove("a")
    with torch.no_grad():
        joint.run(passes := [one("b", made["b"], token_batch())])
        close(passes[0].output, decoder(made["b"])(input_ids=token_batch()).last_hidden_state)


def test_a_copy_shares_every_tensor_and_stand_ins_are_no_blocks():
    base = build("Qwen3").requires_grad_(False)
    model = models(base, {"a": 2})["a"]
    mine = {id(p) for p in base.parameters()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {id(p) for p in frozen} == mine
    expected = model(token_batch()).logits
    modules = len(list(model.modules()))
    with_blocks = without_frozen_blocks(model)
    assert len(list(model.modules())) < 0.6 * modules
    with with_blocks():
        assert torch.equal(model(token_batch()).logits, expected)
    assert len(list(model.modules())) < 0.6 * modules
