"""Completions of one prompt share its first pass: fewer rows, the same tokens."""

import copy
import threading
from itertools import product

import pytest
import torch
from transformers import LogitsProcessor

from models import FAMILIES, build, build_architecture, token_batch
from peft_onelayer.tuner.prompts import decoder_of, sharing_prompts

from .helpers import move, wrap

SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}


def rows_of_passes(model):
    """The rows of each pass that the first block sees."""
    rows = []
    decoder = decoder_of(model)
    blocks = getattr(decoder, "layers", None) or decoder.h
    blocks[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


def padded(rows):
    """Prompts of several lengths, padded on the left."""
    ids = token_batch(rows, 8)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, inputs, share, **options):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": True, "top_k": 0, **options}
    if not share:
        return model.generate(**inputs, **settings)
    with sharing_prompts(model):
        return model.generate(**inputs, **settings)


def ways():
    """By default every way for one family, and one way for the others."""
    for family, way in product([*FAMILIES, "GPT2"], ["rows", "num_return_sequences", "beams", "sampling beams"]):
        marks = [] if family == "Qwen3" or way == "num_return_sequences" else [pytest.mark.more]
        yield pytest.param(family, way, id=f"{way}-{family}", marks=marks)


@pytest.mark.parametrize(("family", "expanded_by"), list(ways()))
def test_each_prompt_is_run_once_and_the_tokens_are_the_same(family, expanded_by):
    model = (
        build_architecture("gpt2") if family == "GPT2" else build(family, **(SLIDING if family == "Gemma3Text" else {}))
    )
    inputs, options = padded(3), {}
    if expanded_by == "rows":
        order = torch.tensor([0, 0, 1, 2, 1, 0])
        inputs = {name: value[order] for name, value in inputs.items()}
    elif expanded_by == "num_return_sequences":
        options = {"num_return_sequences": 4}
    else:
        options = {"num_beams": 3, "do_sample": expanded_by == "sampling beams"}
    rows = rows_of_passes(model)
    expected = generate(model, inputs, share=False, **options)
    plain, rows[:] = list(rows), []
    got = generate(model, inputs, share=True, **options)
    assert torch.equal(got, expected)
    assert rows == [3, *plain[1:]] and plain[0] > 3
    assert not decoder_of(model)._forward_pre_hooks and not decoder_of(model)._forward_hooks


def test_a_wrapped_model_in_bfloat16():
    model = wrap(build("Llama", dtype=torch.bfloat16), task_type="CAUSAL_LM").eval()
    move(model)
    inputs = {name: value.repeat_interleave(4, dim=0) for name, value in padded(2).items()}
    assert torch.equal(generate(model, inputs, share=True), generate(model, inputs, share=False))


def test_a_model_of_several_stacks_is_left_alone():
    model = torch.nn.ModuleDict({name: torch.nn.ModuleList([torch.nn.Linear(2, 2)]) for name in "ab"})
    with sharing_prompts(model):
        assert decoder_of(model) is None and not model._forward_hooks


def test_rows_of_equal_tokens_and_another_mask_are_two():
    model, inputs = build("Llama"), padded(1)
    inputs = {name: value.repeat(3, 1) for name, value in inputs.items()}
    inputs["attention_mask"][2, :4] = 0
    rows = rows_of_passes(model)
    assert torch.equal(generate(model, inputs, share=True), generate(model, inputs, share=False))
    assert rows[0] == 2


def test_logits_before_the_first_token_and_hidden_states_are_as_without(monkeypatch):
    seen = []

    class Note(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.clone())
            return scores

    model, inputs = build("Llama"), {name: value.repeat(2, 1) for name, value in padded(2).items()}
    for share in (False, True):
        generate(model, inputs, share, logits_processor=[Note()])
    half = len(seen) // 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(seen[:half], seen[half:], strict=True))
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    a, b = (generate(model, inputs, share, **options).hidden_states for share in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


@pytest.mark.parametrize("case", ["static cache", "embeddings", "linear attention", "no cache", "gradients"])
def test_what_cannot_share_is_left_alone(case):
    model = build_architecture("qwen3_next") if case == "linear attention" else build("Llama")
    inputs, options = {name: value.repeat(2, 1) for name, value in padded(2).items()}, {}
    if case == "static cache":
        options = {"cache_implementation": "static", "disable_compile": True}
    elif case == "embeddings":
        inputs = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]), **inputs}
        del inputs["input_ids"]
    elif case == "no cache":
        options = {"use_cache": False}
    rows = rows_of_passes(model)
    if case == "gradients":
        with sharing_prompts(model):
            assert model(**inputs).logits.requires_grad
        assert rows == [4]
        return
    expected = generate(copy.deepcopy(model), inputs, share=False, **options)
    assert torch.equal(generate(model, inputs, share=True, **options), expected) and rows[0] == 4


def test_threads_share_each_for_itself_and_leave_nothing():
    model, inputs = build("Llama"), {name: value.repeat(2, 1) for name, value in padded(2).items()}
    expected = generate(model, inputs, share=False, do_sample=False)
    found, inside = [], threading.Barrier(2)

    def run(leaves_first):
        with sharing_prompts(model):
            inside.wait()
            found.append(model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False))
            if not leaves_first:
                inside.wait()
        if leaves_first:
            inside.wait()

    threads = [threading.Thread(target=run, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(tokens, expected) for tokens in found)
    assert not decoder_of(model)._forward_pre_hooks and not decoder_of(model)._forward_hooks
