"""The demo model that the package carries: it loads like any other, and its card says what it measures."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_onelayer
from peft_onelayer.rollouts.evaluation import evaluate
from peft_onelayer.rollouts.settings import Sampling
from peft_onelayer.tasks import load_task

FOLDER = Path(peft_onelayer.__file__).parent / "demo_model"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def card_figures(task):
    """The card's greedy and sampled (accuracy, standard error) of a task, as shares."""
    title = {"arithmetic": "Addition", "sort": "Sorting"}[task]
    numbers = re.search(rf"\| {title}, .* \| ([\d.]+) ± ([\d.]+) \| ([\d.]+) ± ([\d.]+) \|", CARD).groups()
    greedy, greedy_error, sampled, sampled_error = (float(number) / 100 for number in numbers)
    return (greedy, greedy_error), (sampled, sampled_error)


def test_the_folder_is_complete_and_small():
    assert {path.name for path in FOLDER.iterdir()} - {"__pycache__"} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 4_000_000


def test_it_loads_strictly_and_without_a_warning(logged):
    transformers.logging.enable_propagation()  # to the root logger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
            AutoTokenizer.from_pretrained(FOLDER)
    finally:
        transformers.logging.disable_propagation()
    assert logged == []
    assert not any(info.values()), info
    assert type(model).__name__ == "Qwen3ForCausalLM" and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_its_shape(model):
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (12, 64, 160)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert config.rope_parameters["rope_theta"] == 10_000.0
    assert model.num_parameters() == 519_168
    assert sum(parameter.numel() for parameter in model.model.layers[0].parameters()) == 43_168


def test_a_token_is_a_character(tokenizer):
    text = "A347+085=0432.S51836270=01235678."
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert len(tokenizer) == 17 and sorted(tokenizer.convert_ids_to_tokens(range(17))) == sorted(
        ["<pad>", "<unk>", *"0123456789AS+=."]
    )
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace(".", "")
    assert tokenizer("A\n x").input_ids == [ids[0]] + [tokenizer.unk_token_id] * 3


def test_the_special_tokens_are_the_same_everywhere(model, tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", ".", None)
    for holder in (model.config, model.generation_config):
        assert holder.pad_token_id == tokenizer.pad_token_id == 0
        assert holder.eos_token_id == tokenizer.eos_token_id == 16
        assert holder.bos_token_id is None
    batch = tokenizer(["A347+085=", "S51836270="], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch.attention_mask == [[0] + [1] * 9, [1] * 10]


def test_an_answer_ends_by_itself(model, tokenizer):
    inputs = tokenizer([row["prompt"] for row in load_task("sort").rows("test", 64, 0)], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=30)
    assert ((tokens[:, 10:] == tokenizer.eos_token_id).sum(1) == 1).all()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.more) for name in ("arithmetic", "sort")])
def test_it_is_half_right_and_as_the_card_says(model, tokenizer, name):
    task = load_task(name)
    rows = task.rows("test", 512 + 2048, 0)[512:]  # as build.py: chosen on the first 512, measured on the others
    (card_greedy, greedy_error), (card_sampled, sampled_error) = card_figures(name)
    greedy = evaluate(model, tokenizer, task, rows, Sampling(greedy=True))
    assert greedy.mean == pytest.approx(card_greedy, abs=0.002)  # a tie may fall differently on another processor
    assert greedy.standard_error == pytest.approx(greedy_error, abs=0.0006)
    sampled = evaluate(model, tokenizer, task, rows[:512], Sampling(seed=1))
    assert abs(sampled.mean - card_sampled) < 4 * sampled.standard_error  # other samples, a quarter of the problems
    assert 0.35 <= greedy.mean <= 0.60
    assert 0.12 <= sampled.mean <= 0.30
    assert greedy.mean - sampled.mean > 0.15  # what reinforcement learning can gain by sharpening alone
    assert sampled_error < greedy_error


def test_the_card(model):
    front = CARD.split("---\n")[1].splitlines()
    assert {"license: apache-2.0", "library_name: transformers", "pipeline_tag: text-generation"} <= set(front)
    assert f"{model.num_parameters():,} parameters (12 blocks of 43,168, float32)" in CARD
    versions = re.search(r"with\s+Python\s+(\S+), torch\s+(\S+),\s+transformers\s+(\S+),\s+tokenizers\s+(\S+)\.", CARD)
    config = json.loads((FOLDER / "config.json").read_text())
    assert versions.group(3) == config["transformers_version"]
    assert "{" not in CARD.replace("`", "")  # every field of the template was filled
