import copy
import dataclasses

import demo_model
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerState

from models import build
from peft_onelayer import SingleLayerConfig
from peft_onelayer.rl import training
from peft_onelayer.rl.recipe import demo_recipe, make_recipe
from peft_onelayer.rl.training import _Progress, refuse_incomplete_resume, train_layer, train_rows
from peft_onelayer.tasks import load_task


@pytest.fixture(scope="module")
def base():
    return demo_model.load()


def test_only_the_block_changes_and_the_seed_decides_how(base):
    model, tokenizer = base
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = []
    for _ in range(2):
        calls = []
        result = train_layer(
            copy.deepcopy(model),
            tokenizer,
            load_task("arithmetic"),
            5,
            steps=3,
            seed=0,
            on_step=lambda step, reward, calls=calls: calls.append((step, reward)),
        )
        assert calls == list(enumerate(result.rewards, start=1)) and len(calls) == 3
        assert all(0 <= reward <= 1 for reward in result.rewards)
        # 24 x 8 completions of at most 5 tokens to prompts of 9, three times; few of them end early
        assert 0.9 * 3 * 192 * 5 < result.tokens_generated <= 3 * 192 * 5
        assert result.tokens_trained == result.tokens_generated + 3 * 192 * 9
        state = {name: p for name, p in result.model.get_base_model().named_parameters() if ".default." in name}
        trained.append({name.replace(".single_layer_params.default", ""): p for name, p in state.items()})
        merged = result.model.merge_and_unload()
        for name, parameter in merged.named_parameters():
            same = torch.equal(parameter, before[name])
            assert same != name.startswith("model.layers.5."), name
    assert trained[0].keys() == trained[1].keys() == {n for n in before if n.startswith("model.layers.5.")}
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


@pytest.mark.parametrize(
    ("given", "needed", "option"),
    [
        ({"prompts": 8, "completions": 2}, 8, "--prompts"),
        ({"prompts": 8, "completions": 2, "config": {"per_device_train_batch_size": 4}}, 8, "--prompts"),
        ({}, 8, "--prompts"),
        (
            {"config": {"per_device_train_batch_size": 32, "num_generations": 4}},
            8,
            "--set per_device_train_batch_size",
        ),
        ({"prompts": 4, "config": {"steps_per_generation": 8}}, 8, "--set steps_per_generation"),
    ],
    ids=["prompts", "prompts and a pass", "defaults", "fields alone", "generation"],
)
def test_fewer_prompts_than_a_step_draws_are_refused(base, given, needed, option):
    task = load_task("arithmetic")
    few = dataclasses.replace(task, rows=lambda split, n, seed: task.rows(split, min(n, 5), seed))
    recipe = make_recipe("grpo", few, **given)
    what = "generation" if "generation" in option else "step"
    line = f"^one {what} draws {needed} prompts and task arithmetic has 5; use a smaller {option}$"
    with pytest.raises(ValueError, match=line):
        train_layer(*base, few, 5, steps=1, seed=0, recipe=recipe)


def test_a_teacher_starts_where_the_student_does(base, tmp_path):
    """Also where that is an adapter; the rate of the first step is 0."""
    adapter = get_peft_model(copy.deepcopy(base[0]), SingleLayerConfig(layer=5))
    with torch.no_grad():
        for parameter in (p for p in adapter.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.save_pretrained(tmp_path / "adapter")
    task = load_task("arithmetic")
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_generations": 2}
    recipe = make_recipe("sdpo", task, {**fields, "warmup_steps": 1})
    config = recipe.config(output_dir=str(tmp_path), max_steps=1, report_to="none", save_strategy="no")
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    rows = task.rows("train", 1, 0)
    init = tmp_path / "adapter"
    result = train_rows(model, tokenizer, recipe, config, rows, layers=5, task=task, init_adapter=init)
    trained = dict(result.model.named_parameters())
    students = [name for name in trained if ".single_layer_params.default." in name]
    assert students
    for name in students:
        torch.testing.assert_close(trained[name.replace(".default.", ".teacher.")], trained[name])


def test_a_step_without_a_reward_keeps_the_last_one():
    """As the later steps of a generation; a run without rewards tells its losses."""
    told, state = [], TrainerState()
    for logs in ([{"loss": 3.0, "reward": 0.5}, {"loss": 2.0}], [{"loss": 1.0}]):
        progress = _Progress(lambda step, value: told.append(value), lambda step, logs: None)
        for one in logs:
            progress.on_log(None, state, None, logs=one)
    assert told == [0.5, 0.5, 1.0]


def test_it_prints_nothing_on_stdout(base, capfd):
    model, tokenizer = base
    train_layer(copy.deepcopy(model), tokenizer, load_task("sort"), [0], steps=1, seed=1)
    assert capfd.readouterr().out == ""


def test_a_run_that_would_be_resumed_in_part_is_refused(monkeypatch):
    model = get_peft_model(build(), SingleLayerConfig(layer=1))
    monkeypatch.setattr(training.transformers, "__version__", "5.22.2")
    refuse_incomplete_resume(model)
    model.add_adapter("ref", SingleLayerConfig(layer=1))
    with pytest.raises(ValueError, match=r"transformers 5\.22\.2 cannot resume a run with the adapters default, ref: "):
        refuse_incomplete_resume(model)
    monkeypatch.setattr(training.transformers, "__version__", "5.23.0")
    refuse_incomplete_resume(model)


@pytest.mark.more
def test_frozen_blocks_and_prompts_are_run_once(base, tmp_path, monkeypatch):
    """With a reference, by our own training; the weights are those without."""
    model, tokenizer = base
    task = load_task("arithmetic")
    trained, forwards = [], []
    for share in (True, False):
        if not share:
            monkeypatch.setattr(training, "shared_prefix", lambda trainer: None)
            monkeypatch.setattr(training, "shared_prompts", lambda trainer: None)
            monkeypatch.setattr(training, "scored_positions", lambda trainer: None)
        own, rows = copy.deepcopy(model), []
        norm = own.model.layers[0].input_layernorm
        norm.register_forward_hook(lambda module, args, output, rows=rows: rows.append(args[0].shape))
        recipe = demo_recipe(task, 2)
        recipe = dataclasses.replace(recipe, settings={**recipe.settings, "beta": 0.04})
        result = train_layer(own, tokenizer, task, 5, steps=2, seed=0, recipe=recipe)
        trained.append({name: p.detach() for name, p in result.model.named_parameters() if ".default." in name})
        forwards.append(sum(shape[0] * shape[1] for shape in rows))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert forwards[0] < 0.85 * forwards[1]  # with the comparison, once


def test_another_peft_method_trains_to_compare_with(base):
    model, tokenizer = base
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    result = train_layer(copy.deepcopy(model), tokenizer, load_task("arithmetic"), lora, steps=1, seed=0)
    trained = {name: p for name, p in result.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 12 and all("lora_" in name for name in trained) and len(result.rewards) == 1
    assert all(bool(p.any()) for name, p in trained.items() if "lora_B" in name)  # they are 0 before training


@pytest.mark.parametrize(
    ("dtype", "layer", "given", "computes"),
    [
        (torch.bfloat16, None, {}, torch.bfloat16),
        (torch.bfloat16, None, {"bf16": False}, torch.float32),
        (torch.bfloat16, 5, {}, torch.bfloat16),
        (torch.float32, None, {}, torch.float32),
    ],
    ids=str,
)
def test_all_parameters_compute_in_the_base_dtype_as_a_block_does(base, dtype, layer, given, computes):
    model, tokenizer = copy.deepcopy(base[0]).to(dtype), base[1]
    seen = []
    linear = model.model.layers[5].mlp.down_proj
    linear.register_forward_hook(lambda module, inputs, output: seen.append((module.training, output.dtype)))
    task = load_task("arithmetic")
    recipe = make_recipe("grpo", task, {"learning_rate": 1e-3, **given}, prompts=2, completions=2)
    result = train_layer(model, tokenizer, task, layer, steps=1, seed=0, recipe=recipe)
    assert {found for training, found in seen if training} == {computes}
    assert result.model.dtype == dtype
