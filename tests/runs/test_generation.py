"""Base and adapters answer from one model in memory as each would alone."""

import inspect
import io
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from onelayer_cli.main import app
from peft_onelayer import SingleLayerConfig
from peft_onelayer.runs.generation import Speakers
from peft_onelayer.runs.models import fingerprint, load_adapter

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


def test_an_adapter_that_changes_the_base_leaves_the_base_as_it_is(saved, tmp_path):
    for name, options in (("pissa", {"init_lora_weights": "pissa"}), ("lora", {"init_lora_weights": False})):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(saved / "base")
        config = LoraConfig(r=16, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM", **options)
        get_peft_model(base, config).save_pretrained(tmp_path / name)
    pissa, lora, block = str(tmp_path / "pissa"), str(tmp_path / "lora"), str(saved / "one")
    for adapter in (pissa, lora):
        speakers = Speakers(str(saved / "base"), [adapter])
        said = [speakers.answer(name, PROMPT, lambda text: None, max_tokens=12) for name in ("base", adapter, "base")]
        assert said[0] == said[2] == alone(saved, "base") and (said[1] != said[0]) == (adapter == lora)
        assert (speakers.base is speakers.model) == (adapter == lora)  # one copy in memory where one will do
    for adapters in ([pissa, block], [lora, pissa]):
        with pytest.raises(ValueError, match=f"{pissa} changes the weights of the base when it loads.* alone"):
            Speakers(str(saved / "base"), adapters)


@pytest.mark.parametrize(
    ("options", "unchanged"),
    [({}, True), ({"bias": "lora_only"}, False), ({"layer_replication": [[0, 2], [1, 2]]}, False)],
)
def test_what_an_adapter_changes_of_its_base_is_seen(tmp_path, options, unchanged):
    def base():
        return models.build("Llama", num_layers=2, attention_bias=True)

    model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if name.endswith("q_proj.base_layer.bias"):
            parameter.data += 1  # which the adapter's file holds where LoRA has `bias`
    model.save_pretrained(tmp_path)
    loaded = base()
    before = fingerprint(loaded)
    load_adapter(loaded, tmp_path)
    assert (before <= fingerprint(loaded)) == unchanged


def test_of_a_quantized_or_offloaded_base_the_plain_weights_are_looked_at():
    model = models.build("Llama", num_layers=2)
    quantize_(model, Int8WeightOnlyConfig())
    plain = [p for p in model.parameters() if type(p.data) is torch.Tensor]
    assert 0 < len(plain) < len(list(model.parameters()))
    assert fingerprint(model) == fingerprint(model) and len(fingerprint(model)) == len(plain) + 1
    assert fingerprint(models.build("Llama", num_layers=2).to("meta")) == {("blocks", 2)}


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
    asked = ["generate", saved / "base", "--prompt", "a", "--prompt", "b", "--max-tokens", 3]
    said = onelayer(*asked)
    for more, expected in (([], said), (["--json"], onelayer(*asked, "--json"))):
        monkeypatch.setattr("sys.stdin", io.StringIO("\na\n\n \nb\n"))
        assert onelayer("generate", saved / "base", "--max-tokens", 3, *more) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, lines, out = onelayer("generate", saved / "base")
    assert (code, out) == (1, "") and "no prompt was given; give --prompt TEXT" in lines[0]


@pytest.fixture
def chat(saved, tmp_path):
    """The base, with a chat template."""
    shutil.copytree(saved / "base", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    return tmp_path / "chat"


def test_prompts_that_are_given_are_answered_each_by_itself(onelayer, chat, monkeypatch):
    def answers(*prompts, stdin=None):
        monkeypatch.setattr("sys.stdin", stdin)
        given = [part for prompt in prompts for part in ("--prompt", prompt)]
        code, lines, out = onelayer("generate", chat, "--max-tokens", 6, *given, "--json")
        assert code == 0, lines
        return [found["answers"]["base"] for found in json.loads(out)["prompts"]]

    alone = answers(PROMPT) + answers("b")
    assert answers(PROMPT, "b") == alone == answers(stdin=io.StringIO(f"{PROMPT}\nb\n"))
    typed = answers(stdin=Terminal(f"{PROMPT}\nb\n\n"))
    assert typed[0] == alone[0] and typed[1] != alone[1]  # a conversation


def test_a_line_of_a_pipe_is_answered_before_the_next_is_read(onelayer, saved, monkeypatch):
    written, read = [], []

    class Pipe(io.StringIO):
        def __next__(self):
            read.append(len(written))
            return super().__next__()

    monkeypatch.setattr("sys.stdin", Pipe("a\nb\n"))
    monkeypatch.setattr("onelayer_cli.generate._write", written.append)
    assert onelayer("generate", saved / "base", "--max-tokens", 3)[0] == 0
    assert read[0] == 0 < read[1] < read[2]


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_every_prompt_is_checked_before_one_is_answered(onelayer, saved, as_json):
    code, lines, out = onelayer("generate", saved / "base", "--prompt", "a", "--prompt", "x" * 600, *as_json)
    assert (code, out) == (1, "") and lines[-1].endswith("the model has room for 128; give a shorter one"), lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_that_are_typed_end_with_an_empty_one(onelayer, saved, monkeypatch):
    for more in ([], ["--json"]):
        expected = onelayer("generate", saved / "base", "--prompt", "a", "--prompt", "b", "--max-tokens", 3, *more)[2]
        monkeypatch.setattr("sys.stdin", Terminal("a\nb\n\nc\n"))
        code, lines, out = onelayer("generate", saved / "base", "--max-tokens", 3, *more)
        assert (code, out) == (0, expected) and "type a prompt; an empty line ends" in lines, lines


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
