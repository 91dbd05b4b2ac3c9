"""Settings as YAML: the recipes of the package, files of one's own, and what goes before what."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from peft_onelayer.rl.recipe import make_recipe
from peft_onelayer.runs import TrainingSettings
from peft_onelayer.runs.recipes import (
    ABOUT,
    EVALUATION,
    FULL_RATE,
    OPTIONS,
    decoding_of,
    load_recipe,
    read_recipe,
    recipe_names,
    recipe_of,
)

# FACTS: rates of one block and of a full run, by recipe.
RATES = {
    "alfworld-gigpo-1.5b:paper": (5e-6, 5e-6),
    "alfworld-gigpo-3b:paper": (5e-6, 5e-6),
    "alfworld-gigpo-3b:scripts": (3e-6, 1e-6),
    "qwen2.5-math-1.5b-drgrpo:paper": (5e-6, 5e-6),
    "qwen2.5-math-1.5b-drgrpo:scripts": (5e-6, 5e-6),
    "qwen3-1.7b-deepscaler:paper": (5e-6, 5e-6),
    "qwen3-1.7b-deepscaler:scripts": (5e-6, 1e-6),
    "qwen3-1.7b-numina:paper": (5e-6, 5e-6),
    "qwen3-1.7b-numina:scripts": (5e-6, 1e-6),
    "qwen3-4b-numina:paper": (5e-6, 5e-6),
    "qwen3-4b-numina:scripts": (5e-6, 1e-6),
    "qwen3-8b-numina:paper": (5e-6, 5e-6),
    "r1-7b-skywork:paper": (5e-6, 5e-6),
    "r1-7b-skywork:scripts": (5e-6, 1e-6),
}
BASE = Path(__file__).parents[2] / "peft_onelayer" / "demo_model"
PROFILES = Path(__file__).parents[2] / "peft_onelayer" / "profiles"


@pytest.mark.parametrize("name", ["qwen3-1.7b", "Numina", "scripts"])
def test_a_part_of_a_recipes_name_is_answered_with_those_that_hold_it(name):
    with pytest.raises(ValueError) as refused:
        read_recipe(name)
    named = str(refused.value).partition("one of ")[2].split(", ")
    assert named == [recipe for recipe in recipe_names() if name.lower() in recipe] != recipe_names()


def test_every_option_of_train_is_a_key():
    assert OPTIONS.keys() | {"config"} == {field.name for field in dataclasses.fields(TrainingSettings)}


def test_the_recipes_are_those_and_have_the_rates_of_block_and_full():
    assert recipe_names() == sorted(RATES)
    for name, rates in RATES.items():
        block, full = load_recipe(name, out="run"), load_recipe(name, out="run", full=True)
        assert (block.learning_rate, full.learning_rate) == rates, name
        assert full.full and full.layer == "auto" and not block.full
        assert load_recipe(name, out="run", full=True, learning_rate=1e-4).learning_rate == 1e-4


@pytest.mark.parametrize("name", RATES)
def test_a_recipe_makes_a_configuration_and_trains_the_best_block_of_the_profile(name):
    settings = load_recipe(name, out="run")
    recipe = make_recipe(
        settings.algorithm,
        config=settings.config,
        prompts=settings.prompts,
        completions=settings.completions,
        learning_rate=settings.learning_rate,
    )
    config = recipe.config(output_dir="run")
    profile = json.loads((PROFILES / f"{settings.model.replace('/', '--')}.json").read_text())
    scores = {layer: score for layer, score in enumerate(profile["contribution"]) if score is not None}
    assert settings.layer == max(scores, key=scores.get)
    found = read_recipe(name)
    # the step that the text states is the step of the configuration
    if stated := re.search(r"An update is (\d+) x (\d+) completions of at most (\d+) tokens", found[ABOUT]):
        prompts, group, length = map(int, stated.groups())
        assert config.num_generations == group and config.max_completion_length == length
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == prompts * group
        if "512 prompts a batch" in found[ABOUT] or "batch 512" in found[ABOUT]:
            assert config.generation_batch_size == 512 * group
    if EVALUATION in found:
        assert decoding_of(name) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_completion_tokens": 3072}


def test_the_costs_that_the_recipes_state_are_those_of_the_shapes():
    shapes = {  # hidden, intermediate, blocks, heads, key-value heads, head dimension, biases, q and k norms
        "Qwen/Qwen3-1.7B-Base": (2048, 6144, 16, 8, 128, False, True),
        "Qwen/Qwen3-4B-Base": (2560, 9728, 32, 8, 128, False, True),
        "Qwen/Qwen3-8B-Base": (4096, 12288, 32, 8, 128, False, True),
        "Qwen/Qwen2.5-Math-1.5B": (1536, 8960, 12, 2, 128, True, False),
        "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 12, 2, 128, True, False),
        "Qwen/Qwen2.5-3B-Instruct": (2048, 11008, 16, 2, 128, True, False),
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (3584, 18944, 28, 4, 128, True, False),
    }
    for name in RATES:
        found = read_recipe(name)
        d, f, heads, kv, dim, biases, norms = shapes[found["model"]]
        block = d * heads * dim * 2 + d * kv * dim * 2 + 3 * d * f + 2 * d
        block += (heads + 2 * kv) * dim * biases + 2 * dim * norms
        stated = re.search(r"One block has ([\d.]+)M of", found[ABOUT])
        assert float(stated[1]) == round(block / 1e6, 1), name
        gigabytes = re.search(r"([\d.]+) GB for the block", found[ABOUT])
        assert float(gigabytes[1]) == round(block * 16 / 1e9, 2), name


def written(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return path


OWN = "model: base\ntask: gsm8k\nlayer: [3, 5]\nlearning_rate: 1e-5\nbeta: 1e-3\nprompts: 16\nnum_train_epochs: 2\n"


def test_a_file_of_ones_own_and_what_goes_before_it(tmp_path):
    path = written(tmp_path, OWN + 'chat: false\nsampling: {top_p: 0.9}\ngeneration_kwargs: {"min_new_tokens": 3}\n')
    settings = load_recipe(path, out="run")
    assert settings == TrainingSettings(
        model="base",
        task="gsm8k",
        layer=[3, 5],
        learning_rate=1e-5,
        prompts=16,
        chat=False,
        sampling={"top_p": 0.9},
        config={"beta": 1e-3, "num_train_epochs": 2.0, "generation_kwargs": {"min_new_tokens": 3}},
        out="run",
    )
    changed = load_recipe(path, out="b", model="other", beta=0.5, steps=3, layer=4, sampling={"top_k": 5})
    assert (changed.model, changed.layer, changed.steps) == ("other", 4, 3)
    assert changed.config == {"beta": 0.5, "generation_kwargs": {"min_new_tokens": 3}}  # steps exclude epochs
    assert changed.sampling == {"top_p": 0.9, "top_k": 5}
    assert load_recipe(path, out="b", gradient_accumulation_steps=2).prompts is None
    passes = load_recipe(path, out="b", per_device_train_batch_size=4)
    assert passes.prompts == 16 and passes.config["per_device_train_batch_size"] == 4
    text = "model: m\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 32\n"
    passes = load_recipe(written(tmp_path, text), out="b", prompts=8)
    assert passes.prompts == 8 and passes.config == {"per_device_train_batch_size": 4}
    assert load_recipe(written(tmp_path, OWN), out="b", steps_per_generation=4).prompts == 16
    text = "model: m\ngeneration_batch_size: 64\n"
    assert load_recipe(written(tmp_path, text), out="b", steps_per_generation=4).config == {"steps_per_generation": 4}
    path = written(tmp_path, OWN)
    own_data = load_recipe(path, out="b", dataset="x.jsonl", reward="r.py:f")
    assert (own_data.task, own_data.dataset, own_data.reward) == (None, "x.jsonl", "r.py:f")


@pytest.mark.parametrize(
    ("changes", "prompts", "updates"),
    [
        ({"prompts": 32}, 32, 4),
        ({"prompts": 3, "num_generations": 8}, 3, 4),
        ({"prompts": 6, "completions": 2, "per_device_train_batch_size": 2}, 6, 4),
        ({"prompts": 32, "steps_per_generation": 32}, 32, 2),
        ({"prompts": 32, "generation_batch_size": 256}, 32, 2),
        ({"gradient_accumulation_steps": 128}, 256, 2),
    ],
    ids=str,
)
def test_prompts_over_a_papers_step_keep_its_updates_of_a_generation(changes, prompts, updates):
    settings = load_recipe("qwen3-1.7b-numina:paper", task="gsm8k", out="b", **changes)
    step = {"prompts": settings.prompts, "completions": settings.completions}
    config = make_recipe("grpo", None, settings.config, **step).config(output_dir="x", max_steps=1)
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert (step / config.num_generations, config.generation_batch_size / step) == (prompts, updates)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learning_rat: 1",
            "'learning_rat' is no option of onelayer train and no field of GRPOConfig; did you mean le",
        ),
        ("promts: 8", "did you mean prompts"),
        ("algorithm: dpo\nnum_generations: 8", "no field of DPOConfig"),
        ("steps: 1.5", "steps: expected a whole number of at least 1, got 1.5"),
        ("steps: 0", "steps: expected a whole number of at least 1, got 0"),
        ("steps: true", "steps: expected a whole number of at least 1, got True"),
        ("full: 1", "full: expected true or false, got 1"),
        ("revision: 123", "revision: expected text, got 123"),
        ("learning_rate: fast", "learning_rate: expected a number or auto, got 'fast'"),
        ("layer: [1, two]", "layer: expected a whole number or text or a list of whole numbers"),
        ("beta: much", "own.yaml beta=much: expected a number"),
        ("max_steps: 3", "field max_steps is set by --steps"),
        ("push_to_hub: true", "onelayer push"),
        ("run_name: 2020-01-01", "run_name: expected a text, a number, a list or fields"),
        ("sampling: {top_q: 1}", "Sampling has no field 'top_q'; did you mean top_"),
        ("steps: 1\nsteps: 2", "steps stands there twice"),
        ("- a", "holds no settings"),
        ("a: [", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_file_that_cannot_be_is_refused_in_one_line(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        load_recipe(path, model="m", out="run")
    assert "\n" not in str(refused.value)


def test_what_is_not_there():
    with pytest.raises(ValueError, match=r"one of qwen3-1.7b-numina:paper, qwen3-1.7b-numina:scripts$"):
        load_recipe("qwen3-1.7b-numina", out="x")
    with pytest.raises(ValueError, match=r"qwen3-1.7b-numina:paper"):
        load_recipe("qwen3-17b-numina:paper", out="x")
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read"):
        load_recipe("nowhere.yaml", out="x")
    with pytest.raises(ValueError, match="has no out; give one, such as --out run"):
        load_recipe("qwen3-1.7b-numina:paper")


def test_what_a_run_writes_loads_back_to_the_same_settings(tmp_path):
    settings = load_recipe("qwen3-1.7b-numina:scripts", out="run", task="gsm8k", seed=3, chat=True, sampling=None)
    text = recipe_of(settings)
    assert load_recipe(written(tmp_path, text), out="run") == settings
    assert not {"out", ABOUT, FULL_RATE} & yaml.safe_load(text).keys()
    assert load_recipe(written(tmp_path, text), out="again") == dataclasses.replace(settings, out="again")
    secret = dataclasses.replace(settings, config={"model_init_kwargs": {"token": "hf_abc"}, "beta": 0.5})
    assert "hf_abc" not in recipe_of(secret) and "beta: 0.5" in recipe_of(secret)
    assert recipe_of(dataclasses.replace(settings, task=object())) is None
    dpo = {"max_length": None, "loss_type": "ipo"}  # the latter is a list of one
    text = recipe_of(TrainingSettings(model="m", out="run", algorithm="dpo", config=dpo))
    assert load_recipe(written(tmp_path, text), out="run").config == {"max_length": None, "loss_type": ["ipo"]}
    assert load_recipe(written(tmp_path, text), out="run", max_length=5).config["max_length"] == 5
    wrong = {"loss_type": "sigmoid,ipo"}  # which a text makes two of
    assert recipe_of(TrainingSettings(model="m", out="run", algorithm="dpo", config=wrong)) is None


def test_the_command_lists_and_prints_recipes_and_evaluates_by_one(onelayer, tmp_path):
    code, _, out = onelayer("recipes")
    assert code == 0 and all(name in out for name in RATES) and "None of them was run" in out
    code, _, out = onelayer("recipes", "qwen3-4b-numina:scripts")
    assert code == 0 and yaml.safe_load(out) == read_recipe("qwen3-4b-numina:scripts")
    code, lines, _ = onelayer("recipes", "qwen3-4b-numina")
    assert code == 1 and "one of qwen3-4b-numina:paper, qwen3-4b-numina:scripts" in lines[0]
    code, lines, _ = onelayer("train", "--recipe", "alfworld-gigpo-3b:paper", "--config", "x.yaml", "--out", "run")
    assert code == 1 and "give one of them" in lines[0]
    code, lines, _ = onelayer("train", "--recipe", "qwen3-4b-numina:paper", "--out", tmp_path / "run")
    assert (code, len(lines)) == (1, 1) and "give --task" in lines[0], lines
    code, lines, _ = onelayer("train", "--task", "gsm8k", "--out", tmp_path / "run")
    assert (code, len(lines)) == (2, 1) and "MODEL is missing; give it, or --recipe or --config" in lines[0]


def test_a_recipe_says_how_to_evaluate_and_options_go_before_it(onelayer, tmp_path):
    few = ["--task", "arithmetic", "--problems", "2", "--samples", "1", "--no-greedy", "--out", tmp_path / "eval.json"]
    given = ["--recipe", "qwen3-1.7b-numina:paper", "--max-tokens", "3", "--sampling", "top_p=0.5", "--top-k", "7"]
    code, lines, _ = onelayer("eval", BASE, *few, *given)
    assert code == 0, lines
    found = json.loads((tmp_path / "eval.json").read_text())["sampling"]
    expected = {"temperature": 0.6, "top_k": 7, "top_p": 0.5, "max_completion_tokens": 3}
    assert {name: found[name] for name in expected} == expected
    code, lines, _ = onelayer("eval", BASE, *few, "--recipe", "alfworld-gigpo-3b:paper")
    assert code == 1 and "does not say how to evaluate" in lines[0]
