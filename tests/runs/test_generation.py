"""Base and adapters answer from one model in memory as each would alone."""

import inspect
import io
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from onelayer_cli.main import app
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
        (["{saved}/one", "{saved}/one", "--prompt", "x"], "is given twice"),
        (["{saved}/base", "./nowhere", "--prompt", "x"], "no adapter folder at nowhere"),
        (["{saved}/base", "--chat", "--prompt", "x"], "use --plain"),
        (["{saved}/base", "--prompt", ""], "holds no text"),
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


def test_lines_on_the_standard_input(onelayer, saved, monkeypatch):
    said = onelayer("generate", saved / "base", "--prompt", "a", "--prompt", "b", "--max-tokens", 3)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n\nc\n"))
    assert onelayer("generate", saved / "base", "--max-tokens", 3) == said
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, lines, out = onelayer("generate", saved / "base")
    assert (code, out) == (1, "") and "no prompt was given; give --prompt TEXT" in lines[0]


def test_characters_that_the_tokenizer_does_not_know(onelayer, saved):
    code, lines, _ = onelayer("generate", saved / "base", "--prompt", f"{PROMPT} \u20ac", "--max-tokens", 1)
    assert code == 0 and [line for line in lines if "does not know \u20ac, so" in line] == lines[-1:], lines
    assert not any("does not know" in line for line in onelayer("generate", saved / "base", "--prompt", "1")[1])


def test_another_base_is_taken_where_the_message_says_so(onelayer, saved, tmp_path, tokenizer):
    other = models.build()
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    asked = ["generate", tmp_path / "other", saved / "one", saved / "two", "--prompt", PROMPT, "--max-tokens", 3]
    code, lines, _ = onelayer(*asked)
    assert code == 1 and lines[-1].endswith("or --allow-other-base."), lines
    code, lines, out = onelayer(*asked, "--allow-other-base")
    assert code == 0 and len(out.splitlines()) >= 3, lines


def test_what_names_the_option_has_it():
    """Commands that load an adapter on a base that the user names."""
    takes = {
        command.name
        for command in app.registered_commands
        if "allow_other_base" in inspect.signature(command.callback).parameters
    }
    assert {
        "analyze",
        "combine",
        "compare",
        "entropy",
        "eval",
        "export",
        "generate",
        "inspect",
        "merge",
        "vote",
    } <= takes
