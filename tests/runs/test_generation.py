"""Base and adapters answer from one model in memory as each would alone."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from peft_onelayer import SingleLayerConfig
from peft_onelayer.runs.generation import Speakers

PROMPT = "Hello 12"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("speakers")


@pytest.fixture
def saved(folder, tokenizer):
    """A base and two adapters of different blocks in a folder."""
    if not (folder / "base").exists():
        models.build().save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        for name, layer in (("one", 1), ("two", 2)):
            base = AutoModelForCausalLM.from_pretrained(folder / "base")
            model = get_peft_model(base, SingleLayerConfig(layer=layer))
            torch.manual_seed(layer)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.3 * torch.randn_like(parameter)
            model.save_pretrained(folder / name)
    return folder


def alone(saved, name, tokens=12):
    model = AutoModelForCausalLM.from_pretrained(saved / "base")
    if name != "base":
        model = PeftModel.from_pretrained(model, saved / name)
    tokenizer = AutoTokenizer.from_pretrained(saved / "base")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_each_answers_as_it_would_alone(saved):
    speakers = Speakers(str(saved / "one"), [str(saved / "two")])
    assert speakers.names == ["base", str(saved / "one"), str(saved / "two")]
    expected = {name: alone(saved, name) for name in ("base", "one", "two")}
    assert len(set(expected.values())) == 3
    for name in ("base", "one", "two", "base", "one"):
        pieces = []
        key = name if name == "base" else str(saved / name)
        assert speakers.answer(key, PROMPT, pieces.append, max_tokens=12) == expected[name]
        assert "".join(pieces).strip() == expected[name].strip()


def test_a_conversation_goes_on(saved):
    speakers = Speakers(str(saved / "base"))
    speakers.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    speakers.chat = True
    first = speakers.answer("base", "a", lambda text: None, max_tokens=3)
    speakers.answer("base", "b", lambda text: None, max_tokens=3)
    assert [m["content"] for m in speakers.said["base"]][:3] == ["a", first, "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "no model folder at nowhere"),
        (["{saved}/one", "{saved}/one"], "is given twice"),
        (["{saved}/base", "./nowhere"], "no adapter folder at nowhere"),
        (["{saved}/base", "--chat"], "use --plain"),
        (["{saved}/base", "--prompt", ""], "holds no token"),
        (["{saved}/base", "--prompt", "x" * 600], "give a shorter one"),
    ],
)
def test_wrong_use_is_one_line(onelayer, saved, arguments, message):
    code, lines, _ = onelayer("generate", *(argument.format(saved=saved) for argument in arguments))
    assert code == 1 and message in lines[-1] and lines[-1].startswith("onelayer: "), lines


def test_the_command(onelayer, saved):
    code, _, out = onelayer("generate", saved / "one", "--prompt", PROMPT, "--max-tokens", 12)
    assert code == 0
    assert out == f"base: {alone(saved, 'base')}\n{saved}/one: {alone(saved, 'one')}\n"
    code, _, out = onelayer("generate", saved / "one", "--prompt", PROMPT, "--max-tokens", 12, "--json")
    (answered,) = json.loads(out)["prompts"]
    assert answered["prompt"] == PROMPT and answered["answers"]["base"] == alone(saved, "base")
